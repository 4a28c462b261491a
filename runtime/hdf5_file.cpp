#include "runtime/hdf5_file.hpp"

#include <fcntl.h>
#include <hdf5.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "runtime/hdf5_open.hpp"
#include "runtime/hdf5_type.hpp"
#include "runtime/posix_file.hpp"

namespace annulus {
namespace {

constexpr std::size_t kMostDatasets = 10000;
constexpr std::size_t kMostObjects = 100000;
constexpr std::size_t kMostNamed = 12;

// Refuses a pipe or a folder before HDF5 could hang on it.
std::int64_t regular_file_bytes(const std::string& path) {
  struct stat status {};
  const bool found = stat(path.c_str(), &status) == 0;
  require(found, ExitCode::missing_input, "{}: cannot be read: {}", path, errno_text(errno));
  require(S_ISREG(status.st_mode), ExitCode::bad_data, "{}: is not a regular file", path);
  const FileDescriptor readable(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  require(static_cast<bool>(readable), ExitCode::missing_input, "{}: cannot be read: {}", path,
          errno_text(errno));
  return status.st_size;
}

Hdf5Handle reading_properties() {
  Hdf5Handle properties =
      own(ANNULUS_CHECK_HDF5(H5Pcreate(H5P_FILE_ACCESS), ExitCode::internal, "HDF5"), H5Pclose);
  const hid_t id = properties.get().value;
  ANNULUS_CHECK_HDF5(H5Pset_fapl_sec2(id), ExitCode::internal, "HDF5: no plain driver");
#if H5_VERSION_GE(1, 10, 7)
  // Readers need no lock, and network file systems often refuse one.
  ANNULUS_CHECK_HDF5(H5Pset_file_locking(id, false, true), ExitCode::internal, "HDF5: locking");
#endif
  return properties;
}

int descriptor_of(hid_t file, const std::string& path) {
  void* handle = nullptr;
  ANNULUS_CHECK_HDF5(H5Fget_vfd_handle(file, H5P_DEFAULT, &handle), ExitCode::internal,
                     "{}: no descriptor", path);
  return *static_cast<int*>(handle);
}

struct Listing {
  std::vector<std::string> datasets;
  std::size_t objects = 0;
};

#if H5_VERSION_GE(1, 12, 0)
using ObjectInfo = H5O_info2_t;
#else
using ObjectInfo = H5O_info_t;
#endif

herr_t note_dataset(hid_t /*root*/, const char* name, const ObjectInfo* info, void* data) {
  auto& listing = *static_cast<Listing*>(data);
  if (info->type == H5O_TYPE_DATASET) listing.datasets.emplace_back(name);
  const bool full = listing.datasets.size() >= kMostDatasets || ++listing.objects >= kMostObjects;
  return full ? 1 : 0;
}

std::string named(const std::vector<std::string>& datasets) {
  if (datasets.empty()) return "the file has no datasets";
  std::string text = "the file has ";
  for (std::size_t i = 0; i < std::min(datasets.size(), kMostNamed); ++i) {
    text += (i > 0 ? ", " : "") + printable(datasets[i]);
  }
  if (datasets.size() > kMostNamed)
    text += fmt::format(" and {} more", datasets.size() - kMostNamed);
  return text;
}

// Reads one chunk for nothing; an error is the reader's to report.
void try_chunk(const OpenDataset& dataset, const Shape& cell) {
  Shape begin = cell;
  Shape extent = cell;
  for (int dim = 0; dim < cell.rank(); ++dim) {
    begin[dim] *= dataset.info.chunk[dim];
    extent[dim] = std::min(dataset.info.chunk[dim], dataset.info.shape[dim] - begin[dim]);
  }
  const bool floating = dataset.info.type.kind == StoredType::Kind::floating;
  const DType dtype = floating ? dataset.info.type.dtype : DType::i64;
  std::vector<std::int64_t> scratch(static_cast<std::size_t>(extent.elements()));
  try {
    read_dataset(dataset, Selection::block(begin, extent),
                 TensorView(scratch.data(), dtype, extent), {});
  } catch (const Error&) {
  }
}

}  // namespace

struct Hdf5File::State {
  std::string path;
  std::int64_t bytes = 0;
  Hdf5Handle file;
  int descriptor = -1;

  std::int64_t id() const { return file.get().value; }
  std::string what(const std::string& dataset) const { return path + ": " + printable(dataset); }
};

Hdf5File::Hdf5File(const std::string& path) : state_(std::make_unique<State>()) {
  state_->path = path;
  state_->bytes = regular_file_bytes(path);
  const Hdf5Guard guard;
  const Hdf5Handle properties = reading_properties();
  state_->file =
      own(ANNULUS_CHECK_HDF5(H5Fopen(path.c_str(), H5F_ACC_RDONLY, properties.get().value),
                             ExitCode::bad_data, "{}: is not a readable HDF5 file", path),
          H5Fclose);
  state_->descriptor = descriptor_of(state_->id(), path);
}

Hdf5File::~Hdf5File() = default;
Hdf5File::Hdf5File(Hdf5File&&) noexcept = default;
Hdf5File& Hdf5File::operator=(Hdf5File&&) noexcept = default;

const std::string& Hdf5File::path() const { return state_->path; }

std::int64_t Hdf5File::bytes() const { return state_->bytes; }

std::vector<std::string> Hdf5File::dataset_paths() const {
  const Hdf5Guard guard;
  Listing listing;
#if H5_VERSION_GE(1, 12, 0)
  const herr_t status = H5Ovisit3(state_->id(), H5_INDEX_NAME, H5_ITER_NATIVE, note_dataset,
                                  &listing, H5O_INFO_BASIC);
#else
  const herr_t status = H5Ovisit2(state_->id(), H5_INDEX_NAME, H5_ITER_NATIVE, note_dataset,
                                  &listing, H5O_INFO_BASIC);
#endif
  ANNULUS_CHECK_HDF5(status, ExitCode::bad_data, "{}: its objects cannot be listed", state_->path);
  return std::move(listing.datasets);
}

bool Hdf5File::has(const std::string& object) const {
  const Hdf5Guard guard;
  try {
    return static_cast<bool>(open_object(state_->id(), state_->path, object));
  } catch (const Error& error) {
    if (error.code() == ExitCode::missing_input) return false;
    throw;
  }
}

OpenDataset Hdf5File::open_dataset(const std::string& dataset) const {
  const std::string what = state_->what(dataset);
  Hdf5Handle handle;
  try {
    handle = open_object(state_->id(), state_->path, dataset);
  } catch (const Error& error) {
    if (error.code() != ExitCode::missing_input) throw;
    throw Error(error.code(), fmt::format("{}; {}", error.what(), named(dataset_paths())));
  }
  require(H5Iget_type(handle.get().value) == H5I_DATASET, ExitCode::bad_data,
          "{}: is not a dataset; {}", what, named(dataset_paths()));
  DatasetInfo info = inspect(handle.get().value, state_->bytes, what, dataset);
  return {std::move(handle), state_->descriptor, state_->bytes, what, std::move(info)};
}

DatasetInfo Hdf5File::describe(const std::string& dataset) const {
  const Hdf5Guard guard;
  return open_dataset(dataset).info;
}

std::optional<std::string> Hdf5File::text_attribute(const std::string& object,
                                                    const std::string& name) const {
  const Hdf5Guard guard;
  const Hdf5Handle handle = open_object(state_->id(), state_->path, object);
  std::string text = annulus::text_attribute(handle.get().value, name);
  if (text.empty()) return std::nullopt;
  return text;
}

void Hdf5File::touch(const DatasetInfo& dataset) const {
  if (dataset.storage != Storage::chunked) return;
  constexpr int kMostChunks = 1000000;
  const Hdf5Guard guard;
  const OpenDataset opened = open_dataset(dataset.path);
  const bool decoded_by_hdf5 = !is_decodable(dataset.filters);
  int count = 0;
  for_each_cell(Selection(dataset.shape), dataset.chunk, [&](const Shape& cell) {
    if (decoded_by_hdf5) return try_chunk(opened, cell);
    std::array<hsize_t, Shape::kMaxRank> offset{};
    for (int dim = 0; dim < cell.rank(); ++dim) {
      offset[static_cast<std::size_t>(dim)] = static_cast<hsize_t>(cell[dim] * dataset.chunk[dim]);
    }
    hsize_t bytes = 0;  // an error is the reader's to report
    if (++count <= kMostChunks) H5Dget_chunk_storage_size(opened.id(), offset.data(), &bytes);
  });
}

void Hdf5File::read(const DatasetInfo& dataset, const Selection& selection, TensorView destination,
                    const ReadOptions& options) const {
  const Hdf5Guard guard;
  read_dataset(open_dataset(dataset.path), selection, destination, options);
}

}  // namespace annulus
