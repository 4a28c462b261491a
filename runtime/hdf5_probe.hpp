#pragma once

#include <functional>
#include <string>

namespace annulus {

/// Runs `walk`, which reads the metadata of a foreign HDF5 file, in a child process first: HDF5
/// itself divides by zero or runs out of its buffers on some damaged files, and then the child is
/// what ends. Throws bad_data when it did, or when it took longer than 20 s; what `walk` itself
/// throws is left for the caller to meet again. Costs one fork.
void probe_in_child(const std::string& path, const std::function<void()>& walk);

}  // namespace annulus
