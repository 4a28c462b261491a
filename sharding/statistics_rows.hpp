#pragma once

#include "kernels/types.hpp"

namespace annulus {

/// Statistics [batch, heads, rows] seen as [batch, rows, heads, 1], the order in which rows travel,
/// and back.
template <typename View>
View as_rows(const View& statistics) {
  View view = statistics;
  view.shape = {statistics.shape[0], statistics.shape[2], statistics.shape[1], 1};
  view.strides = {statistics.strides[0], statistics.strides[2], statistics.strides[1], 1};
  return view;
}

}  // namespace annulus
