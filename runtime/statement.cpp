#include "runtime/statement.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>

#include "runtime/agreement.hpp"

namespace annulus {
namespace {

/// What travels where all agree.
struct Summary {
  std::uint64_t digest = 0;
  std::int64_t failed = 0;
  Statement::Numbers numbers{};
};

/// What one rank says when ranks do not agree.
struct Said {
  std::vector<std::pair<std::string, std::string>> fields;
  std::string failure;
  ExitCode code = ExitCode::internal;
};

/// Text of a statement: lengths and bytes.
void put(std::vector<std::byte>& to, std::string_view text) {
  const auto length = static_cast<std::uint64_t>(text.size());
  const auto* raw = reinterpret_cast<const std::byte*>(&length);
  to.insert(to.end(), raw, raw + sizeof length);
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  to.insert(to.end(), bytes, bytes + text.size());
}

std::string take(std::span<const std::byte>& from) {
  std::uint64_t length = 0;
  std::memcpy(&length, from.data(), sizeof length);
  const auto* text = reinterpret_cast<const char*>(from.data() + sizeof length);
  std::string value(text, static_cast<std::size_t>(length));
  from = from.subspan(sizeof length + static_cast<std::size_t>(length));
  return value;
}

/// "0-2, 5".
std::string in_words(const std::vector<int>& ranks) {
  std::string text;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    std::size_t last = i;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    text += fmt::format("{}{}", text.empty() ? "" : ", ", ranks[i]);
    if (last > i) text += fmt::format("-{}", ranks[last]);
    i = last;
  }
  return (ranks.size() == 1 ? "rank " : "ranks ") + text;
}

/// Nothing where a rank failed before it came to this field.
std::optional<std::string> value_of(const Said& said, const std::string& name) {
  for (const auto& [field, value] : said.fields) {
    if (field == name) return value;
  }
  return said.failure.empty() ? std::optional<std::string>("not stated") : std::nullopt;
}

/// "scale is 0.125 on ranks 0-2 but 0.25 on rank 3"; empty when all ranks state the same.
std::string difference(const std::vector<Said>& of_rank) {
  for (const Said& said : of_rank) {
    for (const auto& [name, unused] : said.fields) {
      std::vector<std::pair<std::string, std::vector<int>>> values;
      for (int rank = 0; rank < static_cast<int>(of_rank.size()); ++rank) {
        const auto value = value_of(of_rank[static_cast<std::size_t>(rank)], name);
        if (!value) continue;
        auto at = std::find_if(values.begin(), values.end(),
                               [&](const auto& known) { return known.first == *value; });
        if (at == values.end()) at = values.insert(at, {*value, {}});
        at->second.push_back(rank);
      }
      if (values.size() == 1) continue;
      std::vector<std::string> parts;
      for (const auto& [value, ranks] : values) {
        parts.push_back(fmt::format("{} on {}", value, in_words(ranks)));
      }
      return fmt::format("{} is {}", name, fmt::join(parts, " but "));
    }
  }
  return "";
}

}  // namespace

Statement& Statement::add(std::string_view field, std::string_view value) {
  fields_.emplace_back(field, value);
  return *this;
}

Statement& Statement::fail(ExitCode code, std::string_view message) {
  code_ = code;
  failure_ = message;
  return *this;
}

std::vector<Statement::Numbers> Statement::agree(Communicator& ranks, const Numbers& own) const {
  std::uint64_t hash = digest(what_);
  for (const auto& [field, value] : fields_) hash = digest(value, digest(field, hash));
  const Summary mine{hash, failure_.empty() ? 0 : 1, own};
  std::vector<Summary> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  std::vector<Numbers> numbers;
  for (const Summary& theirs : all) {
    if (theirs.digest != all.front().digest || theirs.failed != 0) explain(ranks);
    numbers.push_back(theirs.numbers);
  }
  return numbers;
}

void Statement::explain(Communicator& ranks) const {
  std::vector<std::byte> text;
  put(text, failure_);
  put(text, std::to_string(static_cast<int>(code_)));
  put(text, "operation");
  put(text, what_);
  for (const auto& [field, value] : fields_) {
    put(text, field);
    put(text, value);
  }
  std::vector<Said> of_rank;
  for (const std::vector<std::byte>& theirs : gather_bytes(ranks, text)) {
    std::span<const std::byte> rest = theirs;
    Said& said = of_rank.emplace_back();
    said.failure = take(rest);
    said.code = static_cast<ExitCode>(std::stoi(take(rest)));
    while (!rest.empty()) {
      const std::string field = take(rest);
      said.fields.emplace_back(field, take(rest));
    }
  }
  const std::string differs = difference(of_rank);
  if (!differs.empty()) {
    throw Error(ExitCode::usage,
                fmt::format("{}: ranks were not started alike: {}", what_, differs));
  }
  const auto failed = std::find_if(of_rank.begin(), of_rank.end(),
                                   [](const Said& said) { return !said.failure.empty(); });
  require(failed != of_rank.end(), ExitCode::internal, "{}: digests differ, fields do not", what_);
  throw Error(failed->code, failed->failure);
}

std::uint64_t digest(std::string_view bytes, std::uint64_t seed) {
  std::uint64_t hash = seed;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 1099511628211ULL;
  return hash;
}

}  // namespace annulus
