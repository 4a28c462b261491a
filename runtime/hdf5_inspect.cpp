#include "runtime/hdf5_inspect.hpp"

#include <hdf5.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <utility>

#include "runtime/hdf5_probe.hpp"
#include "runtime/hdf5_type.hpp"
#include "runtime/selection.hpp"

namespace annulus {
namespace {

// Deflate cannot do better than 1032 to 1, so a dataset that claims more is none.
constexpr std::int64_t kMostInflation = 1032;
// 32 bytes of each are kept; a terabyte in chunks of 64 KiB has as many.
constexpr std::int64_t kMostChunks = std::int64_t{1} << 24;
constexpr std::size_t kMostParameters = 64;

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

std::vector<ChunkFilter> filters_of(hid_t properties, const std::string& what) {
  const int count = ANNULUS_CHECK_HDF5(H5Pget_nfilters(properties), ExitCode::bad_data,
                                       "{}: its filters are not readable", what);
  std::vector<ChunkFilter> filters;
  for (unsigned i = 0; i < static_cast<unsigned>(count); ++i) {
    unsigned flags = 0;
    std::array<unsigned, kMostParameters> parameters{};
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
    const auto end = parameters.begin() +
                     static_cast<std::ptrdiff_t>(std::min(parameter_count, parameters.size()));
    filters.push_back({id, {parameters.begin(), end}});
  }
  require_decodable(filters, what);
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

// An element of a chunk that was never written.
std::array<std::byte, 8> fill_of(hid_t dataset, hid_t properties, const std::string& what) {
  std::array<std::byte, 8> value{};
  const Hdf5Handle type = own(H5Dget_type(dataset), H5Tclose);
  H5D_fill_value_t kind = H5D_FILL_VALUE_UNDEFINED;
  require(type && H5Pfill_value_defined(properties, &kind) >= 0 &&
              (kind == H5D_FILL_VALUE_UNDEFINED ||
               H5Pget_fill_value(properties, type.get().value, value.data()) >= 0),
          ExitCode::bad_data, "{}: its fill value is not readable: {}", what, hdf5_reason());
  return value;
}

// HDF5 tells the addresses of chunks only in time that grows with their square. Asked to read them
// into the driver's placeholder it looks each up in its index, and the driver notes the address.
class ChunkLookup {
 public:
  ChunkLookup(hid_t dataset, DriverTarget& target) : dataset_(dataset), target_(target) {
    target_.placeholder = &placeholder_;
  }
  ~ChunkLookup() { target_.placeholder = nullptr; }
  ChunkLookup(const ChunkLookup&) = delete;
  ChunkLookup& operator=(const ChunkLookup&) = delete;

  /// False where HDF5 finds none, for whatever reason.
  bool find(std::int64_t cell, const Shape& begin, StoredChunk& chunk) {
    std::array<hsize_t, Shape::kMaxRank> offset{};
    for (int dim = 0; dim < begin.rank(); ++dim) {
      offset[static_cast<std::size_t>(dim)] = static_cast<hsize_t>(begin[dim]);
    }
    target_.placed_at = -1;
    std::uint32_t skipped = 0;
    const herr_t status =
        H5Dread_chunk(dataset_, H5P_DEFAULT, offset.data(), &skipped, &placeholder_);
    if (status < 0 || target_.placed_at < 0) return false;
    chunk = {cell, target_.placed_at, target_.placed_bytes, skipped};
    return true;
  }

 private:
  hid_t dataset_;
  DriverTarget& target_;
  std::byte placeholder_{};
};

std::int64_t count_chunks(hid_t dataset, const std::string& what) {
  const Hdf5Handle space = own(H5Dget_space(dataset), H5Sclose);
  hsize_t written = 0;
  ANNULUS_CHECK_HDF5(space ? H5Dget_num_chunks(dataset, space.get().value, &written) : -1,
                     ExitCode::bad_data, "{}: its chunks are not readable", what);
  return static_cast<std::int64_t>(written);
}

std::vector<StoredChunk> chunks_of(hid_t dataset, const DatasetInfo& info, DriverTarget& target,
                                   const std::string& what) {
  const std::int64_t written = info.data_bytes > 0 ? count_chunks(dataset, what) : 0;
  if (written == 0) return {};
  const std::int64_t cells = checked_bytes(chunk_grid(info), 1, what);
  require(cells <= kMostChunks, ExitCode::bad_data,
          "{}: has {} chunks, at most {} are read; rewrite in larger ones with h5repack", what,
          cells, kMostChunks);
  ChunkLookup lookup(dataset, target);
  std::vector<StoredChunk> chunks;
  std::int64_t cell = 0;
  for_each_cell(Selection(info.shape), info.chunk, [&](const Shape& place) {
    Shape begin = place;
    for (int dim = 0; dim < begin.rank(); ++dim) begin[dim] *= info.chunk[dim];
    StoredChunk chunk;
    if (lookup.find(cell, begin, chunk)) chunks.push_back(chunk);
    if (++cell % 65536 == 0) keep_asking();
  });
  // A chunk that HDF5 counts but does not find was not simply never written.
  require(static_cast<std::int64_t>(chunks.size()) == written, ExitCode::bad_data,
          "{}: {} of {} chunks are readable", what, chunks.size(), written);
  return chunks;
}

void inspect_chunked(hid_t dataset, hid_t properties, DriverTarget& target, const std::string& what,
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
  const std::int64_t chunk_bytes = checked_bytes(info.chunk, info.type.bytes, what);
  const std::int64_t file_bytes = target.existing_bytes;
  require(
      info.data_bytes / kMostInflation <= file_bytes && chunk_bytes / kMostInflation <= file_bytes,
      ExitCode::bad_data, "{}: claims {} of {} bytes, more than a file of {} bytes can hold", what,
      info.shape.to_string(), info.data_bytes, file_bytes);
  info.filters = filters_of(properties, what);
  info.fill = fill_of(dataset, properties, what);
  info.chunks =
      std::make_shared<const std::vector<StoredChunk>>(chunks_of(dataset, info, target, what));
}

void inspect_compact(hid_t dataset, std::int64_t file_bytes, const std::string& what,
                     DatasetInfo& info) {
  require(info.data_bytes <= file_bytes, ExitCode::bad_data,
          "{}: claims {} bytes inside its header", what, info.data_bytes);
  const Hdf5Handle type = own(H5Dget_type(dataset), H5Tclose);
  std::vector<std::byte> data(static_cast<std::size_t>(info.data_bytes));
  ANNULUS_CHECK_HDF5(
      type ? H5Dread(dataset, type.get().value, H5S_ALL, H5S_ALL, H5P_DEFAULT, data.data()) : -1,
      ExitCode::bad_data, "{}: is not readable", what);
  info.content = std::make_shared<const std::vector<std::byte>>(std::move(data));
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

DatasetInfo inspect(std::int64_t dataset, DriverTarget& target, const std::string& what,
                    const std::string& path) {
  keep_asking();
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
  info.data_bytes = checked_bytes(info.shape, info.type.bytes, what);
  switch (layout) {
    case H5D_CONTIGUOUS:
      info.storage = Storage::contiguous;
      inspect_contiguous(dataset, properties, target.existing_bytes, what, info);
      break;
    case H5D_CHUNKED:
      info.storage = Storage::chunked;
      inspect_chunked(dataset, properties, target, what, info);
      break;
    case H5D_COMPACT:
      info.storage = Storage::compact;
      inspect_compact(dataset, target.existing_bytes, what, info);
      break;
    default:
      throw Error(ExitCode::bad_data, what + ": its storage is of an unknown kind");
  }
  require(target.failure.empty(), ExitCode::io, "{}", target.failure);
  require_consistent(info, target.existing_bytes, what);
  return info;
}

}  // namespace annulus
