#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/attention.hpp"
#include "kernels/cpu/state_rows.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/element.hpp"

namespace annulus {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Statistic {
  const ConstTensorView& view;

  double operator()(std::int64_t b, std::int64_t h, std::int64_t q) const {
    return load_element(view.data, view.dtype,
                        b * view.strides[0] + h * view.strides[1] + q * view.strides[2]);
  }
};

void store_statistic(const TensorView& view, std::int64_t b, std::int64_t h, std::int64_t q,
                     double value) {
  store_element(view.data, view.dtype,
                b * view.strides[0] + h * view.strides[1] + q * view.strides[2], value);
}

// View [batch, seq, heads, dim] visited as rows (b, h, q).
template <typename Visit>
void for_each_row(const ConstTensorView& view, Visit visit) {
  constexpr std::int64_t kWorthThreads = 1 << 16;  // elements
#pragma omp parallel for collapse(2) if (view.shape.elements() > kWorthThreads)
  for (std::int64_t b = 0; b < view.shape[0]; ++b) {
    for (std::int64_t q = 0; q < view.shape[1]; ++q) {
      for (std::int64_t h = 0; h < view.shape[2]; ++h) visit(b, h, q);
    }
  }
}

std::int64_t row_at(const ConstTensorView& view, std::int64_t b, std::int64_t h, std::int64_t q) {
  return b * view.strides[0] + q * view.strides[1] + h * view.strides[2];
}

// Whether rows are f32 elements next to each other, as those of kernels are.
bool has_plain_rows(const ConstTensorView& view) {
  return view.dtype == DType::f32 && view.strides[3] == 1;
}

const float* plain_row(const ConstTensorView& view, std::int64_t at) {
  return static_cast<const float*>(view.data) + at;
}

// into ← into·into_weight + from·from_weight
void add_weighted(const float* from, float from_weight, float* into, float into_weight,
                  std::int64_t dim) {
  for (std::int64_t d = 0; d < dim; ++d) into[d] = into[d] * into_weight + from[d] * from_weight;
}

void merge_row(const AttentionState& from, const AttentionState& into, std::int64_t b,
               std::int64_t h, std::int64_t q) {
  const double from_max = Statistic{from.row_max}(b, h, q);
  const double into_max = Statistic{into.row_max}(b, h, q);
  const double max = max_or_nan(from_max, into_max);
  if (max == -kInfinity) return;
  const double from_weight = std::exp(from_max - max);
  const double into_weight = std::exp(into_max - max);
  const std::int64_t from_at = row_at(from.accumulator, b, h, q);
  const std::int64_t into_at = row_at(into.accumulator, b, h, q);
  const std::int64_t dim = into.accumulator.shape[3];
  const bool plain = has_plain_rows(from.accumulator) && has_plain_rows(into.accumulator);
  if (plain) {
    add_weighted(plain_row(from.accumulator, from_at), static_cast<float>(from_weight),
                 static_cast<float*>(into.accumulator.data) + into_at,
                 static_cast<float>(into_weight), dim);
  }
  for (std::int64_t d = 0; !plain && d < dim; ++d) {
    const std::int64_t at = into_at + d * into.accumulator.strides[3];
    const double sum =
        into_weight * load_element(into.accumulator.data, into.accumulator.dtype, at) +
        from_weight * load_element(from.accumulator.data, from.accumulator.dtype,
                                   from_at + d * from.accumulator.strides[3]);
    store_element(into.accumulator.data, into.accumulator.dtype, at, sum);
  }
  store_statistic(into.row_max, b, h, q, max);
  store_statistic(into.row_sum, b, h, q,
                  into_weight * Statistic{into.row_sum}(b, h, q) +
                      from_weight * Statistic{from.row_sum}(b, h, q));
}

void finish_row(const AttentionState& state, const TensorView& o, const TensorView& log_sum_exp,
                std::int64_t b, std::int64_t h, std::int64_t q) {
  const double max = Statistic{state.row_max}(b, h, q);
  const double sum = Statistic{state.row_sum}(b, h, q);
  const bool empty = max == -kInfinity;
  if (log_sum_exp) {
    store_statistic(log_sum_exp, b, h, q, empty ? -kInfinity : max + std::log(sum));
  }
  if (!o) return;
  const std::int64_t from_at = row_at(state.accumulator, b, h, q);
  const std::int64_t at = row_at(o, b, h, q);
  for (std::int64_t d = 0; d < o.shape[3]; ++d) {
    const double value = load_element(state.accumulator.data, state.accumulator.dtype,
                                      from_at + d * state.accumulator.strides[3]);
    store_element(o.data, o.dtype, at + d * o.strides[3], empty ? 0.0 : value / sum);
  }
}

double row_product(const ConstTensorView& o, const ConstTensorView& grad_o, std::int64_t b,
                   std::int64_t h, std::int64_t q) {
  const std::int64_t o_at = row_at(o, b, h, q);
  const std::int64_t grad_at = row_at(grad_o, b, h, q);
  double sum = 0.0;
  if (has_plain_rows(o) && has_plain_rows(grad_o)) {
    const float* plain_o = plain_row(o, o_at);
    const float* plain_grad = plain_row(grad_o, grad_at);
    for (std::int64_t d = 0; d < o.shape[3]; ++d) {
      sum += static_cast<double>(plain_o[d]) * static_cast<double>(plain_grad[d]);
    }
    return sum;
  }
  for (std::int64_t d = 0; d < o.shape[3]; ++d) {
    sum += load_element(o.data, o.dtype, o_at + d * o.strides[3]) *
           load_element(grad_o.data, grad_o.dtype, grad_at + d * grad_o.strides[3]);
  }
  return sum;
}

}  // namespace

void merge(const AttentionState& from, const AttentionState& into, Stream stream) {
  if (into.accumulator.device == Device::cuda) return kernels::cuda::merge(from, into, stream);
  if (kernels::cpu::takes_state(from) && kernels::cpu::takes_state(into)) {
    return kernels::cpu::merge_states(from, into);
  }
  for_each_row(into.accumulator, [&](std::int64_t b, std::int64_t h, std::int64_t q) {
    merge_row(from, into, b, h, q);
  });
}

void finish(const AttentionState& state, TensorView o, TensorView log_sum_exp, Stream stream) {
  if (state.accumulator.device == Device::cuda) {
    return kernels::cuda::finish(state, o, log_sum_exp, stream);
  }
  if (kernels::cpu::takes_state(state) && (!o || kernels::cpu::takes_rows(o)) &&
      (!log_sum_exp || kernels::cpu::takes_statistic(log_sum_exp))) {
    return kernels::cpu::finish_state(state, o, log_sum_exp);
  }
  for_each_row(state.accumulator, [&](std::int64_t b, std::int64_t h, std::int64_t q) {
    finish_row(state, o, log_sum_exp, b, h, q);
  });
}

void attention_delta(ConstTensorView o, ConstTensorView grad_o, TensorView delta, Stream stream) {
  if (o.device == Device::cuda) return kernels::cuda::delta(o, grad_o, delta, stream);
  if (kernels::cpu::takes_rows(o) && kernels::cpu::takes_rows(grad_o) &&
      kernels::cpu::takes_statistic(delta)) {
    return kernels::cpu::delta(o, grad_o, delta);
  }
  for_each_row(o, [&](std::int64_t b, std::int64_t h, std::int64_t q) {
    store_statistic(delta, b, h, q, row_product(o, grad_o, b, h, q));
  });
}

void attention_sink_gradient(ConstTensorView sinks, ConstTensorView log_sum_exp,
                             ConstTensorView delta, TensorView grad_sinks, Stream stream) {
  if (sinks.device == Device::cuda) {
    return kernels::cuda::sink_gradient(sinks, log_sum_exp, delta, grad_sinks, stream);
  }
  if (kernels::cpu::takes_statistic(sinks) && kernels::cpu::takes_statistic(log_sum_exp) &&
      kernels::cpu::takes_statistic(delta) && kernels::cpu::takes_statistic(grad_sinks)) {
    return kernels::cpu::sink_gradient(sinks, log_sum_exp, delta, grad_sinks);
  }
  for (std::int64_t h = 0; h < delta.shape[1]; ++h) {
    const double sink = load_element(sinks.data, sinks.dtype, h * sinks.strides[0]);
    double sum = 0.0;
    for (std::int64_t b = 0; b < delta.shape[0]; ++b) {
      for (std::int64_t q = 0; q < delta.shape[2]; ++q) {
        const double lse = Statistic{log_sum_exp}(b, h, q);
        if (lse != -kInfinity) sum += std::exp(sink - lse) * Statistic{delta}(b, h, q);
      }
    }
    const std::int64_t at = h * grad_sinks.strides[0];
    store_element(grad_sinks.data, grad_sinks.dtype, at,
                  load_element(grad_sinks.data, grad_sinks.dtype, at) - sum);
  }
}

}  // namespace annulus
