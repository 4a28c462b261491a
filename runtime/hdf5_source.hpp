#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "runtime/hdf5_dataset.hpp"
#include "runtime/hdf5_driver.hpp"
#include "runtime/hdf5_file.hpp"
#include "runtime/hdf5_handle.hpp"
#include "runtime/hdf5_table.hpp"

namespace annulus {

/// A foreign file as HDF5 sees it, treated as hostile: external links, external storage, virtual
/// datasets, unknown filters and plugins are refused, and no claimed size is believed that the file
/// cannot hold. HDF5 may crash over it; only walk_hdf5() makes one, in a child process.
class Hdf5Source {
 public:
  /// Throws bad_data when it is not (or no longer) HDF5.
  Hdf5Source(int descriptor, const std::string& path, std::int64_t file_bytes);
  Hdf5Source(const Hdf5Source&) = delete;
  Hdf5Source& operator=(const Hdf5Source&) = delete;

  const std::string& path() const { return target_.path; }
  /// Paths of the datasets, in the file's order, without a leading slash: at most 10,000.
  std::vector<std::string> dataset_paths() const;
  /// Whether a path leads to an object of this file.
  bool has(const std::string& object) const;
  /// Throws missing_input when there is no such dataset (naming what there is), bad_data when its
  /// type, rank or storage cannot be read here.
  DatasetInfo describe(const std::string& dataset) const;
  /// A string attribute of a dataset, a group or the root ("/"); empty when there is none.
  std::string text_attribute(const std::string& object, const std::string& name) const;

 private:
  std::string what(const std::string& object) const { return path() + ": " + printable(object); }

  mutable DriverTarget target_;
  Hdf5Handle file_;
};

/// Lets a child process open the file inside `descriptor` with HDF5 and walk over it. An Error of
/// the walk is thrown here; bad_data when the child did not survive it.
Hdf5Table walk_hdf5(int descriptor, const std::string& path, std::int64_t file_bytes,
                    const Hdf5Walk& walk);

/// Runs `ask` and keeps what it returned or the Error it threw.
template <typename Value>
Hdf5Answer<Value> answer_of(const std::function<Value()>& ask) {
  try {
    return ask();
  } catch (const Error& error) {
    return error;
  }
}

}  // namespace annulus
