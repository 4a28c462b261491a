#pragma once

#include <array>
#include <cstdint>
#include <ranges>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/error.hpp"
#include "sharding/communicator.hpp"

namespace annulus {

/// What a rank is about to do, as named fields: all ranks of a collective step must say the same.
class Statement {
 public:
  using Numbers = std::array<std::int64_t, 2>;

  /// `what` starts the messages: "ring", "run".
  explicit Statement(std::string_view what) : what_(what) {}

  Statement& add(std::string_view field, std::string_view value);
  template <typename Value>
  Statement& add(std::string_view field, const Value& value) {
    return add(field, std::string_view(fmt::format("{}", value)));
  }
  /// This rank cannot go on; the others learn why.
  Statement& fail(ExitCode code, std::string_view message);

  /// Returns when every rank states the same. Otherwise all ranks throw: the first field that
  /// differs, with its values and the ranks that have them (usage); or, when what they state is the
  /// same as far as they got, the failure of the lowest rank. One small all-gather where all agree.
  /// Returns `own` of every rank, which may differ. Collective.
  std::vector<Numbers> agree(Communicator& ranks, const Numbers& own = {}) const;

 private:
  [[noreturn]] void explain(Communicator& ranks) const;

  std::string what_;
  std::vector<std::pair<std::string, std::string>> fields_;
  ExitCode code_ = ExitCode::internal;
  std::string failure_;
};

/// FNV-1a, to state things too long to print.
std::uint64_t digest(std::string_view bytes, std::uint64_t seed = 14695981039346656037ULL);

/// The same of the values' bytes.
template <std::ranges::contiguous_range Values>
std::uint64_t digest_of(const Values& values) {
  return digest({reinterpret_cast<const char*>(std::ranges::data(values)),
                 std::ranges::size(values) * sizeof(std::ranges::range_value_t<Values>)});
}

}  // namespace annulus
