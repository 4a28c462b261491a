#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/types.hpp"
#include "runtime/chunk_filters.hpp"
#include "runtime/selection.hpp"

namespace annulus {

struct MpiHandle;
struct OpenDataset;

/// How a file stores one element.
struct StoredType {
  enum class Kind : std::uint8_t { floating, integer, boolean };

  Kind kind = Kind::floating;
  DType dtype = DType::f32;  // of Kind::floating
  int bytes = 4;
  bool is_signed = true;  // of Kind::integer
  bool big_endian = false;

  std::string to_string() const;  // "big-endian f32", "i64", "bool"
};

enum class Storage : std::uint8_t { contiguous, chunked, compact };

/// What is known of a dataset before any of its data is read.
struct DatasetInfo {
  std::string path;
  Shape shape;
  StoredType type;
  Storage storage = Storage::contiguous;
  Shape chunk;                       // of Storage::chunked
  std::vector<ChunkFilter> filters;  // in the order in which they were applied
  std::int64_t file_offset = 0;      // of Storage::contiguous
  std::int64_t data_bytes = 0;       // elements × bytes of one
};

struct ReadOptions {
  /// Bytes of scratch memory a read may use beyond its destination (chunks as large as this need
  /// up to three times their size).
  std::int64_t staging_bytes = std::int64_t{16} << 20;
};

/// An HDF5 file open for reading, treated as hostile: external links, external storage, virtual
/// datasets, unknown filters and plugins are refused, and no claimed size is believed that the
/// file cannot hold. Every error names the file, and the dataset, and quotes HDF5's innermost
/// reason. Not collective: each rank opens and reads for itself.
class Hdf5File {
 public:
  /// Throws missing_input when there is no such file, bad_data when it is not (or no longer) HDF5.
  explicit Hdf5File(const std::string& path);
  ~Hdf5File();
  Hdf5File(Hdf5File&&) noexcept;
  Hdf5File& operator=(Hdf5File&&) noexcept;

  const std::string& path() const;
  std::int64_t bytes() const;
  /// Paths of the datasets, in the file's order, without a leading slash: at most 10,000.
  std::vector<std::string> dataset_paths() const;
  /// Whether a path leads to an object of this file.
  bool has(const std::string& object) const;
  /// Throws missing_input when there is no such dataset (naming what there is), bad_data when its
  /// type, rank or storage cannot be read here.
  DatasetInfo describe(const std::string& dataset) const;
  /// Looks up every chunk of a dataset, up to a million; those that HDF5 itself must decode (szip,
  /// nbit, scaleoffset) are decoded once.
  void touch(const DatasetInfo& dataset) const;
  /// A string attribute of a dataset, a group or the root ("/"), when there is one.
  std::optional<std::string> text_attribute(const std::string& object,
                                            const std::string& name) const;

  /// Reads a selection into host memory of any strides; floats are converted to any float dtype,
  /// integers to i32, i64 or u8 (bad_data names a value that does not fit), booleans to u8.
  void read(const DatasetInfo& dataset, const Selection& selection, TensorView destination,
            const ReadOptions& options = {}) const;
  /// The same with all of `ranks` in collective MPI-IO read, for parallel file systems.
  /// Collective; usage without a parallel HDF5.
  void read_collectively(const MpiHandle& ranks, const DatasetInfo& dataset,
                         const Selection& selection, TensorView destination,
                         const ReadOptions& options = {}) const;

 private:
  struct State;
  OpenDataset open_dataset(const std::string& dataset) const;
  std::unique_ptr<State> state_;
};

}  // namespace annulus
