#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/hdf5_dataset.hpp"

namespace annulus {

/// What was asked of a file, or the Error that came instead.
template <typename Value>
using Hdf5Answer = std::variant<Value, Error>;

/// The value; throws the Error.
template <typename Value>
const Value& value_of(const Hdf5Answer<Value>& answer) {
  if (const auto* error = std::get_if<Error>(&answer)) throw *error;
  return std::get<Value>(answer);
}

/// Answers about an HDF5 file, found by a process that may be harmed by it and used by those that
/// must not be.
struct Hdf5Table {
  using AttributeName = std::pair<std::string, std::string>;  // object, attribute

  std::int64_t file_bytes = 0;
  std::uint64_t head_digest = 0;  // of the file's first bytes, by which ranks know it again
  std::map<std::string, Hdf5Answer<DatasetInfo>> datasets;
  std::map<AttributeName, Hdf5Answer<std::string>> attributes;  // "": there is none
  std::optional<Hdf5Answer<std::vector<std::string>>> paths;    // of all datasets
  /// Names that whoever asked chose from what there is.
  std::vector<std::string> chosen;

  std::vector<std::byte> encode() const;
  /// Throws bad_data, starting with `file`, when the bytes are no table, or describe a dataset that
  /// the file cannot hold.
  static Hdf5Table decode(std::span<const std::byte> bytes, const std::string& file);
};

}  // namespace annulus
