#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>

namespace annulus::launch {

/// The whole of `text` as a number in decimal that `Integer` holds.
template <typename Integer>
bool read_whole(std::string_view text, Integer& number) {
  const char* const end = text.data() + text.size();
  const auto [read, error] = std::from_chars(text.data(), end, number);
  return error == std::errc() && read == end;
}

/// Accepts whole numbers from `least` to `most`, described as `accepted`. CLI11 by itself wraps or
/// clamps what does not fit.
template <typename Integer = std::int64_t>
CLI::Validator whole_number(
    std::type_identity_t<Integer> least,
    std::type_identity_t<Integer> most = std::numeric_limits<Integer>::max(),
    std::string accepted = "") {
  if (accepted.empty()) {
    accepted = most == std::numeric_limits<Integer>::max()
                   ? fmt::format("a whole number, {} or more", least)
                   : fmt::format("a whole number from {} to {}", least, most);
  }
  return CLI::Validator(
      [least, most, accepted](const std::string& text) {
        Integer number{};
        const bool good = read_whole(text, number) && number >= least && number <= most;
        return good ? std::string() : text + " is not " + accepted;
      },
      "");
}

/// Accepts numbers of type `Real` for which `accepts` holds, described as `accepted`.
template <typename Real = double>
CLI::Validator number_where(bool (*accepts)(Real), const std::string& accepted) {
  return CLI::Validator(
      [accepts, accepted](const std::string& text) {
        Real number{};
        const bool good = CLI::detail::lexical_cast(text, number) && accepts(number);
        return good ? std::string() : text + " is not " + accepted;
      },
      "");
}

struct HeadCounts {
  std::int64_t query = 0;
  std::int64_t kv = 0;
};

/// "64:8", or "8" for as many KV heads. Throws usage, which names the command, unless both are 1 or
/// more and the second divides the first.
HeadCounts parse_heads(std::string_view text, std::string_view command);

}  // namespace annulus::launch
