#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/types.hpp"

namespace annulus {

/// The part of a global tensor that one rank holds: for every dimension the global ranges whose
/// concatenation, in the order given, is the local dimension. A zigzag layout has two ranges of
/// rows, a balanced one many, and a rank without tokens has none.
class Selection {
 public:
  Selection() = default;
  /// Everything of a tensor of this shape.
  explicit Selection(const Shape& global);
  /// One range in every dimension.
  static Selection block(const Shape& begin, const Shape& extent);

  int rank() const { return rank_; }
  const std::vector<Span>& runs(int dim) const { return runs_[static_cast<std::size_t>(dim)]; }
  /// Replaces the ranges of `dim`; neighbours that touch are joined, empty ones dropped.
  Selection& set(int dim, const std::vector<Span>& ranges);
  /// The same selection with dimensions `a` and `b` exchanged.
  Selection transposed(int a, int b) const;
  /// Extents of the local tensor.
  Shape shape() const;
  /// Throws bad_data unless every range lies within `global`; `what` starts the message.
  void validate(const Shape& global, const std::string& what) const;
  friend bool operator==(const Selection&, const Selection&) = default;

 private:
  std::array<std::vector<Span>, Shape::kMaxRank> runs_;
  int rank_ = 0;
};

/// One rectangle of a selection.
struct Box {
  Shape global_begin;
  Shape local_begin;
  Shape extent;
};

/// Calls `visit` for every non-empty rectangle, in the order of the global tensor's outer
/// dimensions as the ranges are given.
void for_each_box(const Selection& selection, const std::function<void(const Box&)>& visit);

/// Calls `visit` for every rectangle of the selection inside the block [begin, begin + extent).
void for_each_box_within(const Selection& selection, const Shape& begin, const Shape& extent,
                         const std::function<void(const Box&)>& visit);

/// Calls `visit` once with the grid coordinates of every cell of `cell` elements that the selection
/// touches, in row-major order.
void for_each_cell(const Selection& selection, const Shape& cell,
                   const std::function<void(const Shape&)>& visit);

/// The part of `view` that starts at `begin` and has `extent`; strides stay.
TensorView subview(const TensorView& view, const Shape& begin, const Shape& extent);
ConstTensorView subview(const ConstTensorView& view, const Shape& begin, const Shape& extent);

}  // namespace annulus
