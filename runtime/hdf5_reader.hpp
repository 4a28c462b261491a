#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "runtime/hdf5_file.hpp"

namespace annulus {

/// A dataset to be read from a descriptor.
struct OpenDataset {
  int file = -1;
  std::string what;  // "input.h5: query", the start of every message
  const DatasetInfo& info;
};

/// Plain reads into any destination, by the dataset's storage.
void read_dataset(const OpenDataset& dataset, const Selection& selection,
                  const TensorView& destination, const ReadOptions& options);

/// Throws bad_data or internal unless the selection lies in the dataset and fills `destination`.
void require_selection(const OpenDataset& dataset, const Selection& selection,
                       const TensorView& destination);

/// Strides in bytes of row-major elements.
Shape byte_strides(const Shape& shape, std::int64_t element_bytes);

/// Takes the chunks of a dataset that a selection touches, one by one, into a destination.
class ChunkDecoder {
 public:
  struct Wanted {
    Shape begin;                // its first element
    const StoredChunk* stored;  // null: it was never written
  };

  ChunkDecoder(const OpenDataset& dataset, const Selection& selection,
               const TensorView& destination);

  /// In row-major order.
  std::vector<Wanted> wanted() const;
  /// Where the whole chunk lies in the destination as it lies in the file, but for a checksum
  /// behind it; null where it does not.
  std::byte* as_stored(const Wanted& chunk) const;
  /// Room for the stored bytes of `chunk`.
  std::span<std::byte> room(const StoredChunk& chunk);
  /// Decodes what room() was filled with, or takes the fill value, and puts it in place.
  void place(const Wanted& chunk);

 private:
  void decode(const StoredChunk& chunk);
  void fill();

  const OpenDataset& dataset_;
  const Selection& selection_;
  const TensorView& destination_;
  Shape chunk_strides_;  // in bytes
  std::int64_t chunk_bytes_;
  std::vector<std::byte> buffer_;
  std::vector<std::byte> scratch_;
};

/// The data of a compact dataset.
void read_compact(const OpenDataset& dataset, const Selection& selection,
                  const TensorView& destination);

/// Turns raw big-endian elements of the dataset into the machine's; once for a block.
void exchange_bytes(const StoredType& type, std::span<std::byte> block);

/// Converts a block of raw elements in the machine's byte order, with byte strides `strides` from
/// `data`, into `destination`. Throws bad_data naming an integer that does not fit.
void store_block(const OpenDataset& dataset, const std::byte* data, const Shape& strides,
                 const TensorView& destination);

/// True when the stored bytes are those of `dtype` on this machine.
bool is_native(const StoredType& type, DType dtype);

}  // namespace annulus
