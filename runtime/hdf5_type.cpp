#include "runtime/hdf5_type.hpp"

#include <hdf5.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <vector>

namespace annulus {
namespace {

constexpr std::size_t kLongestText = 65536;

// Bits of a float type: sign position, exponent and mantissa, exponent bias.
struct FloatFormat {
  std::size_t sign = 0;
  std::size_t exponent = 0;
  std::size_t exponent_bits = 0;
  std::size_t mantissa = 0;
  std::size_t mantissa_bits = 0;
  std::size_t bias = 0;
  std::size_t bytes = 0;
  friend bool operator==(const FloatFormat&, const FloatFormat&) = default;
};

struct KnownFloat {
  DType dtype;
  FloatFormat format;
};

constexpr std::array<KnownFloat, 4> kKnownFloats = {{
    {DType::f32, {31, 23, 8, 0, 23, 127, 4}},
    {DType::f16, {15, 10, 5, 0, 10, 15, 2}},
    {DType::bf16, {15, 7, 8, 0, 7, 127, 2}},
    {DType::f64, {63, 52, 11, 0, 52, 1023, 8}},
}};

std::string class_name(H5T_class_t type_class) {
  switch (type_class) {
    case H5T_STRING:
      return "strings";
    case H5T_COMPOUND:
      return "compound elements";
    case H5T_REFERENCE:
      return "references";
    case H5T_ENUM:
      return "an enumeration";
    case H5T_VLEN:
      return "elements of variable length";
    case H5T_ARRAY:
      return "arrays";
    case H5T_TIME:
      return "times";
    case H5T_OPAQUE:
      return "opaque elements";
    default:
      return "elements of an unknown class";
  }
}

[[noreturn]] void refuse(const std::string& what, const std::string& found) {
  throw Error(ExitCode::bad_data,
              fmt::format("{}: stores {}, expected f32, f16, bf16, f64, an integer or a boolean",
                          what, found));
}

bool is_big_endian(hid_t type, const std::string& what) {
  const H5T_order_t order = H5Tget_order(type);
  if (order != H5T_ORDER_LE && order != H5T_ORDER_BE && order != H5T_ORDER_NONE) {
    refuse(what, "elements of a mixed or VAX byte order");
  }
  return order == H5T_ORDER_BE;
}

StoredType float_type(hid_t type, const std::string& what) {
  FloatFormat found;
  ANNULUS_CHECK_HDF5(H5Tget_fields(type, &found.sign, &found.exponent, &found.exponent_bits,
                                   &found.mantissa, &found.mantissa_bits),
                     ExitCode::bad_data, "{}: its float type is not readable", what);
  found.bias = H5Tget_ebias(type);
  found.bytes = H5Tget_size(type);
  const auto known = std::find_if(kKnownFloats.begin(), kKnownFloats.end(),
                                  [&](const KnownFloat& k) { return k.format == found; });
  if (known == kKnownFloats.end() || H5Tget_norm(type) != H5T_NORM_IMPLIED) {
    refuse(what, fmt::format("floats of {} bytes with {} exponent and {} mantissa bits",
                             found.bytes, found.exponent_bits, found.mantissa_bits));
  }
  return {StoredType::Kind::floating, known->dtype, static_cast<int>(found.bytes), true,
          is_big_endian(type, what)};
}

bool names_bfloat16(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text == "bfloat16" || text == "bf16" || text == "torch.bfloat16";
}

struct AttributeSearch {
  bool found = false;
};

herr_t note_bfloat16(hid_t object, const char* attribute, const H5A_info_t* /*info*/, void* data) {
  auto& search = *static_cast<AttributeSearch*>(data);
  search.found = search.found || names_bfloat16(text_attribute(object, attribute));
  return search.found ? 1 : 0;
}

bool has_bfloat16_attribute(hid_t dataset, const std::string& what) {
  AttributeSearch search;
  hsize_t index = 0;
  ANNULUS_CHECK_HDF5(
      H5Aiterate2(dataset, H5_INDEX_NAME, H5_ITER_NATIVE, &index, note_bfloat16, &search),
      ExitCode::bad_data, "{}: its attributes are not readable", what);
  return search.found;
}

StoredType integer_type(hid_t type, hid_t dataset, const std::string& what) {
  const auto bytes = static_cast<int>(H5Tget_size(type));
  const H5T_sign_t sign = H5Tget_sign(type);
  const bool standard = (bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8) &&
                        H5Tget_precision(type) == static_cast<std::size_t>(bytes) * 8 &&
                        (sign == H5T_SGN_NONE || sign == H5T_SGN_2);
  if (!standard) refuse(what, fmt::format("integers of {} bytes in an unusual form", bytes));
  const bool big_endian = is_big_endian(type, what);
  if (bytes == 2 && sign == H5T_SGN_NONE && has_bfloat16_attribute(dataset, what)) {
    return {StoredType::Kind::floating, DType::bf16, 2, true, big_endian};
  }
  return {StoredType::Kind::integer, DType::i64, bytes, sign == H5T_SGN_2, big_endian};
}

StoredType opaque_type(hid_t type, hid_t dataset, const std::string& what) {
  const std::size_t bytes = H5Tget_size(type);
  const std::string named = text_attribute(dataset, "dtype");
  if (bytes != 2) refuse(what, fmt::format("opaque elements of {} bytes", bytes));
  if (!named.empty() && !names_bfloat16(named)) {
    refuse(what, fmt::format("opaque elements of dtype \"{}\"", printable(named)));
  }
  return {StoredType::Kind::floating, DType::bf16, 2, true, false};
}

bool is_boolean_enum(hid_t type) {
  const Hdf5Handle base = own(H5Tget_super(type), H5Tclose);
  if (!base || H5Tget_size(type) != 1 || H5Tget_nmembers(type) != 2) return false;
  std::array<signed char, 2> values{};
  return H5Tget_class(base.get().value) == H5T_INTEGER &&
         H5Tget_member_value(type, 0, values.data()) >= 0 &&
         H5Tget_member_value(type, 1, &values[1]) >= 0 && std::min(values[0], values[1]) == 0 &&
         std::max(values[0], values[1]) == 1;
}

std::string read_text(hid_t attribute, hid_t type, std::size_t bytes) {
  std::vector<char> text(bytes + 1, '\0');
  if (H5Aread(attribute, type, text.data()) < 0) return {};
  return text.data();
}

std::string read_variable_text(hid_t attribute, hid_t type, hid_t space) {
  char* text = nullptr;
  if (H5Aread(attribute, type, &text) < 0 || text == nullptr) return {};
  std::string result = text;
  if (H5Dvlen_reclaim(type, space, H5P_DEFAULT, &text) < 0) return {};
  return result;
}

}  // namespace

std::string StoredType::to_string() const {
  const std::string order = big_endian ? "big-endian " : "";
  switch (kind) {
    case Kind::floating:
      return order + std::string(name(dtype));
    case Kind::integer:
      return fmt::format("{}{}{}", order, is_signed ? "i" : "u", bytes * 8);
    case Kind::boolean:
      return "bool";
  }
  return {};
}

StoredType stored_type(std::int64_t dataset, const std::string& what) {
  const Hdf5Handle owner = own(ANNULUS_CHECK_HDF5(H5Dget_type(dataset), ExitCode::bad_data,
                                                  "{}: its type is not readable", what),
                               H5Tclose);
  const hid_t type = owner.get().value;
  const H5T_class_t type_class = H5Tget_class(type);
  switch (type_class) {
    case H5T_FLOAT:
      return float_type(type, what);
    case H5T_INTEGER:
      return integer_type(type, dataset, what);
    case H5T_OPAQUE:
      return opaque_type(type, dataset, what);
    case H5T_BITFIELD:
      if (H5Tget_size(type) == 1) return {StoredType::Kind::boolean, DType::u8, 1, false, false};
      break;
    case H5T_ENUM:
      if (is_boolean_enum(type)) return {StoredType::Kind::boolean, DType::u8, 1, false, false};
      break;
    default:
      break;
  }
  refuse(what, class_name(type_class));
}

Hdf5Handle output_type(DType dtype) {
  const auto copy_of = [](hid_t type) {
    return own(ANNULUS_CHECK_HDF5(H5Tcopy(type), ExitCode::internal, "output: no type"), H5Tclose);
  };
  switch (dtype) {
    case DType::f32:
      return copy_of(H5T_IEEE_F32LE);
    case DType::f64:
      return copy_of(H5T_IEEE_F64LE);
    case DType::u8:
      return copy_of(H5T_STD_U8LE);
    case DType::i32:
      return copy_of(H5T_STD_I32LE);
    case DType::i64:
      return copy_of(H5T_STD_I64LE);
    default:
      break;
  }
  // The fields must fit the type at every step: first the fields of a wider type, then its size.
  Hdf5Handle type = copy_of(H5T_IEEE_F32LE);
  const hid_t id = type.get().value;
  const bool half = dtype == DType::f16;
  const bool made = H5Tset_fields(id, 15, half ? 10 : 7, half ? 5 : 8, 0, half ? 10 : 7) >= 0 &&
                    H5Tset_precision(id, 16) >= 0 && H5Tset_size(id, 2) >= 0 &&
                    H5Tset_ebias(id, half ? 15 : 127) >= 0;
  require(made, ExitCode::internal, "output: HDF5 refused the {} type: {}", name(dtype),
          hdf5_reason());
  return type;
}

std::string text_attribute(std::int64_t object, const std::string& name) {
  if (H5Aexists(object, name.c_str()) <= 0) return {};
  const Hdf5Handle attribute = own(H5Aopen(object, name.c_str(), H5P_DEFAULT), H5Aclose);
  if (!attribute) return {};
  const hid_t id = attribute.get().value;
  const Hdf5Handle type = own(H5Aget_type(id), H5Tclose);
  const Hdf5Handle space = own(H5Aget_space(id), H5Sclose);
  if (!type || !space || H5Tget_class(type.get().value) != H5T_STRING ||
      H5Sget_simple_extent_npoints(space.get().value) != 1) {
    return {};
  }
  if (H5Tis_variable_str(type.get().value) > 0) {
    return read_variable_text(id, type.get().value, space.get().value);
  }
  const std::size_t bytes = H5Tget_size(type.get().value);
  return bytes > kLongestText ? std::string() : read_text(id, type.get().value, bytes);
}

}  // namespace annulus
