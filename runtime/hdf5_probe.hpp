#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace annulus {

/// Runs `walk`, which reads the metadata of a foreign HDF5 file, in a child process and returns
/// what it returned; an Error that it throws is thrown here. HDF5 divides by zero, loops or writes
/// out of its buffers on some damaged files: then only the child ends, and bad_data is thrown. The
/// child prints nothing, writes no file and ends with this process. Costs one fork; the caller
/// holds Hdf5Guard meanwhile, so that no other thread is inside HDF5.
std::vector<std::byte> ask_in_child(const std::string& path,
                                    const std::function<std::vector<std::byte>()>& walk);

/// Called by a long `walk` whenever it gets on: 20 s without it end the child.
void keep_asking() noexcept;

}  // namespace annulus
