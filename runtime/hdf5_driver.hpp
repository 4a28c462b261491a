#pragma once

#include <cstdint>
#include <string>

#include "runtime/hdf5_handle.hpp"

namespace annulus {

/// What the driver reads or writes, and what it saw.
struct DriverTarget {
  int descriptor = -1;
  std::string path;                 // of messages
  std::int64_t existing_bytes = 0;  // of a file to be read
  /// A transfer from or to this address is not carried out but noted: where in the file, how much.
  const void* placeholder = nullptr;
  std::int64_t placed_at = -1;
  std::int64_t placed_bytes = 0;
  /// The first failed read or write. HDF5 does not learn of it; look here after every call.
  std::string failure;
};

/// File access properties for an HDF5 file inside an open descriptor, new or to be read, whatever
/// name HDF5 is given. `target` must outlive the file.
Hdf5Handle driver_properties(DriverTarget& target);

}  // namespace annulus
