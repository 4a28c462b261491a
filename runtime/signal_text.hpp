#pragma once

#include <array>
#include <charconv>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace annulus {

/// A line of text that grows without allocating, so that signal handlers may use it; what does not
/// fit is dropped.
class SignalText {
 public:
  SignalText& operator<<(std::string_view text) noexcept {
    for (const char c : text) {
      if (size_ < buffer_.size()) buffer_[size_++] = c;
    }
    return *this;
  }
  template <std::integral Integer>
  SignalText& operator<<(Integer number) noexcept {
    return append(number, 10);
  }
  SignalText& hex(std::uint64_t number) noexcept { return append(number, 16); }
  /// Seconds with one decimal: "3.2".
  SignalText& seconds(std::int64_t nanoseconds) noexcept {
    const std::int64_t tenths = nanoseconds / 100'000'000;
    return *this << tenths / 10 << "." << tenths % 10;
  }

  std::string_view view() const noexcept { return {buffer_.data(), size_}; }

  /// Writes all of it, with EINTR and short writes looked after; failures are of no use to a
  /// caller.
  void write_to(int file) const noexcept;

 private:
  template <typename Integer>
  SignalText& append(Integer number, int base) noexcept {
    std::array<char, 24> digits{};
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number, base);
    return *this << std::string_view(digits.data(),
                                     static_cast<std::size_t>(end.ptr - digits.data()));
  }

  std::array<char, 1024> buffer_{};
  std::size_t size_ = 0;
};

}  // namespace annulus
