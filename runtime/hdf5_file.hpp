#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/types.hpp"
#include "runtime/hdf5_dataset.hpp"
#include "runtime/hdf5_table.hpp"
#include "runtime/selection.hpp"

namespace annulus {

class Communicator;
class Hdf5Source;
struct MpiHandle;
struct OpenDataset;

/// What a child process asks of the file, putting the answers into the table.
using Hdf5Walk = std::function<void(const Hdf5Source&, Hdf5Table&)>;

struct ReadOptions {
  /// Bytes of scratch memory a read may use beyond its destination (chunks as large as this need
  /// up to three times their size).
  std::int64_t staging_bytes = std::int64_t{16} << 20;
};

/// What will be asked of a file: answered together, by one child process.
struct Hdf5Questions {
  std::vector<std::string> datasets;
  std::vector<Hdf5Table::AttributeName> attributes;
  bool paths = false;
};

/// An HDF5 file open for reading, treated as hostile. A child process opens it with HDF5 and tells
/// what there is and where; this process never lets HDF5 see it, reads bytes from places that it
/// has checked to be in the file, and decodes them itself. Every error names the file, and the
/// dataset, and quotes HDF5's innermost reason.
class Hdf5File {
 public:
  /// Throws missing_input when there is no such file, bad_data when it is not (or no longer) HDF5.
  /// Not collective: the caller opens and reads for itself. What was not asked for here costs
  /// another child when it is.
  explicit Hdf5File(const std::string& path, const Hdf5Questions& questions = {});
  /// The same on all ranks with a child of rank 0 alone. Collective: all ranks throw together.
  Hdf5File(Communicator& ranks, const std::string& path, const Hdf5Questions& questions);
  /// The same with a walk of the caller's own instead of questions.
  Hdf5File(Communicator& ranks, const std::string& path, const Hdf5Walk& walk);
  ~Hdf5File();
  Hdf5File(Hdf5File&&) noexcept;
  Hdf5File& operator=(Hdf5File&&) noexcept;

  const std::string& path() const;
  std::int64_t bytes() const;
  /// Paths of the datasets, in the file's order, without a leading slash: at most 10,000.
  std::vector<std::string> dataset_paths() const;
  /// Throws missing_input when there is no such dataset (naming what there is), bad_data when its
  /// type, rank or storage cannot be read here.
  DatasetInfo describe(const std::string& dataset) const;
  /// What the walk chose.
  const std::vector<std::string>& chosen() const;
  /// A string attribute of a dataset, a group or the root ("/"), when there is one.
  std::optional<std::string> text_attribute(const std::string& object,
                                            const std::string& name) const;

  /// Reads a selection into host memory of any strides; floats are converted to any float dtype,
  /// integers to i32, i64 or u8 (bad_data names a value that does not fit), booleans to u8.
  void read(const DatasetInfo& dataset, const Selection& selection, TensorView destination,
            const ReadOptions& options = {}) const;
  /// The same with all of `ranks` in collective MPI-IO, for parallel file systems. Collective.
  void read_collectively(const MpiHandle& ranks, const DatasetInfo& dataset,
                         const Selection& selection, TensorView destination,
                         const ReadOptions& options = {}) const;

 private:
  struct State;
  OpenDataset open_dataset(const DatasetInfo& dataset) const;
  std::unique_ptr<State> state_;
};

}  // namespace annulus
