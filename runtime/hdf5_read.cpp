#include <hdf5.h>

#include <algorithm>
#include <array>

#include "kernels/buffer.hpp"
#include "runtime/hdf5_open.hpp"
#include "runtime/posix_file.hpp"

namespace annulus {
namespace {

// Reading 16 KiB that nobody wants costs about as much as one more system call.
constexpr std::int64_t kLargestGap = 16 << 10;

Shape byte_strides(const Shape& shape, std::int64_t element_bytes) {
  Shape strides = contiguous_strides(shape);
  for (int dim = 0; dim < strides.rank(); ++dim) strides[dim] *= element_bytes;
  return strides;
}

// ---- contiguous ---------------------------------------------------------------------------------

class ContiguousReader {
 public:
  ContiguousReader(const OpenDataset& dataset, const TensorView& destination,
                   std::int64_t staging_bytes)
      : dataset_(dataset),
        destination_(destination),
        element_bytes_(dataset.info.type.bytes),
        strides_(byte_strides(dataset.info.shape, element_bytes_)),
        staging_bytes_(std::max(staging_bytes, element_bytes_)) {}

  void read(const Box& box) {
    const TensorView target = subview(destination_, box.local_begin, box.extent);
    if (is_direct(box, target)) {
      read_exactly(dataset_.file, target.data, span_bytes(box, 0), offset(box), dataset_.what);
    } else if (span_bytes(box, 0) <= staging_bytes_ && largest_gap(box) <= kLargestGap) {
      read_staged(box, target);
    } else {
      split(box);
    }
  }

 private:
  std::int64_t offset(const Box& box) const {
    std::int64_t bytes = dataset_.info.file_offset;
    for (int dim = 0; dim < strides_.rank(); ++dim) bytes += box.global_begin[dim] * strides_[dim];
    return bytes;
  }

  // From the first to the last byte of the box's dimensions from `dim` on.
  std::int64_t span_bytes(const Box& box, int dim) const {
    std::int64_t bytes = element_bytes_;
    for (; dim < strides_.rank(); ++dim) bytes += (box.extent[dim] - 1) * strides_[dim];
    return bytes;
  }

  std::int64_t gap(const Box& box, int dim) const {
    return box.extent[dim] > 1 ? strides_[dim] - span_bytes(box, dim + 1) : 0;
  }

  std::int64_t largest_gap(const Box& box) const {
    std::int64_t largest = 0;
    for (int dim = 0; dim < strides_.rank(); ++dim) largest = std::max(largest, gap(box, dim));
    return largest;
  }

  bool is_direct(const Box& box, const TensorView& target) const {
    return target.device == Device::cpu && is_native(dataset_.info.type, target.dtype) &&
           largest_gap(box) == 0 && target.is_contiguous();
  }

  void read_staged(const Box& box, const TensorView& target) {
    const std::int64_t bytes = span_bytes(box, 0);
    if (staging_.bytes() < bytes)
      staging_ = Buffer(Device::cpu, std::min(staging_bytes_, dataset_.info.data_bytes));
    auto* data = static_cast<std::byte*>(staging_.data());
    read_exactly(dataset_.file, data, bytes, offset(box), dataset_.what);
    exchange_bytes(dataset_.info.type, {data, static_cast<std::size_t>(bytes)});
    store_block(dataset_, data, strides_, target);
  }

  // Cuts the outermost dimension that can be cut, into pieces that fit the staging memory when
  // what lies between its rows is worth reading, else into single rows.
  void split(const Box& box) {
    int dim = 0;
    while (box.extent[dim] == 1) ++dim;
    const bool dense = gap(box, dim) <= kLargestGap;
    const std::int64_t step = dense ? std::max<std::int64_t>(1, staging_bytes_ / strides_[dim]) : 1;
    for (std::int64_t begin = 0; begin < box.extent[dim]; begin += step) {
      Box piece = box;
      piece.global_begin[dim] += begin;
      piece.local_begin[dim] += begin;
      piece.extent[dim] = std::min(step, box.extent[dim] - begin);
      read(piece);
    }
  }

  const OpenDataset& dataset_;
  const TensorView& destination_;
  std::int64_t element_bytes_;
  Shape strides_;  // in bytes
  std::int64_t staging_bytes_;
  Buffer staging_;
};

// ---- chunked ------------------------------------------------------------------------------------

class ChunkReader {
 public:
  ChunkReader(const OpenDataset& dataset, const Selection& selection, const TensorView& destination)
      : dataset_(dataset),
        selection_(selection),
        destination_(destination),
        chunk_strides_(byte_strides(dataset.info.chunk, dataset.info.type.bytes)),
        chunk_bytes_(dataset.info.chunk.elements() * dataset.info.type.bytes),
        decodable_(is_decodable(dataset.info.filters)) {}

  void read() {
    for_each_cell(selection_, dataset_.info.chunk, [&](const Shape& cell) {
      Shape begin = cell;
      for (int dim = 0; dim < begin.rank(); ++dim) begin[dim] *= dataset_.info.chunk[dim];
      read_chunk(begin);
    });
  }

 private:
  void read_chunk(const Shape& begin) {
    const std::array<hsize_t, Shape::kMaxRank> offset = offset_of(begin);
    const bool stored = decodable_ ? load_decoded(offset.data()) : load_through_hdf5(begin);
    if (!stored) fill();
    exchange_bytes(dataset_.info.type, buffer_);
    for_each_box_within(selection_, begin, dataset_.info.chunk,
                        [&](const Box& box) { store(begin, box); });
  }

  static std::array<hsize_t, Shape::kMaxRank> offset_of(const Shape& begin) {
    std::array<hsize_t, Shape::kMaxRank> offset{};
    for (int dim = 0; dim < begin.rank(); ++dim) {
      offset[static_cast<std::size_t>(dim)] = static_cast<hsize_t>(begin[dim]);
    }
    return offset;
  }

  // 0: the chunk was never written, which HDF5's quick query reports as an error and its slow one
  // does not.
  hsize_t stored_bytes(const hsize_t* offset) const {
    hsize_t stored = 0;
    if (H5Dget_chunk_storage_size(dataset_.id(), offset, &stored) >= 0) return stored;
    unsigned skipped = 0;
    haddr_t address = HADDR_UNDEF;
    ANNULUS_CHECK_HDF5(
        H5Dget_chunk_info_by_coord(dataset_.id(), offset, &skipped, &address, &stored),
        ExitCode::bad_data, "{}: its chunks are not readable", dataset_.what);
    require(address == HADDR_UNDEF, ExitCode::bad_data, "{}: its chunks are not readable",
            dataset_.what);
    return 0;
  }

  // Fetches the stored bytes and decodes them here, so that no chunk can inflate beyond its size.
  // False: the chunk was never written.
  bool load_decoded(const hsize_t* offset) {
    const hsize_t stored = stored_bytes(offset);
    if (stored == 0) return false;
    require(stored <= static_cast<hsize_t>(dataset_.file_bytes), ExitCode::bad_data,
            "{}: a chunk of {} bytes stored in a file of {}", dataset_.what, stored,
            dataset_.file_bytes);
    require(!dataset_.info.filters.empty() || stored == static_cast<hsize_t>(chunk_bytes_),
            ExitCode::bad_data, "{}: a chunk of {} bytes stored, expected {}", dataset_.what,
            stored, chunk_bytes_);
    buffer_.resize(static_cast<std::size_t>(stored));
    std::uint32_t skipped = 0;
    ANNULUS_CHECK_HDF5(H5Dread_chunk(dataset_.id(), H5P_DEFAULT, offset, &skipped, buffer_.data()),
                       ExitCode::bad_data, "{}: a chunk is not readable", dataset_.what);
    try {
      decode_chunk(dataset_.info.filters, skipped, chunk_bytes_, buffer_, scratch_);
    } catch (const Error& error) {
      throw Error(error.code(), fmt::format("{}: {}", dataset_.what, error.what()));
    }
    return true;
  }

  // szip, nbit and scaleoffset: HDF5 decodes into a buffer of the chunk's size.
  bool load_through_hdf5(const Shape& begin) {
    buffer_.resize(static_cast<std::size_t>(chunk_bytes_));
    const std::array<hsize_t, Shape::kMaxRank> offset = offset_of(begin);
    std::array<hsize_t, Shape::kMaxRank> count{};
    std::array<hsize_t, Shape::kMaxRank> chunk{};
    for (int dim = 0; dim < begin.rank(); ++dim) {
      const auto i = static_cast<std::size_t>(dim);
      chunk[i] = static_cast<hsize_t>(dataset_.info.chunk[dim]);
      count[i] = static_cast<hsize_t>(
          std::min(dataset_.info.chunk[dim], dataset_.info.shape[dim] - begin[dim]));
    }
    const std::array<hsize_t, Shape::kMaxRank> origin{};
    const Hdf5Handle memory = own(H5Screate_simple(begin.rank(), chunk.data(), nullptr), H5Sclose);
    const Hdf5Handle space = own(H5Dget_space(dataset_.id()), H5Sclose);
    const Hdf5Handle type = own(H5Dget_type(dataset_.id()), H5Tclose);
    const bool ready = memory && space && type &&
                       H5Sselect_hyperslab(memory.get().value, H5S_SELECT_SET, origin.data(),
                                           nullptr, count.data(), nullptr) >= 0 &&
                       H5Sselect_hyperslab(space.get().value, H5S_SELECT_SET, offset.data(),
                                           nullptr, count.data(), nullptr) >= 0;
    require(ready, ExitCode::bad_data, "{}: its chunks are not readable: {}", dataset_.what,
            hdf5_reason());
    ANNULUS_CHECK_HDF5(H5Dread(dataset_.id(), type.get().value, memory.get().value,
                               space.get().value, H5P_DEFAULT, buffer_.data()),
                       ExitCode::bad_data, "{}: a chunk is not readable", dataset_.what);
    return true;
  }

  // A chunk that was never written has the dataset's fill value.
  void fill() {
    const auto element_bytes = static_cast<std::size_t>(dataset_.info.type.bytes);
    std::array<std::byte, 8> value{};
    const Hdf5Handle properties = own(H5Dget_create_plist(dataset_.id()), H5Pclose);
    const Hdf5Handle type = own(H5Dget_type(dataset_.id()), H5Tclose);
    H5D_fill_value_t kind = H5D_FILL_VALUE_UNDEFINED;
    require(properties && type && H5Pfill_value_defined(properties.get().value, &kind) >= 0 &&
                (kind == H5D_FILL_VALUE_UNDEFINED ||
                 H5Pget_fill_value(properties.get().value, type.get().value, value.data()) >= 0),
            ExitCode::bad_data, "{}: its fill value is not readable: {}", dataset_.what,
            hdf5_reason());
    buffer_.resize(static_cast<std::size_t>(chunk_bytes_));
    for (std::size_t at = 0; at < buffer_.size(); at += element_bytes) {
      std::copy_n(value.begin(), element_bytes, buffer_.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }

  void store(const Shape& begin, const Box& box) {
    std::int64_t first = 0;
    for (int dim = 0; dim < begin.rank(); ++dim) {
      first += (box.global_begin[dim] - begin[dim]) * chunk_strides_[dim];
    }
    store_block(dataset_, buffer_.data() + first, chunk_strides_,
                subview(destination_, box.local_begin, box.extent));
  }

  const OpenDataset& dataset_;
  const Selection& selection_;
  const TensorView& destination_;
  Shape chunk_strides_;  // in bytes
  std::int64_t chunk_bytes_;
  bool decodable_;
  std::vector<std::byte> buffer_;
  std::vector<std::byte> scratch_;
};

// ---- compact ------------------------------------------------------------------------------------

void read_compact(const OpenDataset& dataset, const Selection& selection,
                  const TensorView& destination) {
  const Hdf5Handle type = own(H5Dget_type(dataset.id()), H5Tclose);
  std::vector<std::byte> all(static_cast<std::size_t>(dataset.info.data_bytes));
  const Shape strides = byte_strides(dataset.info.shape, dataset.info.type.bytes);
  ANNULUS_CHECK_HDF5(
      H5Dread(dataset.id(), type.get().value, H5S_ALL, H5S_ALL, H5P_DEFAULT, all.data()),
      ExitCode::bad_data, "{}: is not readable", dataset.what);
  exchange_bytes(dataset.info.type, all);
  for_each_box(selection, [&](const Box& box) {
    std::int64_t first = 0;
    for (int dim = 0; dim < strides.rank(); ++dim) first += box.global_begin[dim] * strides[dim];
    store_block(dataset, all.data() + first, strides,
                subview(destination, box.local_begin, box.extent));
  });
}

}  // namespace

void read_dataset(const OpenDataset& dataset, const Selection& selection,
                  const TensorView& destination, const ReadOptions& options) {
  selection.validate(dataset.info.shape, dataset.what);
  require(destination.shape == selection.shape(), ExitCode::internal,
          "{}: reading {} into a tensor of {}", dataset.what, selection.shape().to_string(),
          destination.shape.to_string());
  if (selection.shape().elements() == 0) return;
  switch (dataset.info.storage) {
    case Storage::contiguous: {
      ContiguousReader reader(dataset, destination, options.staging_bytes);
      for_each_box(selection, [&](const Box& box) { reader.read(box); });
      break;
    }
    case Storage::chunked:
      ChunkReader(dataset, selection, destination).read();
      break;
    case Storage::compact:
      read_compact(dataset, selection, destination);
      break;
  }
}

}  // namespace annulus
