#include "runtime/hdf5_sample.hpp"

#include <hdf5.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "kernels/scalar.hpp"

namespace annulus::test {
namespace {

std::int64_t check(std::int64_t status, const char* what) {
  if (status < 0) throw std::runtime_error(std::string("sample file: ") + what);
  return status;
}

hid_t integer_type(Form form) {
  switch (form) {
    case Form::i8:
      return H5T_STD_I8LE;
    case Form::u8:
      return H5T_STD_U8LE;
    case Form::i16:
      return H5T_STD_I16LE;
    case Form::u16:
    case Form::bf16_uint16:
      return H5T_STD_U16LE;
    case Form::i32:
      return H5T_STD_I32LE;
    case Form::u32:
      return H5T_STD_U32LE;
    case Form::i64:
      return H5T_STD_I64LE;
    default:
      return H5T_STD_U64LE;
  }
}

hid_t half_type(std::size_t exponent_bits, std::size_t bias) {
  const hid_t type = H5Tcopy(H5T_IEEE_F32LE);
  const std::size_t mantissa = 15 - exponent_bits;
  check(H5Tset_fields(type, 15, mantissa, exponent_bits, 0, mantissa), "fields");
  check(H5Tset_precision(type, 16), "precision");
  check(H5Tset_size(type, 2), "size");
  check(H5Tset_ebias(type, bias), "bias");
  return type;
}

hid_t boolean_type() {
  const hid_t type = H5Tenum_create(H5T_STD_I8LE);
  signed char value = 0;
  check(H5Tenum_insert(type, "FALSE", &value), "enum");
  value = 1;
  check(H5Tenum_insert(type, "TRUE", &value), "enum");
  return type;
}

hid_t stored_type(const SampleDataset& dataset) {
  hid_t type = -1;
  switch (dataset.form) {
    case Form::f32:
      type = H5Tcopy(H5T_IEEE_F32LE);
      break;
    case Form::f64:
      type = H5Tcopy(H5T_IEEE_F64LE);
      break;
    case Form::f16:
      type = half_type(5, 15);
      break;
    case Form::bf16_float:
      type = half_type(8, 127);
      break;
    case Form::bf16_opaque_named:
    case Form::bf16_opaque:
      return H5Tcreate(H5T_OPAQUE, 2);
    case Form::boolean:
      return boolean_type();
    default:
      type = H5Tcopy(integer_type(dataset.form));
  }
  if (dataset.big_endian) check(H5Tset_order(type, H5T_ORDER_BE), "order");
  return type;
}

template <typename Value>
void append(std::vector<char>& raw, Value value, bool big_endian) {
  char bytes[sizeof(Value)];
  std::memcpy(bytes, &value, sizeof(Value));
  if (big_endian) std::reverse(bytes, bytes + sizeof(Value));
  raw.insert(raw.end(), bytes, bytes + sizeof(Value));
}

void encode(std::vector<char>& raw, const SampleDataset& dataset, double value) {
  const bool swap = dataset.big_endian;
  switch (dataset.form) {
    case Form::f32:
      return append(raw, static_cast<float>(value), swap);
    case Form::f64:
      return append(raw, value, swap);
    case Form::f16:
      return append(raw, float_to_f16(static_cast<float>(value)), swap);
    case Form::bf16_float:
    case Form::bf16_opaque_named:
    case Form::bf16_opaque:
    case Form::bf16_uint16:
      return append(raw, float_to_bf16(static_cast<float>(value)), swap);
    case Form::i8:
    case Form::boolean:
      return append(raw, static_cast<std::int8_t>(value), swap);
    case Form::u8:
      return append(raw, static_cast<std::uint8_t>(value), swap);
    case Form::i16:
      return append(raw, static_cast<std::int16_t>(value), swap);
    case Form::u16:
      return append(raw, static_cast<std::uint16_t>(value), swap);
    case Form::i32:
      return append(raw, static_cast<std::int32_t>(value), swap);
    case Form::u32:
      return append(raw, static_cast<std::uint32_t>(value), swap);
    case Form::i64:
      return append(raw, static_cast<std::int64_t>(value), swap);
    case Form::u64:
      return append(raw, static_cast<std::uint64_t>(value), swap);
  }
}

void set_storage(hid_t properties, const SampleDataset& dataset, hid_t type) {
  const Pack pack = dataset.pack;
  if (pack == Pack::compact) check(H5Pset_layout(properties, H5D_COMPACT), "compact");
  if (pack == Pack::compact || pack == Pack::contiguous) return;
  std::vector<hsize_t> chunk(dataset.chunk.begin(), dataset.chunk.end());
  check(H5Pset_chunk(properties, static_cast<int>(chunk.size()), chunk.data()), "chunk");
  if (pack == Pack::gzip_fletcher_first) check(H5Pset_fletcher32(properties), "fletcher32");
  if (pack == Pack::shuffle_gzip || pack == Pack::shuffle_gzip_fletcher) {
    check(H5Pset_shuffle(properties), "shuffle");
  }
  if (pack == Pack::gzip || pack == Pack::shuffle_gzip || pack == Pack::shuffle_gzip_fletcher ||
      pack == Pack::gzip_fletcher_first) {
    check(H5Pset_deflate(properties, 4), "deflate");
  }
  if (pack == Pack::fletcher || pack == Pack::shuffle_gzip_fletcher) {
    check(H5Pset_fletcher32(properties), "fletcher32");
  }
  if (pack == Pack::szip) check(H5Pset_szip(properties, H5_SZIP_NN_OPTION_MASK, 8), "szip");
  if (pack == Pack::nbit) check(H5Pset_nbit(properties), "nbit");
  if (pack == Pack::scale_offset) {  // three decimal digits hold eighths
    const bool whole = dataset.form >= Form::i8;
    check(H5Pset_scaleoffset(properties, whole ? H5Z_SO_INT : H5Z_SO_FLOAT_DSCALE, whole ? 0 : 3),
          "scaleoffset");
  }
  if (pack == Pack::missing_chunks) {
    std::vector<char> fill;
    encode(fill, dataset, 1.5);
    check(H5Pset_fill_value(properties, type, fill.data()), "fill value");
  }
}

void name_bfloat16(hid_t dataset) {
  const hid_t type = H5Tcopy(H5T_C_S1);
  check(H5Tset_size(type, 9), "string");
  const hid_t space = H5Screate(H5S_SCALAR);
  const hid_t attribute = H5Acreate2(dataset, "dtype", type, space, H5P_DEFAULT, H5P_DEFAULT);
  check(H5Awrite(attribute, type, "bfloat16"), "attribute");
  H5Aclose(attribute);
  H5Sclose(space);
  H5Tclose(type);
}

}  // namespace

ScratchFolder::ScratchFolder() {
  std::string name = std::filesystem::temp_directory_path() / "annulus_test_XXXXXX";
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no scratch folder");
  folder_ = name;
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

std::vector<std::string> ScratchFolder::names() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
    names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

const char* name(Form form) {
  constexpr const char* kNames[] = {
      "f32",         "f64",         "f16", "bf16_float", "bf16_opaque_named",
      "bf16_opaque", "bf16_uint16", "i8",  "u8",         "i16",
      "u16",         "i32",         "u32", "i64",        "u64",
      "boolean"};
  return kNames[static_cast<std::size_t>(form)];
}

const char* name(Pack pack) {
  constexpr const char* kNames[] = {"contiguous",
                                    "compact",
                                    "chunked",
                                    "gzip",
                                    "shuffle_gzip",
                                    "fletcher",
                                    "shuffle_gzip_fletcher",
                                    "gzip_fletcher_first",
                                    "szip",
                                    "nbit",
                                    "scale_offset",
                                    "missing_chunks"};
  return kNames[static_cast<std::size_t>(pack)];
}

bool is_float(Form form) { return form <= Form::bf16_uint16; }

bool is_available(Pack pack) {
  if (pack != Pack::szip) return true;
  unsigned config = 0;
  return H5Zfilter_avail(H5Z_FILTER_SZIP) > 0 &&
         H5Zget_filter_info(H5Z_FILTER_SZIP, &config) >= 0 &&
         (config & H5Z_FILTER_CONFIG_ENCODE_ENABLED) != 0;
}

void write_sample(const std::string& file, const SampleDataset& dataset, bool append_to) {
  const hid_t id = append_to ? H5Fopen(file.c_str(), H5F_ACC_RDWR, H5P_DEFAULT)
                             : H5Fcreate(file.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  check(id, "file");
  std::vector<hsize_t> dims(dataset.dims.begin(), dataset.dims.end());
  const auto rank = static_cast<int>(dims.size());
  const hid_t space = check(H5Screate_simple(rank, dims.data(), nullptr), "space");
  const hid_t type = check(stored_type(dataset), "type");
  const hid_t storage = H5Pcreate(H5P_DATASET_CREATE);
  set_storage(storage, dataset, type);
  const hid_t links = H5Pcreate(H5P_LINK_CREATE);
  check(H5Pset_create_intermediate_group(links, 1), "groups");
  const hid_t made = check(
      H5Dcreate2(id, dataset.path.c_str(), type, space, links, storage, H5P_DEFAULT), "dataset");
  if (dataset.form == Form::bf16_opaque_named || dataset.form == Form::bf16_uint16) {
    name_bfloat16(made);
  }
  if (dataset.pack == Pack::missing_chunks) dims[0] /= 2;
  std::int64_t elements = 1;
  for (const hsize_t extent : dims) elements *= static_cast<std::int64_t>(extent);
  std::vector<char> raw;
  for (std::int64_t i = 0; i < elements; ++i) encode(raw, dataset, dataset.value(i));
  const hid_t memory = check(H5Screate_simple(rank, dims.data(), nullptr), "space");
  const std::vector<hsize_t> origin(dims.size(), 0);
  check(H5Sselect_hyperslab(space, H5S_SELECT_SET, origin.data(), nullptr, dims.data(), nullptr),
        "selection");
  if (elements > 0) check(H5Dwrite(made, type, memory, space, H5P_DEFAULT, raw.data()), "write");
  for (const hid_t closed : {memory, space}) H5Sclose(closed);
  for (const hid_t closed : {storage, links}) H5Pclose(closed);
  H5Tclose(type);
  check(H5Dclose(made), "close");
  check(H5Fclose(id), "close");
}

double exact_value(std::int64_t i) {
  return static_cast<double>((i * 2654435761LL >> 7) % 255 - 127) / 8.0;
}

std::vector<char> file_bytes(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

void write_bytes(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream stream(path, std::ios::binary | std::ios::trunc);
  stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

}  // namespace annulus::test
