#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace annulus {

struct MeshAxis {
  std::string name;
  int size = 1;
  friend bool operator==(const MeshAxis&, const MeshAxis&) = default;
};

/// Several axes taken as one, the first the slowest: (fsdp, dp) numbers fsdp · |dp| + dp.
using AxisTuple = std::vector<std::string>;

/// Ranks arranged along named axes: an immutable value. Ranks are numbered row-major, the last axis
/// the fastest, so that the default order keeps the ranks of one sequence group next to each other.
class Mesh {
 public:
  /// One size may be -1 and takes what is left of `ranks`; the product must equal `ranks`. Throws
  /// usage for a size below 1, a name that is no identifier or stands twice, or a wrong product.
  Mesh(std::vector<MeshAxis> axes, int ranks);

  /// (dp, fsdp, ep, tp, sp) = (1, -1, 1, 1, 1).
  static Mesh standard(int ranks);
  /// Sizes of the standard axes in any order, as "sp=4,tp=2": axes left out are 1, empty text is
  /// standard(). Throws usage for anything else.
  static Mesh parse(std::string_view text, int ranks);

  int ranks() const { return ranks_; }
  std::span<const MeshAxis> axes() const { return axes_; }
  bool has(std::string_view axis) const;
  /// Throws usage, listing the axes, when there is no such axis; so do all queries below.
  int size(std::string_view axis) const;
  int size(const AxisTuple& axes) const;

  /// One coordinate per axis, in the order of axes().
  std::vector<int> coordinates(int rank) const;
  int rank_at(std::span<const int> coordinates) const;
  int coordinate(int rank, std::string_view axis) const;
  /// Number of `rank` within its group along `axes`; 0 for no axes.
  int group_index(int rank, const AxisTuple& axes) const;
  /// The ranks that differ from `rank` along `axes` only, by group index; {rank} for no axes.
  std::vector<int> group(int rank, const AxisTuple& axes) const;

  std::string to_string() const;  // "dp=1,fsdp=1,ep=1,tp=2,sp=4"
  friend bool operator==(const Mesh&, const Mesh&) = default;

 private:
  std::size_t find(std::string_view axis) const;
  int stride(std::size_t axis) const;
  void check_rank(int rank) const;

  std::vector<MeshAxis> axes_;
  int ranks_ = 1;
};

/// A letter or '_' followed by letters, digits and '_'; not "none", which specs write for no axis.
bool is_axis_name(std::string_view text);

}  // namespace annulus
