#include "runtime/hdf5_source.hpp"

#include <hdf5.h>

#include <algorithm>
#include <utility>

#include "runtime/hdf5_inspect.hpp"
#include "runtime/hdf5_probe.hpp"
#include "runtime/hdf5_type.hpp"

namespace annulus {
namespace {

constexpr std::size_t kMostDatasets = 10000;
constexpr std::size_t kMostObjects = 100000;
constexpr std::size_t kMostNamed = 12;

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
  if (listing.objects % 1000 == 0) keep_asking();
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

}  // namespace

Hdf5Source::Hdf5Source(int descriptor, const std::string& path, std::int64_t file_bytes) {
  target_.descriptor = descriptor;
  target_.path = path;
  target_.existing_bytes = file_bytes;
  const Hdf5Handle properties = driver_properties(target_);
  file_ = own(ANNULUS_CHECK_HDF5(H5Fopen(path.c_str(), H5F_ACC_RDONLY, properties.get().value),
                                 ExitCode::bad_data, "{}: is not a readable HDF5 file", path),
              H5Fclose);
}

std::vector<std::string> Hdf5Source::dataset_paths() const {
  Listing listing;
#if H5_VERSION_GE(1, 12, 0)
  const herr_t status = H5Ovisit3(file_.get().value, H5_INDEX_NAME, H5_ITER_NATIVE, note_dataset,
                                  &listing, H5O_INFO_BASIC);
#else
  const herr_t status = H5Ovisit2(file_.get().value, H5_INDEX_NAME, H5_ITER_NATIVE, note_dataset,
                                  &listing, H5O_INFO_BASIC);
#endif
  ANNULUS_CHECK_HDF5(status, ExitCode::bad_data, "{}: its objects cannot be listed", path());
  return std::move(listing.datasets);
}

bool Hdf5Source::has(const std::string& object) const {
  try {
    return static_cast<bool>(open_object(file_.get().value, path(), object));
  } catch (const Error& error) {
    if (error.code() == ExitCode::missing_input) return false;
    throw;
  }
}

DatasetInfo Hdf5Source::describe(const std::string& dataset) const {
  Hdf5Handle handle;
  try {
    handle = open_object(file_.get().value, path(), dataset);
  } catch (const Error& error) {
    if (error.code() != ExitCode::missing_input) throw;
    throw Error(error.code(), fmt::format("{}; {}", error.what(), named(dataset_paths())));
  }
  require(H5Iget_type(handle.get().value) == H5I_DATASET, ExitCode::bad_data,
          "{}: is not a dataset; {}", what(dataset), named(dataset_paths()));
  return inspect(handle.get().value, target_, what(dataset), dataset);
}

std::string Hdf5Source::text_attribute(const std::string& object, const std::string& name) const {
  const Hdf5Handle handle = open_object(file_.get().value, path(), object);
  return annulus::text_attribute(handle.get().value, name);
}

Hdf5Table walk_hdf5(int descriptor, const std::string& path, std::int64_t file_bytes,
                    const Hdf5Walk& walk) {
  const Hdf5Guard guard;
  const std::vector<std::byte> answer = ask_in_child(path, [&] {
    take_hdf5_after_fork();
    const Hdf5Source source(descriptor, path, file_bytes);
    Hdf5Table table;
    table.file_bytes = file_bytes;
    walk(source, table);
    return table.encode();
  });
  Hdf5Table table = Hdf5Table::decode(answer, path);
  require(table.file_bytes == file_bytes, ExitCode::bad_data, "{}: its size is {}, was {}", path,
          table.file_bytes, file_bytes);
  return table;
}

}  // namespace annulus
