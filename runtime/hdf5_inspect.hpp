#pragma once

#include <cstdint>
#include <string>

#include "runtime/hdf5_dataset.hpp"
#include "runtime/hdf5_driver.hpp"
#include "runtime/hdf5_handle.hpp"

namespace annulus {

/// Opens an object without leaving the file: no external link is followed. Throws missing_input
/// when a component of the path does not exist.
Hdf5Handle open_object(std::int64_t file, const std::string& file_path, const std::string& object);

/// Reads all that is to be known of an opened dataset of the file `target`, its chunks included,
/// and refuses what could read other files, load code or claim more than the file can hold. HDF5
/// may crash in here: only in a child.
DatasetInfo inspect(std::int64_t dataset, DriverTarget& target, const std::string& what,
                    const std::string& path);

}  // namespace annulus
