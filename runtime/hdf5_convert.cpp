#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/buffer.hpp"
#include "runtime/hdf5_reader.hpp"

namespace annulus {
namespace {

template <typename Word, Word (*kSwap)(Word)>
void swap_words(std::span<std::byte> block) {
  for (std::size_t at = 0; at + sizeof(Word) <= block.size(); at += sizeof(Word)) {
    Word word = 0;
    std::memcpy(&word, block.data() + at, sizeof(Word));
    word = kSwap(word);
    std::memcpy(block.data() + at, &word, sizeof(Word));
  }
}

std::uint16_t swap16(std::uint16_t word) { return __builtin_bswap16(word); }
std::uint32_t swap32(std::uint32_t word) { return __builtin_bswap32(word); }
std::uint64_t swap64(std::uint64_t word) { return __builtin_bswap64(word); }

template <typename Stored>
std::int64_t load(const std::byte* data, const std::string& what) {
  Stored value = 0;
  std::memcpy(&value, data, sizeof(Stored));
  if constexpr (std::is_same_v<Stored, std::uint64_t>) {
    require(value <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()),
            ExitCode::bad_data, "{}: the value {} is beyond 63 bits", what, value);
  }
  return static_cast<std::int64_t>(value);
}

std::int64_t load_integer(const StoredType& type, const std::byte* data, const std::string& what) {
  switch (type.bytes) {
    case 1:
      return type.is_signed ? load<std::int8_t>(data, what) : load<std::uint8_t>(data, what);
    case 2:
      return type.is_signed ? load<std::int16_t>(data, what) : load<std::uint16_t>(data, what);
    case 4:
      return type.is_signed ? load<std::int32_t>(data, what) : load<std::uint32_t>(data, what);
    default:
      return type.is_signed ? load<std::int64_t>(data, what) : load<std::uint64_t>(data, what);
  }
}

template <typename Wanted>
void store(std::int64_t value, void* destination, const std::string& what) {
  require(value >= static_cast<std::int64_t>(std::numeric_limits<Wanted>::min()) &&
              value <= static_cast<std::int64_t>(std::numeric_limits<Wanted>::max()),
          ExitCode::bad_data, "{}: the value {} does not fit {} bits", what, value,
          8 * sizeof(Wanted));
  *static_cast<Wanted*>(destination) = static_cast<Wanted>(value);
}

void store_integer(std::int64_t value, const TensorView& element, const std::string& what) {
  switch (element.dtype) {
    case DType::u8:
      return store<std::uint8_t>(value, element.data, what);
    case DType::i32:
      return store<std::int32_t>(value, element.data, what);
    default:
      return store<std::int64_t>(value, element.data, what);
  }
}

void store_integers(const OpenDataset& dataset, const std::byte* data, const Shape& strides,
                    const TensorView& destination, int dim) {
  if (dim == destination.rank()) {
    const std::int64_t value = load_integer(dataset.info.type, data, dataset.what);
    return store_integer(value, destination, dataset.what);
  }
  for (std::int64_t i = 0; i < destination.shape[dim]; ++i) {
    store_integers(dataset, data + i * strides[dim], strides, destination.slice(dim, {i, i + 1}),
                   dim + 1);
  }
}

}  // namespace

bool is_native(const StoredType& type, DType dtype) {
  switch (type.kind) {
    case StoredType::Kind::floating:
      return type.dtype == dtype && !type.big_endian;
    case StoredType::Kind::boolean:
      return dtype == DType::u8;
    case StoredType::Kind::integer:
      break;
  }
  if (type.bytes == 1) return dtype == DType::u8 && !type.is_signed;
  const bool same =
      (type.bytes == 4 && dtype == DType::i32) || (type.bytes == 8 && dtype == DType::i64);
  return same && type.is_signed && !type.big_endian;
}

void exchange_bytes(const StoredType& type, std::span<std::byte> block) {
  if (!type.big_endian) return;
  switch (type.bytes) {
    case 2:
      return swap_words<std::uint16_t, swap16>(block);
    case 4:
      return swap_words<std::uint32_t, swap32>(block);
    case 8:
      return swap_words<std::uint64_t, swap64>(block);
    default:
      return;
  }
}

void store_block(const OpenDataset& dataset, const std::byte* data, const Shape& strides,
                 const TensorView& destination) {
  const StoredType& type = dataset.info.type;
  StoredType native = type;
  native.big_endian = false;
  const bool floating = type.kind == StoredType::Kind::floating;
  require(floating == is_floating(destination.dtype), ExitCode::bad_data,
          "{}: stores {}, expected {}", dataset.what, type.to_string(), name(destination.dtype));
  if (!floating && !is_native(native, destination.dtype)) {
    require(destination.device == Device::cpu, ExitCode::internal,
            "{}: integers are converted in host memory only", dataset.what);
    return store_integers(dataset, data, strides, destination, 0);
  }
  Shape elements = strides;
  for (int dim = 0; dim < elements.rank(); ++dim) elements[dim] /= type.bytes;
  const DType stored = floating ? type.dtype : destination.dtype;
  copy(ConstTensorView(data, stored, destination.shape, elements), destination);
}

}  // namespace annulus
