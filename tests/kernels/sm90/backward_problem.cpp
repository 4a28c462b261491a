#include "backward_problem.hpp"

#include <fmt/format.h>

#include <cmath>

#include "kernels/scalar.hpp"

namespace annulus {
namespace {

double rounded(double value, DType dtype) {
  const auto single = static_cast<float>(value);
  return static_cast<double>(dtype == DType::f16 ? f16_to_float(float_to_f16(single))
                                                 : bf16_to_float(float_to_bf16(single)));
}

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

std::vector<double> doubles(const Shape& shape) {
  return std::vector<double>(index(shape.elements()));
}

bool keeps(const std::vector<Slice>& slices, std::int64_t q, std::int64_t k) {
  for (const Slice& slice : slices) {
    if (slice.keeps(q, k)) return true;
  }
  return false;
}

constexpr std::int64_t kPadding = 3;  // tokens around each batch row

}  // namespace

DeviceGradient::DeviceGradient(const Shape& shape_, bool unaligned) : shape(shape_) {
  const Shape padded{shape[0], shape[1] + 2 * kPadding, shape[2], shape[3]};
  const std::int64_t odd = unaligned ? 1 : 0;  // elements before the tensor, and after each head
  Shape strides = contiguous_strides(padded);
  strides[2] += odd;
  strides[1] = strides[2] * padded[2];
  strides[0] = strides[1] * padded[1];
  memory = Buffer(Device::cuda, (odd + strides[0] * padded[0]) * 4);
  fill_bytes(memory.data(), Device::cuda, 0xff, memory.bytes());
  view = TensorView(static_cast<float*>(memory.data()) + odd, DType::f32, padded, strides,
                    Device::cuda)
             .slice(1, {kPadding, kPadding + shape[1]});
  clear();
}

void DeviceGradient::clear() const { fill(0.0F); }

void DeviceGradient::fill(float value) const {
  const std::vector<float> values(index(shape.elements()), value);
  if (!values.empty()) copy(ConstTensorView(values.data(), DType::f32, shape), view);
}

std::vector<float> DeviceGradient::fetched() const {
  std::vector<float> values(index(shape.elements()));
  if (!values.empty()) copy(view, TensorView(values.data(), DType::f32, shape));
  return values;
}

bool DeviceGradient::padding_untouched() const {
  std::vector<float> all(index(memory.bytes() / 4));
  const Shape flat{memory.bytes() / 4};
  if (all.empty()) return true;
  copy(ConstTensorView(memory.data(), DType::f32, flat, Device::cuda),
       TensorView(all.data(), DType::f32, flat));
  std::int64_t numbers = 0;
  for (const float value : all) numbers += std::isnan(value) ? 0 : 1;
  return numbers <= shape.elements();
}

BackwardProblem::BackwardProblem(const BackwardCase& c_, std::vector<Slice> slices_,
                                 std::uint32_t seed)
    : c(c_),
      slices(std::move(slices_)),
      random(seed),
      q(Shape{c.batch, c.seq_q, c.q_heads, c.head_dim}, c.dtype, random),
      k(Shape{c.batch, c.seq_kv, c.kv_heads, c.head_dim}, c.dtype, random),
      v(Shape{c.batch, c.seq_kv, c.kv_heads, c.value_dim}, c.dtype, random),
      grad_o(Shape{c.batch, c.seq_q, c.q_heads, c.value_dim}, c.dtype, random),
      grad_q(q.shape, c.unaligned),
      grad_k(k.shape, c.unaligned),
      grad_v(v.shape, c.unaligned),
      row_shape{c.batch, c.q_heads, c.seq_q},
      lse(row_shape),
      delta(row_shape),
      sinks_(index(c.q_heads)) {
  std::normal_distribution<float> normal;
  for (float& sink : sinks_) sink = normal(random);
  clear();
}

AttentionProblem BackwardProblem::host_problem() const {
  AttentionProblem problem;
  problem.q = q.host_view();
  problem.k = k.host_view();
  problem.v = v.host_view();
  problem.mask = {slices, {}};
  problem.scale = 1.0F / std::sqrt(static_cast<float>(c.head_dim));
  problem.soft_cap = c.soft_cap;
  if (c.sinks) problem.sinks = {sinks_.data(), DType::f32, Shape{c.q_heads}};
  return problem;
}

void BackwardProblem::solve() {
  std::vector<double> o = doubles(grad_o.shape);
  lse_ = doubles(row_shape);
  delta_ = doubles(row_shape);
  expected_ = {doubles(q.shape), doubles(k.shape), doubles(v.shape)};
  plain_ = expected_;
  if (row_shape.elements() == 0) return;
  ForwardCall forward;
  forward.problem = host_problem();
  forward.o = {o.data(), DType::f64, grad_o.shape};
  forward.log_sum_exp = {lse_.data(), DType::f64, row_shape};
  attention_forward(forward, "reference");
  for (std::int64_t b = 0, at = 0; b < c.batch; ++b) {
    for (std::int64_t row = 0; row < c.seq_q; ++row) {
      for (std::int64_t h = 0; h < c.q_heads; ++h) {
        double sum = 0.0;
        for (std::int64_t d = 0; d < c.value_dim; ++d, ++at) {
          sum += o[index(at)] * static_cast<double>(grad_o.host[index(at)]);
        }
        delta_[index((b * c.q_heads + h) * c.seq_q + row)] = sum;
      }
    }
  }
  BackwardCall backward;
  backward.problem = forward.problem;
  backward.grad_o = grad_o.host_view();
  backward.log_sum_exp = {lse_.data(), DType::f64, row_shape};
  backward.delta = {delta_.data(), DType::f64, row_shape};
  backward.grad_q = {expected_.q.data(), DType::f64, q.shape};
  backward.grad_k = {expected_.k.data(), DType::f64, k.shape};
  backward.grad_v = {expected_.v.data(), DType::f64, v.shape};
  attention_backward(backward, "reference");
  solve_plain(o);
}

void BackwardProblem::solve_plain(const std::vector<double>& o) {
  const AttentionProblem problem = host_problem();
  const double scale = static_cast<double>(problem.scale);
  const double cap = static_cast<double>(c.soft_cap);
  for (std::int64_t row = 0; row < c.batch * c.seq_q * c.q_heads; ++row) {
    const std::int64_t h = row % c.q_heads;
    const std::int64_t query = row / c.q_heads % c.seq_q;
    const std::int64_t b = row / c.q_heads / c.seq_q;
    const double row_lse = lse_[index((b * c.q_heads + h) * c.seq_q + query)];
    const float* q_row = q.host.data() + row * c.head_dim;
    const float* g_row = grad_o.host.data() + row * c.value_dim;
    double row_delta = 0.0;
    for (std::int64_t d = 0; d < c.value_dim; ++d) {
      row_delta +=
          rounded(o[index(row * c.value_dim + d)], c.dtype) * static_cast<double>(g_row[d]);
    }
    for (std::int64_t key = 0; key < c.seq_kv; ++key) {
      if (!keeps(slices, query, key)) continue;
      const std::int64_t kv_row = (b * c.seq_kv + key) * c.kv_heads + problem.kv_head_of(h);
      const float* k_row = k.host.data() + kv_row * c.head_dim;
      const float* v_row = v.host.data() + kv_row * c.value_dim;
      double score = 0.0;
      double dp = 0.0;
      for (std::int64_t d = 0; d < c.head_dim; ++d) {
        score += static_cast<double>(q_row[d]) * static_cast<double>(k_row[d]);
      }
      for (std::int64_t d = 0; d < c.value_dim; ++d) {
        dp += static_cast<double>(g_row[d]) * static_cast<double>(v_row[d]);
      }
      score = rounded(score * scale, c.dtype);
      double slope = 1.0;
      if (cap > 0.0) {
        const double t = std::tanh(score / cap);
        slope = 1.0 - t * t;
        score = rounded(cap * t, c.dtype);
      }
      const double p = rounded(std::exp(score - row_lse), c.dtype);
      const double ds = rounded(p * (rounded(dp, c.dtype) - row_delta) * slope, c.dtype) * scale;
      for (std::int64_t d = 0; d < c.head_dim; ++d) {
        plain_.q[index(row * c.head_dim + d)] += ds * static_cast<double>(k_row[d]);
        plain_.k[index(kv_row * c.head_dim + d)] += ds * static_cast<double>(q_row[d]);
      }
      for (std::int64_t d = 0; d < c.value_dim; ++d) {
        plain_.v[index(kv_row * c.value_dim + d)] += p * static_cast<double>(g_row[d]);
      }
    }
  }
}

BackwardCall BackwardProblem::call() const {
  BackwardCall call;
  call.problem = host_problem();
  call.problem.q = q.view;
  call.problem.k = k.view;
  call.problem.v = v.view;
  call.problem.sinks = {};  // their share is in the log-sum-exp
  call.grad_o = grad_o.view;
  call.log_sum_exp = lse.view();
  call.delta = delta.view();
  call.grad_q = grad_q.view;
  call.grad_k = grad_k.view;
  call.grad_v = grad_v.view;
  call.deterministic = c.deterministic;
  call.overwrites_kv = c.overwrites_kv;
  return call;
}

void BackwardProblem::clear() const {
  grad_q.clear();
  grad_k.fill(c.overwrites_kv ? NAN : 0.0F);
  grad_v.fill(c.overwrites_kv ? NAN : 0.0F);
}

void BackwardProblem::run() const {
  if (row_shape.elements() > 0) {
    copy(ConstTensorView(lse_.data(), DType::f64, row_shape), lse.view());
    copy(ConstTensorView(delta_.data(), DType::f64, row_shape), delta.view());
  }
  for (int step = 0; step < c.steps; ++step) {
    const Span keys{c.seq_kv * step / c.steps, c.seq_kv * (step + 1) / c.steps};
    std::vector<Slice> part;
    for (const Slice& slice : slices) {
      const Span range = intersect(slice.k, keys);
      if (range.empty()) continue;
      part.push_back({slice.q,
                      {range.begin - keys.begin, range.end - keys.begin},
                      slice.band.shifted(0, keys.begin)});
    }
    BackwardCall of_step = call();
    of_step.problem.mask = {part, {}};
    of_step.problem.k = of_step.problem.k.slice(1, keys);
    of_step.problem.v = of_step.problem.v.slice(1, keys);
    of_step.grad_k = of_step.grad_k.slice(1, keys);
    of_step.grad_v = of_step.grad_v.slice(1, keys);
    attention_backward(of_step, "sm90");
  }
}

std::string BackwardProblem::compare(const DeviceGradient& actual,
                                     const std::vector<double>& expected,
                                     const std::vector<double>& plain, const char* what) const {
  const std::vector<float> values = actual.fetched();
  double worst = 0.0;
  double worst_plain = 0.0;
  double atol = 0.0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double error = std::abs(static_cast<double>(values[i]) - expected[i]);
    if (!(error <= worst)) {
      worst = error;
      at = i;
      if (std::isnan(error)) break;
    }
    worst_plain = std::max(worst_plain, std::abs(rounded(plain[i], c.dtype) - expected[i]));
    const double shifted = rounded(rounded(expected[i] + 0.3, c.dtype) - 0.3, c.dtype);
    atol = std::max(atol, 2.0 * std::abs(shifted - expected[i]));
  }
  const double factor = c.soft_cap > 0.0F ? 3.0 : 2.0;
  if (!actual.padding_untouched()) return fmt::format("{}: padding was written", what);
  if (worst <= factor * worst_plain + atol) return {};
  return fmt::format("{}[{}] = {} for {}: off by {}; accepted: {} * {} + {}", what, at, values[at],
                     expected[at], worst, factor, worst_plain, atol);
}

std::string BackwardProblem::failure() const {
  for (const std::string& reason : {compare(grad_q, expected_.q, plain_.q, "grad_q"),
                                    compare(grad_k, expected_.k, plain_.k, "grad_k"),
                                    compare(grad_v, expected_.v, plain_.v, "grad_v")}) {
    if (!reason.empty()) return reason;
  }
  return {};
}

std::string BackwardProblem::words() const {
  return fmt::format(
      "batch {} q {}x{} kv {}x{} dim {}/{} {} cap {} sinks {} steps {} unaligned {} deterministic "
      "{} overwrites {} slices {}",
      c.batch, c.seq_q, c.q_heads, c.seq_kv, c.kv_heads, c.head_dim, c.value_dim, name(c.dtype),
      c.soft_cap, c.sinks, c.steps, c.unaligned, c.deterministic, c.overwrites_kv, slices.size());
}

}  // namespace annulus
