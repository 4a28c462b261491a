#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/error.hpp"

namespace annulus {

/// Values and texts one after the other, for another process of the same program.
class ByteWriter {
 public:
  template <typename Value>
  void put(const Value& value) {
    static_assert(std::is_trivially_copyable_v<Value>);
    const auto* raw = reinterpret_cast<const std::byte*>(&value);
    bytes_.insert(bytes_.end(), raw, raw + sizeof value);
  }
  void put_bytes(std::span<const std::byte> bytes) {
    put(static_cast<std::uint64_t>(bytes.size()));
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  void put_text(std::string_view text) { put_bytes(std::as_bytes(std::span(text))); }
  std::vector<std::byte> take() { return std::exchange(bytes_, {}); }

 private:
  std::vector<std::byte> bytes_;
};

/// Reads what a ByteWriter wrote, which may have been damaged since: throws bad_data, with `what`,
/// where the bytes end early. Numbers may have any value.
class ByteReader {
 public:
  ByteReader(std::span<const std::byte> bytes, std::string what)
      : rest_(bytes), what_(std::move(what)) {}

  template <typename Value>
  Value take() {
    static_assert(std::is_trivially_copyable_v<Value>);
    Value value{};
    std::memcpy(&value, next(sizeof value).data(), sizeof value);
    return value;
  }
  std::span<const std::byte> take_bytes() { return next(take<std::uint64_t>()); }
  std::string take_text() {
    const auto text = take_bytes();
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }
  /// How many of something follow, each of at least `least_bytes`.
  std::size_t take_count(std::size_t least_bytes) {
    const auto count = take<std::uint64_t>();
    require(count <= rest_.size() / least_bytes, ExitCode::bad_data, "{}: ends early", what_);
    return count;
  }

 private:
  std::span<const std::byte> next(std::uint64_t bytes) {
    require(bytes <= rest_.size(), ExitCode::bad_data, "{}: ends early", what_);
    const auto taken = rest_.first(bytes);
    rest_ = rest_.subspan(bytes);
    return taken;
  }

  std::span<const std::byte> rest_;
  std::string what_;
};

}  // namespace annulus
