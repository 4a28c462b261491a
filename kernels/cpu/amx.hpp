#pragma once

namespace annulus::kernels::cpu {

/// Whether products may use the tile unit (AMX): the processor has it, the system lets this
/// process use it, and it was not switched off.
bool has_amx();

/// Switches the tile unit off or on again for all threads, so that the ways without it can be
/// tested and measured where it is.
void allow_amx(bool allowed);

}  // namespace annulus::kernels::cpu
