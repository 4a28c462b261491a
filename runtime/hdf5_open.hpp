#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "runtime/hdf5_file.hpp"
#include "runtime/hdf5_handle.hpp"

namespace annulus {

/// A dataset opened for reading, with what its readers share. `file` is the descriptor HDF5 reads
/// through, so that both see the same file whatever happens to its name.
struct OpenDataset {
  Hdf5Handle handle;
  int file = -1;
  std::int64_t file_bytes = 0;
  std::string what;  // "input.h5: query", the start of every message
  DatasetInfo info;

  std::int64_t id() const { return handle.get().value; }
};

/// Opens an object without leaving the file: no external link is followed. Throws missing_input
/// when a component of the path does not exist.
Hdf5Handle open_object(std::int64_t file, const std::string& file_path, const std::string& object);

/// Reads shape, type and storage of an opened dataset, and refuses what could read other files,
/// load code or claim more than the file can hold.
DatasetInfo inspect(std::int64_t dataset, std::int64_t file_bytes, const std::string& what,
                    const std::string& path);

/// Plain reads into any destination, by the dataset's storage.
void read_dataset(const OpenDataset& dataset, const Selection& selection,
                  const TensorView& destination, const ReadOptions& options);

/// Turns raw big-endian elements of the dataset into the machine's; once for a block.
void exchange_bytes(const StoredType& type, std::span<std::byte> block);

/// Converts a block of raw elements in the machine's byte order, with byte strides `strides` from
/// `data`, into `destination`. Throws bad_data naming an integer that does not fit.
void store_block(const OpenDataset& dataset, const std::byte* data, const Shape& strides,
                 const TensorView& destination);

/// True when the stored bytes are those of `dtype` on this machine.
bool is_native(const StoredType& type, DType dtype);

}  // namespace annulus
