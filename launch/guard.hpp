#pragma once

namespace annulus::launch {

/// Makes every way this process can end one that says rank, host, phase and step: signals have
/// their handlers and the watchdog runs, from before MPI starts. The watchdog's deadline is the
/// default of --timeout until a command sets its own.
void guard_process();

}  // namespace annulus::launch
