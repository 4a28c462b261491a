#include "runtime/hdf5_reader.hpp"

#include <algorithm>
#include <array>
#include <functional>

#include "kernels/buffer.hpp"
#include "kernels/error.hpp"
#include "runtime/posix_file.hpp"

namespace annulus {
namespace {

// Reading 16 KiB that nobody wants costs about as much as one more system call.
constexpr std::int64_t kLargestGap = 16 << 10;

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

void explain(const OpenDataset& dataset, const std::function<void()>& step) {
  try {
    step();
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("{}: {}", dataset.what, error.what()));
  }
}

// Past the buffer of the decoder: a copy less, and each piece is summed while it is in the cache.
void read_as_stored(const OpenDataset& dataset, const StoredChunk& chunk, std::byte* data) {
  constexpr std::int64_t kPiece = std::int64_t{128} << 10;
  const std::int64_t bytes = dataset.info.chunk.elements() * dataset.info.type.bytes;
  const bool summed = chunk.bytes > bytes;
  Fletcher32 sum;
  for (std::int64_t at = 0; at < bytes; at += kPiece) {
    const std::int64_t count = std::min(kPiece, bytes - at);
    read_exactly(dataset.file, data + at, count, chunk.offset + at, dataset.what);
    if (summed) sum.add({data + at, static_cast<std::size_t>(count)});
  }
  if (!summed) return;
  std::array<std::byte, kFletcherBytes> tail{};
  read_exactly(dataset.file, tail.data(), kFletcherBytes, chunk.offset + bytes, dataset.what);
  explain(dataset, [&] { require_fletcher32(sum.value(), tail); });
}

void read_chunked(const OpenDataset& dataset, const Selection& selection,
                  const TensorView& destination) {
  ChunkDecoder decoder(dataset, selection, destination);
  for (const ChunkDecoder::Wanted& chunk : decoder.wanted()) {
    if (std::byte* data = decoder.as_stored(chunk); data != nullptr) {
      read_as_stored(dataset, *chunk.stored, data);
      continue;
    }
    if (chunk.stored != nullptr) {
      const std::span<std::byte> room = decoder.room(*chunk.stored);
      read_exactly(dataset.file, room.data(), chunk.stored->bytes, chunk.stored->offset,
                   dataset.what);
    }
    decoder.place(chunk);
  }
}

}  // namespace

Shape byte_strides(const Shape& shape, std::int64_t element_bytes) {
  Shape strides = contiguous_strides(shape);
  for (int dim = 0; dim < strides.rank(); ++dim) strides[dim] *= element_bytes;
  return strides;
}

// ---- chunked ------------------------------------------------------------------------------------

ChunkDecoder::ChunkDecoder(const OpenDataset& dataset, const Selection& selection,
                           const TensorView& destination)
    : dataset_(dataset),
      selection_(selection),
      destination_(destination),
      chunk_strides_(byte_strides(dataset.info.chunk, dataset.info.type.bytes)),
      chunk_bytes_(dataset.info.chunk.elements() * dataset.info.type.bytes) {}

std::vector<ChunkDecoder::Wanted> ChunkDecoder::wanted() const {
  const Shape grid_strides = contiguous_strides(chunk_grid(dataset_.info));
  const std::vector<StoredChunk>& stored = *dataset_.info.chunks;
  std::vector<Wanted> result;
  for_each_cell(selection_, dataset_.info.chunk, [&](const Shape& place) {
    Wanted wanted{place, nullptr};
    std::int64_t cell = 0;
    for (int dim = 0; dim < place.rank(); ++dim) {
      wanted.begin[dim] *= dataset_.info.chunk[dim];
      cell += place[dim] * grid_strides[dim];
    }
    const auto found = std::lower_bound(
        stored.begin(), stored.end(), cell,
        [](const StoredChunk& chunk, std::int64_t number) { return chunk.cell < number; });
    if (found != stored.end() && found->cell == cell) wanted.stored = &*found;
    result.push_back(wanted);
  });
  return result;
}

std::byte* ChunkDecoder::as_stored(const Wanted& chunk) const {
  const DatasetInfo& info = dataset_.info;
  const bool plain = info.filters.empty();
  const bool summed = info.filters.size() == 1 && info.filters[0].id == ChunkFilter::kFletcher32;
  if (chunk.stored == nullptr || chunk.stored->skipped != 0 || (!plain && !summed) ||
      chunk.stored->bytes !=
          chunk_bytes_ + (summed ? static_cast<std::int64_t>(kFletcherBytes) : 0) ||
      destination_.device != Device::cpu || !is_native(info.type, destination_.dtype)) {
    return nullptr;
  }
  std::byte* data = nullptr;
  for_each_box_within(selection_, chunk.begin, info.chunk, [&](const Box& box) {
    const TensorView target = subview(destination_, box.local_begin, box.extent);
    const bool whole = box.extent == info.chunk && target.is_contiguous();
    if (whole) data = static_cast<std::byte*>(target.data);
  });
  return data;
}

std::span<std::byte> ChunkDecoder::room(const StoredChunk& chunk) {
  buffer_.resize(static_cast<std::size_t>(chunk.bytes));
  return buffer_;
}

void ChunkDecoder::place(const Wanted& chunk) {
  if (chunk.stored != nullptr) {
    decode(*chunk.stored);
  } else {
    fill();
  }
  exchange_bytes(dataset_.info.type, buffer_);
  for_each_box_within(selection_, chunk.begin, dataset_.info.chunk, [&](const Box& box) {
    std::int64_t first = 0;
    for (int dim = 0; dim < chunk.begin.rank(); ++dim) {
      first += (box.global_begin[dim] - chunk.begin[dim]) * chunk_strides_[dim];
    }
    store_block(dataset_, buffer_.data() + first, chunk_strides_,
                subview(destination_, box.local_begin, box.extent));
  });
}

// Decoded here, so that no chunk can inflate beyond its size.
void ChunkDecoder::decode(const StoredChunk& chunk) {
  explain(dataset_, [&] {
    decode_chunk(dataset_.info.filters, chunk.skipped, chunk_bytes_, buffer_, scratch_);
  });
}

void ChunkDecoder::fill() {
  const auto element_bytes = static_cast<std::size_t>(dataset_.info.type.bytes);
  buffer_.resize(static_cast<std::size_t>(chunk_bytes_));
  for (std::size_t at = 0; at < buffer_.size(); at += element_bytes) {
    std::copy_n(dataset_.info.fill.begin(), element_bytes,
                buffer_.begin() + static_cast<std::ptrdiff_t>(at));
  }
}

// ---- any ----------------------------------------------------------------------------------------

void read_compact(const OpenDataset& dataset, const Selection& selection,
                  const TensorView& destination) {
  std::vector<std::byte> all = *dataset.info.content;
  const Shape strides = byte_strides(dataset.info.shape, dataset.info.type.bytes);
  exchange_bytes(dataset.info.type, all);
  for_each_box(selection, [&](const Box& box) {
    std::int64_t first = 0;
    for (int dim = 0; dim < strides.rank(); ++dim) first += box.global_begin[dim] * strides[dim];
    store_block(dataset, all.data() + first, strides,
                subview(destination, box.local_begin, box.extent));
  });
}

void require_selection(const OpenDataset& dataset, const Selection& selection,
                       const TensorView& destination) {
  selection.validate(dataset.info.shape, dataset.what);
  require(destination.shape == selection.shape(), ExitCode::internal,
          "{}: reading {} into a tensor of {}", dataset.what, selection.shape().to_string(),
          destination.shape.to_string());
}

void read_dataset(const OpenDataset& dataset, const Selection& selection,
                  const TensorView& destination, const ReadOptions& options) {
  require_selection(dataset, selection, destination);
  if (selection.shape().elements() == 0) return;
  switch (dataset.info.storage) {
    case Storage::contiguous: {
      ContiguousReader reader(dataset, destination, options.staging_bytes);
      for_each_box(selection, [&](const Box& box) { reader.read(box); });
      break;
    }
    case Storage::chunked:
      read_chunked(dataset, selection, destination);
      break;
    case Storage::compact:
      read_compact(dataset, selection, destination);
      break;
  }
}

}  // namespace annulus
