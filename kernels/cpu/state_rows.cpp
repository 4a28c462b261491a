#include "kernels/cpu/state_rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/row_block.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/state_rows.cpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on
#include "hwy/highway.h"
#include "kernels/cpu/pack-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {
namespace {

// into[i] ← into[i]·into_weight + from[i]·from_weight.
void combine_row(const float* HWY_RESTRICT from, float from_weight, float into_weight,
                 std::int64_t n, float* HWY_RESTRICT into) {
  const Eight d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < n; i += lanes) {
    const auto kept = hn::Mul(hn::LoadU(d, into + i), hn::Set(d, into_weight));
    hn::StoreU(hn::MulAdd(hn::LoadU(d, from + i), hn::Set(d, from_weight), kept), d, into + i);
  }
}

// Writes row·factor at element offset `at`, or zeros for a row without keys.
void scale_row(const float* HWY_RESTRICT row, float factor, bool empty, std::int64_t n,
               const TensorView& view, std::int64_t at) {
  HWY_ALIGN float scaled[8];
  const Eight d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < n; i += 8) {
    for (std::int64_t j = 0; j < 8; j += lanes) {
      const auto value = hn::Mul(hn::LoadU(d, row + i + j), hn::Set(d, factor));
      hn::StoreU(empty ? hn::Zero(d) : value, d, scaled + j);
    }
    store_row(scaled, 8, view.data, view.dtype, at + i);
  }
}

float dot_rows(const ConstTensorView& a, std::int64_t a_at, const ConstTensorView& b,
               std::int64_t b_at) {
  const Eight d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  HWY_ALIGN float a_row[8];
  HWY_ALIGN float b_row[8];
  auto sum = hn::Zero(d);
  for (std::int64_t i = 0; i < a.shape[3]; i += 8) {
    load_row(a.data, a.dtype, a_at + i, 8, a_row);
    load_row(b.data, b.dtype, b_at + i, 8, b_row);
    for (std::int64_t j = 0; j < 8; j += lanes) {
      sum = hn::MulAdd(hn::LoadU(d, a_row + j), hn::LoadU(d, b_row + j), sum);
    }
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

}  // namespace
}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus::kernels::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float& statistic(const TensorView& view, std::int64_t b, std::int64_t h, std::int64_t q) {
  return static_cast<float*>(view.data)[statistic_offset(view, b, h, q)];
}

float statistic(const ConstTensorView& view, std::int64_t b, std::int64_t h, std::int64_t q) {
  return static_cast<const float*>(view.data)[statistic_offset(view, b, h, q)];
}

// Visits the rows (b, h, q) of a view [batch, seq, heads, dim] on all threads.
template <typename Visit>
void for_each_row(const Shape& shape, const Visit& visit) {
  const std::int64_t heads = shape[2];
  const std::int64_t seq = shape[1];
#pragma omp parallel for schedule(static) if (shape.elements() > 65536)
  for (std::int64_t row = 0; row < shape[0] * seq * heads; ++row) {
    visit(row / heads / seq, row % heads, row / heads % seq);
  }
}

}  // namespace

HWY_EXPORT(combine_row);
HWY_EXPORT(scale_row);
HWY_EXPORT(dot_rows);

bool takes_rows(ConstTensorView rows) {
  return rows.device == Device::cpu && rows.dtype != DType::f64 && rows.strides[3] == 1 &&
         rows.shape[3] % 8 == 0;
}

bool takes_statistic(ConstTensorView statistic) {
  return statistic.device == Device::cpu && statistic.dtype == DType::f32;
}

bool takes_state(const AttentionState& state) {
  return takes_rows(state.accumulator) && state.accumulator.dtype == DType::f32 &&
         takes_statistic(state.row_max) && takes_statistic(state.row_sum);
}

void merge_states(const AttentionState& from, const AttentionState& into) {
  const Shape& shape = into.accumulator.shape;
  const auto combine = HWY_DYNAMIC_DISPATCH(combine_row);
  for_each_row(shape, [&](std::int64_t b, std::int64_t h, std::int64_t q) {
    const float from_max = statistic(from.row_max, b, h, q);
    float& max = statistic(into.row_max, b, h, q);
    // A NaN on either side wins, so that it reaches the output.
    const float larger = from_max > max || from_max != from_max ? from_max : max;
    if (larger == -kInfinity) return;
    const float from_weight = std::exp(from_max - larger);
    const float into_weight = std::exp(max - larger);
    float& sum = statistic(into.row_sum, b, h, q);
    sum = into_weight * sum + from_weight * statistic(from.row_sum, b, h, q);
    max = larger;
    combine(
        static_cast<const float*>(from.accumulator.data) + row_offset(from.accumulator, b, q, h),
        from_weight, into_weight, shape[3],
        static_cast<float*>(into.accumulator.data) + row_offset(into.accumulator, b, q, h));
  });
}

void finish_state(const AttentionState& state, const TensorView& o, const TensorView& log_sum_exp) {
  const Shape& shape = state.accumulator.shape;
  const auto scale = HWY_DYNAMIC_DISPATCH(scale_row);
  for_each_row(shape, [&](std::int64_t b, std::int64_t h, std::int64_t q) {
    const float max = statistic(state.row_max, b, h, q);
    const float sum = statistic(state.row_sum, b, h, q);
    const bool empty = max == -kInfinity;
    if (log_sum_exp) statistic(log_sum_exp, b, h, q) = empty ? max : max + std::log(sum);
    if (!o) return;
    scale(
        static_cast<const float*>(state.accumulator.data) + row_offset(state.accumulator, b, q, h),
        1.0F / sum, empty, shape[3], o, row_offset(o, b, q, h));
  });
}

void copy_state(const AttentionState& from, const AttentionState& to) {
  const Shape& shape = to.accumulator.shape;
  for_each_row(shape, [&](std::int64_t b, std::int64_t h, std::int64_t q) {
    statistic(to.row_max, b, h, q) = statistic(from.row_max, b, h, q);
    statistic(to.row_sum, b, h, q) = statistic(from.row_sum, b, h, q);
    std::copy_n(
        static_cast<const float*>(from.accumulator.data) + row_offset(from.accumulator, b, q, h),
        shape[3], static_cast<float*>(to.accumulator.data) + row_offset(to.accumulator, b, q, h));
  });
}

void delta(const ConstTensorView& o, const ConstTensorView& grad_o, const TensorView& delta) {
  const auto dot = HWY_DYNAMIC_DISPATCH(dot_rows);
  for_each_row(o.shape, [&](std::int64_t b, std::int64_t h, std::int64_t q) {
    statistic(delta, b, h, q) = dot(o, row_offset(o, b, q, h), grad_o, row_offset(grad_o, b, q, h));
  });
}

void sink_gradient(const ConstTensorView& sinks, const ConstTensorView& log_sum_exp,
                   const ConstTensorView& delta, const TensorView& grad_sinks) {
  const std::int64_t heads = delta.shape[1];
#pragma omp parallel for schedule(static) if (delta.shape.elements() > 65536)
  for (std::int64_t h = 0; h < heads; ++h) {
    const float sink = static_cast<const float*>(sinks.data)[h * sinks.strides[0]];
    double sum = 0.0;
    for (std::int64_t b = 0; b < delta.shape[0]; ++b) {
      for (std::int64_t q = 0; q < delta.shape[2]; ++q) {
        const float lse = statistic(log_sum_exp, b, h, q);
        if (lse == -kInfinity) continue;
        sum += static_cast<double>(std::exp(sink - lse) * statistic(delta, b, h, q));
      }
    }
    static_cast<float*>(grad_sinks.data)[h * grad_sinks.strides[0]] -= static_cast<float>(sum);
  }
}

}  // namespace annulus::kernels::cpu
#endif  // HWY_ONCE
