#include "runtime/hdf5_open.hpp"

#include <hdf5.h>

#include <algorithm>
#include <array>
#include <limits>

#include "runtime/hdf5_type.hpp"

namespace annulus {
namespace {

// Deflate cannot do better than 1032 to 1, so a dataset that claims more is none.
constexpr std::int64_t kMostInflation = 1032;
// HDF5 needs a chunk in memory as a whole.
constexpr std::int64_t kLargestChunk = std::int64_t{1} << 30;
constexpr int kMostFilters = 8;

herr_t refuse_external(const char* /*parent_file*/, const char* /*parent_group*/,
                       const char* /*child_file*/, const char* /*child_object*/,
                       unsigned* /*access*/, hid_t /*properties*/, void* data) {
  *static_cast<bool*>(data) = true;
  return -1;
}

std::vector<std::string> prefixes_of(const std::string& path) {
  std::vector<std::string> prefixes;
  std::size_t begin = 0;
  while (begin < path.size()) {
    const std::size_t slash = std::min(path.find('/', begin), path.size());
    if (slash > begin) prefixes.push_back(path.substr(0, slash));
    begin = slash + 1;
  }
  return prefixes;
}

[[noreturn]] void refuse_link(const std::string& what) {
  throw Error(ExitCode::bad_data,
              what + ": is a link to another file, which is not followed; copy the data in");
}

void check_links(hid_t file, hid_t properties, const std::string& what, const std::string& path,
                 const bool& external) {
  for (const std::string& prefix : prefixes_of(path)) {
    const htri_t exists = H5Lexists(file, prefix.c_str(), properties);
    if (external) refuse_link(what);
    ANNULUS_CHECK_HDF5(exists, ExitCode::bad_data, "{}: is not readable", what);
    require(exists > 0, ExitCode::missing_input, "{}: does not exist", what);
    H5L_info_t link{};
    ANNULUS_CHECK_HDF5(H5Lget_info(file, prefix.c_str(), &link, properties), ExitCode::bad_data,
                       "{}: is not readable", what);
    if (link.type == H5L_TYPE_EXTERNAL) refuse_link(what);
    require(link.type == H5L_TYPE_HARD || link.type == H5L_TYPE_SOFT, ExitCode::bad_data,
            "{}: is a link of a kind that is not followed", what);
  }
}

Shape shape_of(hid_t dataset, const std::string& what) {
  const Hdf5Handle space =
      own(ANNULUS_CHECK_HDF5(H5Dget_space(dataset), ExitCode::bad_data, "{}: has no shape", what),
          H5Sclose);
  const hid_t id = space.get().value;
  const H5S_class_t kind = H5Sget_simple_extent_type(id);
  require(kind == H5S_SIMPLE || kind == H5S_SCALAR, ExitCode::bad_data, "{}: is empty", what);
  const int rank = ANNULUS_CHECK_HDF5(H5Sget_simple_extent_ndims(id), ExitCode::bad_data,
                                      "{}: has no rank", what);
  require(rank <= Shape::kMaxRank, ExitCode::bad_data, "{}: has rank {}, at most {} is read", what,
          rank, Shape::kMaxRank);
  std::array<hsize_t, Shape::kMaxRank> dims{};
  ANNULUS_CHECK_HDF5(H5Sget_simple_extent_dims(id, dims.data(), nullptr), ExitCode::bad_data,
                     "{}: has no extents", what);
  std::array<std::int64_t, Shape::kMaxRank> extents{};
  for (std::size_t dim = 0; dim < static_cast<std::size_t>(rank); ++dim) {
    require(dims[dim] <= static_cast<hsize_t>(std::numeric_limits<std::int64_t>::max()),
            ExitCode::bad_data, "{}: dimension {} is {}, beyond 63 bits", what, dim, dims[dim]);
    extents[dim] = static_cast<std::int64_t>(dims[dim]);
  }
  return Shape(std::span<const std::int64_t>(extents.data(), static_cast<std::size_t>(rank)));
}

// Elements × bytes of one, or bad_data when 63 bits cannot hold it.
std::int64_t bytes_of(const Shape& shape, int element_bytes, const std::string& what) {
  std::int64_t bytes = element_bytes;
  bool fits = true;
  bool empty = false;
  for (const std::int64_t extent : shape.dims()) {
    empty = empty || extent == 0;
    fits = fits && !__builtin_mul_overflow(bytes, std::max<std::int64_t>(extent, 1), &bytes);
  }
  if (empty) return 0;
  require(fits, ExitCode::bad_data, "{}: claims {} elements, more than 63 bits count", what,
          shape.to_string());
  return bytes;
}

std::vector<ChunkFilter> filters_of(hid_t properties, const std::string& what) {
  const int count = ANNULUS_CHECK_HDF5(H5Pget_nfilters(properties), ExitCode::bad_data,
                                       "{}: its filters are not readable", what);
  require(count <= kMostFilters, ExitCode::bad_data, "{}: has {} filters, at most {} are accepted",
          what, count, kMostFilters);
  std::vector<ChunkFilter> filters;
  for (unsigned i = 0; i < static_cast<unsigned>(count); ++i) {
    unsigned flags = 0;
    std::array<unsigned, 1> parameters{};
    std::size_t parameter_count = parameters.size();
    std::array<char, 64> name{};
    const int id =
        ANNULUS_CHECK_HDF5(H5Pget_filter2(properties, i, &flags, &parameter_count,
                                          parameters.data(), name.size() - 1, name.data(), nullptr),
                           ExitCode::bad_data, "{}: its filters are not readable", what);
    require(!filter_name(id).empty(), ExitCode::bad_data,
            "{}: filter {} ({}) is not accepted; accepted: deflate, shuffle, fletcher32, szip, "
            "nbit, scaleoffset",
            what, id, printable(name.data()));
    require(H5Zfilter_avail(id) > 0, ExitCode::bad_data, "{}: this HDF5 was built without {}", what,
            filter_name(id));
    filters.push_back({id, parameter_count > 0 ? parameters[0] : 0});
  }
  return filters;
}

void inspect_contiguous(hid_t dataset, hid_t properties, std::int64_t file_bytes,
                        const std::string& what, DatasetInfo& info) {
  const int external = ANNULUS_CHECK_HDF5(H5Pget_external_count(properties), ExitCode::bad_data,
                                          "{}: its storage is not readable", what);
  require(external == 0, ExitCode::bad_data,
          "{}: keeps its data in other files (external storage), which is not read", what);
  if (info.data_bytes == 0) return;
  const haddr_t offset = H5Dget_offset(dataset);
  require(offset != HADDR_UNDEF, ExitCode::bad_data, "{}: no data was ever written", what);
  const auto end = static_cast<std::int64_t>(offset);
  require(end >= 0 && end <= file_bytes && info.data_bytes <= file_bytes - end, ExitCode::bad_data,
          "{}: {} of {} bytes at {} wanted, the file has {}: truncated", what,
          info.shape.to_string(), info.data_bytes, offset, file_bytes);
  info.file_offset = end;
}

void inspect_chunked(hid_t properties, std::int64_t file_bytes, const std::string& what,
                     DatasetInfo& info) {
  std::array<hsize_t, Shape::kMaxRank + 1> dims{};
  const int rank = H5Pget_chunk(properties, Shape::kMaxRank + 1, dims.data());
  require(rank == info.shape.rank(), ExitCode::bad_data, "{}: chunks of rank {} in a rank of {}",
          what, rank, info.shape.rank());
  info.chunk = info.shape;
  for (int dim = 0; dim < rank; ++dim) {
    const hsize_t extent = dims[static_cast<std::size_t>(dim)];
    require(extent > 0 && extent <= std::numeric_limits<std::uint32_t>::max(), ExitCode::bad_data,
            "{}: chunk extent {} in dimension {}", what, extent, dim);
    info.chunk[dim] = static_cast<std::int64_t>(extent);
  }
  const std::int64_t chunk_bytes = bytes_of(info.chunk, info.type.bytes, what);
  require(chunk_bytes <= kLargestChunk, ExitCode::bad_data,
          "{}: chunks {} of {} bytes, at most {} are read; rewrite with h5repack", what,
          info.chunk.to_string(), chunk_bytes, kLargestChunk);
  require(
      info.data_bytes / kMostInflation <= file_bytes && chunk_bytes / kMostInflation <= file_bytes,
      ExitCode::bad_data, "{}: claims {} of {} bytes, more than a file of {} bytes can hold", what,
      info.shape.to_string(), info.data_bytes, file_bytes);
}

}  // namespace

Hdf5Handle open_object(std::int64_t file, const std::string& file_path, const std::string& object) {
  const std::string what = file_path + ": " + printable(object);
  const Hdf5Handle owner =
      own(ANNULUS_CHECK_HDF5(H5Pcreate(H5P_LINK_ACCESS), ExitCode::internal, "HDF5"), H5Pclose);
  const hid_t properties = owner.get().value;
  bool external = false;
  ANNULUS_CHECK_HDF5(H5Pset_elink_cb(properties, refuse_external, &external), ExitCode::internal,
                     "HDF5: external links cannot be turned off");
  check_links(file, properties, what, object, external);
  const std::string path = prefixes_of(object).empty() ? "/" : object;
  const hid_t id = H5Oopen(file, path.c_str(), properties);
  if (external) refuse_link(what);
  return own(ANNULUS_CHECK_HDF5(id, ExitCode::bad_data, "{}: cannot be opened", what), H5Oclose);
}

DatasetInfo inspect(std::int64_t dataset, std::int64_t file_bytes, const std::string& what,
                    const std::string& path) {
  DatasetInfo info;
  info.path = path;
  const Hdf5Handle owner = own(ANNULUS_CHECK_HDF5(H5Dget_create_plist(dataset), ExitCode::bad_data,
                                                  "{}: its storage is not readable", what),
                               H5Pclose);
  const hid_t properties = owner.get().value;
  const H5D_layout_t layout = H5Pget_layout(properties);
  require(layout != H5D_VIRTUAL, ExitCode::bad_data,
          "{}: is a virtual dataset, which reads other files; copy the data in", what);
  info.type = stored_type(dataset, what);
  info.shape = shape_of(dataset, what);
  info.data_bytes = bytes_of(info.shape, info.type.bytes, what);
  info.filters = filters_of(properties, what);
  switch (layout) {
    case H5D_CONTIGUOUS:
      info.storage = Storage::contiguous;
      inspect_contiguous(dataset, properties, file_bytes, what, info);
      break;
    case H5D_CHUNKED:
      info.storage = Storage::chunked;
      inspect_chunked(properties, file_bytes, what, info);
      break;
    case H5D_COMPACT:
      info.storage = Storage::compact;
      require(info.data_bytes <= file_bytes, ExitCode::bad_data,
              "{}: claims {} bytes inside its header", what, info.data_bytes);
      break;
    default:
      throw Error(ExitCode::bad_data, what + ": its storage is of an unknown kind");
  }
  return info;
}

}  // namespace annulus
