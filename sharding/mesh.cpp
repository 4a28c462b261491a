#include "sharding/mesh.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <limits>

#include "kernels/error.hpp"

namespace annulus {
namespace {

constexpr std::array<std::string_view, 5> kStandardAxes = {"dp", "fsdp", "ep", "tp", "sp"};

std::string join(std::span<const MeshAxis> axes) {
  std::string text;
  for (const MeshAxis& axis : axes) {
    text += fmt::format("{}{}={}", text.empty() ? "" : ",", axis.name, axis.size);
  }
  return text;
}

void check_axes(std::span<const MeshAxis> axes) {
  for (std::size_t i = 0; i < axes.size(); ++i) {
    const MeshAxis& axis = axes[i];
    require(is_axis_name(axis.name), ExitCode::usage,
            "mesh: axis name '{}' is not a letter or '_' followed by letters, digits or '_'",
            printable(axis.name));
    require(axis.size >= 1 || axis.size == -1, ExitCode::usage,
            "mesh: axis {} has size {}; sizes are 1 or more, or -1 for what is left", axis.name,
            axis.size);
    const auto same = [&](const MeshAxis& other) { return other.name == axis.name; };
    require(std::none_of(axes.begin(), axes.begin() + static_cast<std::ptrdiff_t>(i), same),
            ExitCode::usage, "mesh: axis {} is given twice", axis.name);
  }
}

/// Product of the sizes given, saturated at the largest integer.
std::int64_t known_product(std::span<const MeshAxis> axes) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  std::int64_t product = 1;
  for (const MeshAxis& axis : axes) {
    if (axis.size > 0) product = product > kMost / axis.size ? kMost : product * axis.size;
  }
  return product;
}

std::string_view trim(std::string_view text) {
  constexpr std::string_view kBlank = " \t\r\n";
  const std::size_t begin = text.find_first_not_of(kBlank);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlank) - begin + 1);
}

MeshAxis parse_axis(std::string_view item) {
  const std::size_t equals = item.find('=');
  require(equals != std::string_view::npos, ExitCode::usage,
          "mesh: '{}' is not AXIS=SIZE, as in sp=4,tp=2", printable(item));
  const std::string_view axis = trim(item.substr(0, equals));
  const std::string_view number = trim(item.substr(equals + 1));
  require(std::find(kStandardAxes.begin(), kStandardAxes.end(), axis) != kStandardAxes.end(),
          ExitCode::usage, "mesh: unknown axis '{}'; the axes are {}", printable(axis),
          fmt::join(kStandardAxes, ", "));
  int size = 0;
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), size);
  require(error == std::errc{} && end == number.data() + number.size(), ExitCode::usage,
          "mesh: size '{}' of axis {} is not an integer", printable(number), axis);
  return {std::string(axis), size};
}

}  // namespace

bool is_axis_name(std::string_view text) {
  const auto digit = [](char c) { return c >= '0' && c <= '9'; };
  const auto inner = [&](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || digit(c);
  };
  return !text.empty() && !digit(text.front()) && text != "none" &&
         std::all_of(text.begin(), text.end(), inner);
}

Mesh::Mesh(std::vector<MeshAxis> axes, int ranks) : axes_(std::move(axes)), ranks_(ranks) {
  require(ranks >= 1, ExitCode::usage, "mesh: {} ranks; a mesh needs at least 1", ranks);
  require(!axes_.empty(), ExitCode::usage, "mesh: no axes; give at least one, as sp={}", ranks);
  check_axes(axes_);
  const auto open = [](const MeshAxis& axis) { return axis.size == -1; };
  require(std::count_if(axes_.begin(), axes_.end(), open) <= 1, ExitCode::usage,
          "mesh: {} has more than one -1; only one axis can take what is left", join(axes_));
  const std::int64_t product = known_product(axes_);
  const auto rest = std::find_if(axes_.begin(), axes_.end(), open);
  if (rest != axes_.end()) {
    require(ranks % product == 0, ExitCode::usage,
            "mesh: {} cannot fill {} ranks: the given sizes multiply to {}, which does not divide "
            "{}",
            join(axes_), ranks, product, ranks);
    rest->size = static_cast<int>(ranks / product);
    return;
  }
  require(product == ranks, ExitCode::usage,
          "mesh: {} multiplies to {}, but there are {} ranks; change a size, or give one as -1",
          join(axes_), product, ranks);
}

Mesh Mesh::standard(int ranks) {
  return Mesh({{"dp", 1}, {"fsdp", -1}, {"ep", 1}, {"tp", 1}, {"sp", 1}}, ranks);
}

Mesh Mesh::parse(std::string_view text, int ranks) {
  if (trim(text).empty()) return standard(ranks);
  std::vector<MeshAxis> given;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    given.push_back(parse_axis(trim(text.substr(begin, end - begin))));
    begin = end + 1;
  }
  check_axes(given);
  std::vector<MeshAxis> axes;
  for (const std::string_view axis : kStandardAxes) {
    const auto same = [&](const MeshAxis& other) { return other.name == axis; };
    const auto found = std::find_if(given.begin(), given.end(), same);
    axes.push_back({std::string(axis), found == given.end() ? 1 : found->size});
  }
  return Mesh(std::move(axes), ranks);
}

std::size_t Mesh::find(std::string_view axis) const {
  std::size_t i = 0;
  while (i < axes_.size() && axes_[i].name != axis) ++i;
  require(i < axes_.size(), ExitCode::usage, "mesh: no axis '{}' in {}", axis, join(axes_));
  return i;
}

int Mesh::stride(std::size_t axis) const {
  int stride = 1;
  for (std::size_t i = axis + 1; i < axes_.size(); ++i) stride *= axes_[i].size;
  return stride;
}

void Mesh::check_rank(int rank) const {
  require(0 <= rank && rank < ranks_, ExitCode::usage, "mesh: rank {} is not in 0..{}", rank,
          ranks_ - 1);
}

bool Mesh::has(std::string_view axis) const {
  return std::any_of(axes_.begin(), axes_.end(),
                     [&](const MeshAxis& other) { return other.name == axis; });
}

int Mesh::size(std::string_view axis) const { return axes_[find(axis)].size; }

int Mesh::size(const AxisTuple& axes) const {
  int product = 1;
  for (const std::string& axis : axes) product *= size(axis);
  return product;
}

std::vector<int> Mesh::coordinates(int rank) const {
  check_rank(rank);
  std::vector<int> result(axes_.size());
  for (std::size_t i = axes_.size(); i-- > 0; rank /= axes_[i].size) {
    result[i] = rank % axes_[i].size;
  }
  return result;
}

int Mesh::rank_at(std::span<const int> coordinates) const {
  require(coordinates.size() == axes_.size(), ExitCode::usage,
          "mesh: {} coordinates for the {} axes of {}", coordinates.size(), axes_.size(),
          join(axes_));
  int rank = 0;
  for (std::size_t i = 0; i < axes_.size(); ++i) {
    require(0 <= coordinates[i] && coordinates[i] < axes_[i].size, ExitCode::usage,
            "mesh: coordinate {} of axis {} is not in 0..{}", coordinates[i], axes_[i].name,
            axes_[i].size - 1);
    rank = rank * axes_[i].size + coordinates[i];
  }
  return rank;
}

int Mesh::coordinate(int rank, std::string_view axis) const {
  check_rank(rank);
  const std::size_t i = find(axis);
  return rank / stride(i) % axes_[i].size;
}

int Mesh::group_index(int rank, const AxisTuple& axes) const {
  check_rank(rank);
  int index = 0;
  for (const std::string& axis : axes) index = index * size(axis) + coordinate(rank, axis);
  return index;
}

std::vector<int> Mesh::group(int rank, const AxisTuple& axes) const {
  check_rank(rank);
  std::vector<int> ranks = {rank};
  for (const std::string& axis : axes) ranks[0] -= coordinate(rank, axis) * stride(find(axis));
  for (const std::string& axis : axes) {
    std::vector<int> next;
    for (const int base : ranks) {
      for (int i = 0; i < size(axis); ++i) next.push_back(base + i * stride(find(axis)));
    }
    ranks = std::move(next);
  }
  return ranks;
}

std::string Mesh::to_string() const { return join(axes_); }

}  // namespace annulus
