#pragma once

#include <cstdint>
#include <string>

#include "runtime/hdf5_dataset.hpp"
#include "runtime/hdf5_handle.hpp"

namespace annulus {

/// How a dataset (an hid_t) stores an element. bf16 is a float type of 1-8-7 bits, opaque of two
/// bytes (with the attribute dtype="bfloat16" or without), or uint16 with such an attribute.
/// Throws bad_data, naming the type, when it is none that annulus reads; `what` starts the message.
StoredType stored_type(std::int64_t dataset, const std::string& what);

/// The type to write: IEEE little-endian floats, bf16 as a float of 1-8-7 bits.
Hdf5Handle output_type(DType dtype);

/// A string attribute of an object, or an empty string when there is none or it is no string.
std::string text_attribute(std::int64_t object, const std::string& name);

}  // namespace annulus
