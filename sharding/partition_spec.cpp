#include "sharding/partition_spec.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

#include "kernels/error.hpp"

namespace annulus {
namespace {

/// Reads "(" entry ("," entry)* ")" where an entry is "-", "none", a name or "(" name, … ")".
class SpecReader {
 public:
  explicit SpecReader(std::string_view text) : text_(text) {}

  std::vector<AxisTuple> read() {
    std::vector<AxisTuple> entries;
    expect('(');
    if (!accept(')')) {
      do {
        if (!entries.empty() && accept(')')) return finish(std::move(entries));
        entries.push_back(read_entry());
      } while (accept(','));
      expect(')');
    }
    return finish(std::move(entries));
  }

 private:
  std::vector<AxisTuple> finish(std::vector<AxisTuple> entries) {
    skip_blanks();
    if (at_ < text_.size()) fail("the end");
    return entries;
  }

  AxisTuple read_entry() {
    if (accept('-') || accept_none()) return {};
    if (!accept('(')) return {read_name()};
    AxisTuple axes;
    do {
      axes.push_back(read_name());
    } while (accept(','));
    expect(')');
    return axes;
  }

  /// The run of name characters at the cursor.
  std::string_view word() {
    skip_blanks();
    const std::size_t end = text_.find_first_of(" \t(),-", at_);
    return text_.substr(at_, std::min(end, text_.size()) - at_);
  }

  bool accept_none() {
    if (word() != "none") return false;
    at_ += word().size();
    return true;
  }

  std::string read_name() {
    const std::string name(word());
    if (!is_axis_name(name)) fail("an axis name");
    at_ += name.size();
    return name;
  }

  void skip_blanks() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t')) ++at_;
  }

  bool accept(char c) {
    skip_blanks();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!accept(c)) fail(fmt::format("'{}'", c));
  }

  [[noreturn]] void fail(std::string_view expected) const {
    throw Error(ExitCode::usage,
                fmt::format("partition spec: expected {} at character {} of '{}'; write it as "
                            "((fsdp,dp), sp, tp, -)",
                            expected, at_ + 1, printable(text_)));
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

std::string entry_text(const AxisTuple& axes) {
  if (axes.empty()) return "-";
  if (axes.size() == 1) return axes.front();
  return fmt::format("({})", fmt::join(axes, ","));
}

}  // namespace

PartitionSpec::PartitionSpec(std::vector<AxisTuple> entries) : entries_(std::move(entries)) {
  std::set<std::string_view> seen;
  for (const AxisTuple& axes : entries_) {
    for (const std::string& axis : axes) {
      require(is_axis_name(axis), ExitCode::usage, "partition spec: '{}' is not an axis name",
              printable(axis));
      require(seen.insert(axis).second, ExitCode::usage,
              "partition spec: axis {} stands twice in {}; an axis splits one dimension",
              printable(axis), printable(to_string()));
    }
  }
}

PartitionSpec PartitionSpec::parse(std::string_view text) {
  return PartitionSpec(SpecReader(text).read());
}

const AxisTuple& PartitionSpec::operator[](int dim) const {
  static const AxisTuple kNone;
  return 0 <= dim && dim < size() ? entries_[static_cast<std::size_t>(dim)] : kNone;
}

std::string PartitionSpec::to_string() const {
  std::vector<std::string> texts;
  for (const AxisTuple& axes : entries_) texts.push_back(entry_text(axes));
  return fmt::format("({})", fmt::join(texts, ", "));
}

}  // namespace annulus
