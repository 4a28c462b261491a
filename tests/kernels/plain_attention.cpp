#include "kernels/plain_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/element.hpp"
#include "kernels/philox.hpp"

namespace annulus::testing {
namespace {

float rounded(DType dtype, float value) {
  if (dtype == DType::bf16) return bf16_to_float(float_to_bf16(value));
  if (dtype == DType::f16) return f16_to_float(float_to_f16(value));
  return value;
}

// A [batch, seq, heads, dim] view as plain floats.
struct Rows {
  std::vector<float> data;
  std::int64_t seq, heads, dim;

  explicit Rows(const ConstTensorView& view)
      : seq(view.shape[1]), heads(view.shape[2]), dim(view.shape[3]) {
    for (std::int64_t b = 0; b < view.shape[0]; ++b)
      for (std::int64_t s = 0; s < seq; ++s)
        for (std::int64_t h = 0; h < heads; ++h)
          for (std::int64_t d = 0; d < dim; ++d)
            data.push_back(static_cast<float>(
                load_element(view.data, view.dtype,
                             b * view.strides[0] + s * view.strides[1] + h * view.strides[2] + d)));
  }
  std::size_t at(std::int64_t b, std::int64_t s, std::int64_t h) const {
    return static_cast<std::size_t>(((b * seq + s) * heads + h) * dim);
  }
};

float dot(const Rows& a, std::size_t a_at, const Rows& b, std::size_t b_at) {
  float sum = 0.0F;
  for (std::int64_t d = 0; d < a.dim; ++d) {
    const auto i = static_cast<std::size_t>(d);
    sum += a.data[a_at + i] * b.data[b_at + i];
  }
  return sum;
}

std::int64_t pair_offset(const ConstTensorView& view, std::int64_t b, std::int64_t h,
                         std::int64_t q, std::int64_t k) {
  return (view.shape[0] == 1 ? 0 : b) * view.strides[0] +
         (view.shape[1] == 1 ? 0 : h) * view.strides[1] + q * view.strides[2] + k * view.strides[3];
}

bool kept(const AttentionProblem& problem, std::int64_t b, std::int64_t h, std::int64_t q,
          std::int64_t k) {
  const auto slices = problem.mask.of_batch(b);
  const bool inside = std::any_of(slices.begin(), slices.end(),
                                  [&](const Slice& slice) { return slice.keeps(q, k); });
  const ConstTensorView& dense = problem.dense_mask;
  return inside &&
         (!dense || load_element(dense.data, dense.dtype, pair_offset(dense, b, h, q, k)) != 0.0);
}

std::int64_t global(std::span<const PositionRun> runs, std::int64_t local) {
  std::int64_t position = local;
  for (const PositionRun& run : runs) {
    if (run.local_begin <= local) position = run.global_begin + (local - run.local_begin);
  }
  return position;
}

float dropout_factor(const Dropout& dropout, std::int64_t b, std::int64_t h, std::int64_t q,
                     std::int64_t k) {
  if (dropout.probability <= 0.0F) return 1.0F;
  const bool keeps = dropout_keeps(dropout.seed, dropout_threshold(dropout.probability),
                                   b + dropout.batch_begin, h + dropout.q_head_begin,
                                   global(dropout.q_positions, q), global(dropout.k_positions, k));
  return keeps ? 1.0F / (1.0F - dropout.probability) : 0.0F;
}

struct Pair {
  std::int64_t k;
  float logit;
  float slope;
  float largest;  // of what the logit was on its way
  float p = 0.0F;
};

std::vector<Pair> logits(const AttentionProblem& problem, const Rows& q_rows, const Rows& k_rows,
                         std::int64_t b, std::int64_t h, std::int64_t q) {
  std::vector<Pair> pairs;
  const DType dtype = problem.q.dtype;
  for (std::int64_t k = 0; k < problem.seq_kv(); ++k) {
    if (!kept(problem, b, h, q, k)) continue;
    const float raw =
        dot(q_rows, q_rows.at(b, q, h), k_rows, k_rows.at(b, k, problem.kv_head_of(h)));
    Pair pair{k, rounded(dtype, problem.scale * raw), 1.0F, std::abs(problem.scale * raw)};
    if (problem.soft_cap > 0.0F) {
      const float t = std::tanh(pair.logit / problem.soft_cap);
      pair.logit = rounded(dtype, problem.soft_cap * t);
      pair.slope = 1.0F - t * t;
    }
    if (problem.bias) {
      const double bias = load_element(problem.bias.data, problem.bias.dtype,
                                       pair_offset(problem.bias, b, h, q, k));
      pair.logit = rounded(dtype, pair.logit + static_cast<float>(bias));
      pair.largest = std::max(pair.largest, std::abs(pair.logit));
    }
    pairs.push_back(pair);
  }
  return pairs;
}

// Fills p of each pair and returns the log-sum-exp.
float softmax(const AttentionProblem& problem, std::int64_t h, std::vector<Pair>& pairs) {
  float max = -std::numeric_limits<float>::infinity();
  float sink = max;
  if (problem.sinks) {
    sink = static_cast<const float*>(problem.sinks.data)[h * problem.sinks.strides[0]];
    max = sink;
  }
  for (const Pair& pair : pairs) max = std::max(max, pair.logit);
  if (max == -std::numeric_limits<float>::infinity()) return max;
  float sum = problem.sinks ? std::exp(sink - max) : 0.0F;
  for (Pair& pair : pairs) sum += pair.p = std::exp(pair.logit - max);
  for (Pair& pair : pairs) pair.p = rounded(problem.q.dtype, pair.p / sum);
  return max + std::log(sum);
}

}  // namespace

PlainAttention plain_attention(const AttentionProblem& problem, ConstTensorView grad_o,
                               std::span<const double> lse, std::span<const double> delta) {
  const DType dtype = problem.q.dtype;
  const Rows q_rows(problem.q), k_rows(problem.k), v_rows(problem.v), o_rows(grad_o);
  PlainAttention plain;
  std::vector<float> dq(q_rows.data.size()), dk(k_rows.data.size()), dv(v_rows.data.size());
  std::vector<float> o(o_rows.data.size());
  plain.log_sum_exp.resize(
      static_cast<std::size_t>(problem.batch() * problem.q_heads() * problem.seq_q()));
  std::vector<float> db(static_cast<std::size_t>(problem.bias ? problem.bias.shape.elements() : 0));
  const auto each = [](std::int64_t n, auto body) {
    for (std::int64_t d = 0; d < n; ++d) body(static_cast<std::size_t>(d));
  };
  for (std::int64_t b = 0; b < problem.batch(); ++b)
    for (std::int64_t h = 0; h < problem.q_heads(); ++h)
      for (std::int64_t q = 0; q < problem.seq_q(); ++q) {
        std::vector<Pair> pairs = logits(problem, q_rows, k_rows, b, h, q);
        const auto row =
            static_cast<std::size_t>((b * problem.q_heads() + h) * problem.seq_q() + q);
        plain.log_sum_exp[row] = static_cast<double>(softmax(problem, h, pairs));
        const std::int64_t kv = problem.kv_head_of(h);
        const std::size_t q_at = q_rows.at(b, q, h), o_at = o_rows.at(b, q, h);
        for (const Pair& pair : pairs) {
          plain.largest_logit = std::max(plain.largest_logit, static_cast<double>(pair.largest));
          const float weight =
              rounded(dtype, pair.p * dropout_factor(problem.dropout, b, h, q, pair.k));
          const std::size_t v_at = v_rows.at(b, pair.k, kv);
          each(v_rows.dim, [&](std::size_t d) { o[o_at + d] += weight * v_rows.data[v_at + d]; });
        }
        each(v_rows.dim, [&](std::size_t d) { o[o_at + d] = rounded(dtype, o[o_at + d]); });
        for (const Pair& pair : pairs) {
          const std::size_t k_at = k_rows.at(b, pair.k, kv);
          const float dp = rounded(dtype, dot(o_rows, o_at, v_rows, v_rows.at(b, pair.k, kv)));
          const float factor = dropout_factor(problem.dropout, b, h, q, pair.k);
          plain.largest_term =
              std::max({plain.largest_term, std::abs(static_cast<double>(dp * factor)),
                        std::abs(delta[row])});
          const float p = rounded(dtype, std::exp(pair.logit - static_cast<float>(lse[row])));
          const std::size_t v_at = v_rows.at(b, pair.k, kv);
          each(v_rows.dim, [&](std::size_t d) {
            dv[v_at + d] += rounded(dtype, p * factor) * o_rows.data[o_at + d];
          });
          const float ds = rounded(dtype, p * (dp * factor - static_cast<float>(delta[row])));
          if (problem.bias) {
            const ConstTensorView& bias = problem.bias;
            const std::int64_t at =
                (((bias.shape[0] == 1 ? 0 : b) * bias.shape[1] + (bias.shape[1] == 1 ? 0 : h)) *
                     bias.shape[2] +
                 q) *
                    bias.shape[3] +
                pair.k;
            db[static_cast<std::size_t>(at)] += ds;
          }
          const float grad = rounded(dtype, ds * pair.slope) * problem.scale;
          each(q_rows.dim, [&](std::size_t d) {
            dq[q_at + d] += grad * k_rows.data[k_at + d];
            dk[k_at + d] += grad * q_rows.data[q_at + d];
          });
        }
      }
  plain.o.assign(o.begin(), o.end());
  plain.grad_q.assign(dq.begin(), dq.end());
  plain.grad_k.assign(dk.begin(), dk.end());
  plain.grad_v.assign(dv.begin(), dv.end());
  plain.grad_bias.assign(db.begin(), db.end());
  return plain;
}

}  // namespace annulus::testing
