#pragma once

#include <string>

#include "kernels/types.hpp"

namespace annulus {

/// Makes an HDF5 file with one contiguous dataset whose data is allocated but not written: callers
/// write it at DatasetInfo::file_offset. Replaces an existing file; throws io.
void make_contiguous_file(const std::string& path, const std::string& dataset, const Shape& shape,
                          DType dtype);

}  // namespace annulus
