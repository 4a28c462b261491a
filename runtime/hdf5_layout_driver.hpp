#pragma once

#include <cstdint>
#include <string>

#include "runtime/hdf5_handle.hpp"

namespace annulus {

/// Where the layout driver writes, and what it saw.
struct LayoutTarget {
  int descriptor = -1;
  std::string path;  // of messages
  /// A write from this address is not carried out but noted in `placed_at`.
  const void* placeholder = nullptr;
  std::int64_t placed_at = -1;
  /// The first failed read or write. HDF5 does not learn of it; look here after every call.
  std::string failure;
};

/// File access properties for a new HDF5 file inside an open descriptor, whatever name HDF5 is
/// given. `target` must outlive the file.
Hdf5Handle layout_properties(LayoutTarget& target);

}  // namespace annulus
