#include "kernels/decode_case.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "kernels/buffer.hpp"
#include "kernels/element.hpp"
#include "kernels/plain_attention.hpp"

namespace annulus::testing {
namespace {

using Random = std::mt19937_64;

HostTensor poisoned(DType dtype, const Shape& shape) {
  std::vector<int> order(static_cast<std::size_t>(shape.rank()));
  std::iota(order.begin(), order.end(), 0);
  return {dtype, shape, order, 0};
}

HostTensor normal(Random& random, DType dtype, const Shape& shape) {
  HostTensor tensor = poisoned(dtype, shape);
  std::normal_distribution<double> distribution;
  std::vector<double> values(static_cast<std::size_t>(shape.elements()));
  for (double& value : values) value = distribution(random);
  tensor.fill(values);
  return tensor;
}

// Columns [0, columns) of a [.., dim] view.
ConstTensorView columns(const ConstTensorView& view, std::int64_t count) {
  return view.slice(view.rank() - 1, {0, count});
}

ConstTensorView integers(const std::vector<std::int32_t>& values, const Shape& shape) {
  return {values.data(), DType::i32, shape};
}

// The kept pairs of one sequence, rows and keys counted from 0.
std::vector<Slice> slices_of(const DecodeOptions& options, const DecodeSequence& sequence) {
  const std::int64_t shift = sequence.length - sequence.rows;
  Slice slice{{0, sequence.rows}, {sequence.start, sequence.length}, {}};
  if (options.causal) slice.band.hi = shift;
  if (options.window_right >= 0) {
    slice.band.hi = std::min(slice.band.hi, shift + std::min(options.window_right, kUnbounded));
  }
  if (options.window_left >= 0) slice.band.lo = shift - options.window_left;
  return {slice};
}

double worst_error(const std::vector<double>& x, const std::vector<double>& reference) {
  double worst = 0.0;
  for (std::size_t i = 0; i < reference.size(); ++i) {
    const double error = x[i] == reference[i] ? 0.0 : std::abs(x[i] - reference[i]);
    worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
  }
  return worst;
}

double rounded(DType dtype, double value) {
  std::uint64_t place = 0;
  store_element(&place, dtype, 0, value);
  return load_element(&place, dtype, 0);
}

// 2·max|(ref + 0.3) − 0.3 − ref| in the dtype, and eight roundings in f32 of the largest value.
double absolute_tolerance(const std::vector<double>& reference, DType dtype) {
  double worst = 0.0;
  double largest = 1.0;
  for (const double value : reference) {
    if (std::isinf(value)) continue;
    largest = std::max(largest, std::abs(value));
    const double there = rounded(dtype, rounded(dtype, value) + 0.3);
    worst = std::max(worst, std::abs(rounded(dtype, there - 0.3) - value));
  }
  return 2.0 * worst + 8.0 * 0x1p-24 * largest;
}

void expect_close(const char* what, const std::vector<double>& x,
                  const std::vector<double>& reference, const std::vector<double>& plain,
                  DType dtype, double factor) {
  ASSERT_EQ(x.size(), reference.size());
  const double plain_error = worst_error(plain, reference);
  EXPECT_LE(worst_error(x, reference), factor * plain_error + absolute_tolerance(reference, dtype))
      << what << ": plain attention's error is " << plain_error;
}

}  // namespace

std::int64_t DecodeOptions::longest() const {
  std::int64_t most = 1;
  for (const DecodeSequence& sequence : sequences) most = std::max(most, sequence.length);
  return most;
}

std::int64_t DecodeOptions::tokens() const {
  std::int64_t all = 0;
  for (const DecodeSequence& sequence : sequences) all += sequence.rows;
  return all;
}

std::string DecodeOptions::to_string() const {
  std::string text = fmt::format("{} heads {}:{} dim {}/{}{}", name(dtype), q_heads, kv_heads,
                                 head_dim, value_dim, latent ? " latent" : "");
  if (!causal) text += " full";
  if (window_left >= 0 || window_right >= 0) {
    text += fmt::format(" window {},{}", window_left, window_right);
  }
  if (soft_cap > 0.0F) text += fmt::format(" cap {}", soft_cap);
  if (sinks) text += " sinks";
  for (const DecodeSequence& sequence : sequences) {
    text += fmt::format(" ({}, {}+{})", sequence.rows, sequence.start,
                        sequence.length - sequence.start);
  }
  return text;
}

DecodeCase::DecodeCase(DecodeOptions options_, std::uint64_t seed) : options(std::move(options_)) {
  Random random(seed);
  const auto sequences = static_cast<std::int64_t>(options.sequences.size());
  const Shape keys{sequences, options.longest(), options.kv_heads, options.head_dim};
  const Shape values{sequences, options.longest(), options.kv_heads, options.value_dim};
  q = normal(random, options.dtype, Shape{options.tokens(), options.q_heads, options.head_dim});
  k = normal(random, options.dtype, keys);
  if (!options.latent) v = normal(random, options.dtype, values);
  if (options.sinks) sinks = normal(random, DType::f32, Shape{options.q_heads});
  attend();
}

void DecodeCase::attend() {
  const std::int64_t dim = options.value_dim;
  const std::int64_t tokens = options.tokens();
  for (auto* rows : {&o, &plain_o}) {
    rows->resize(static_cast<std::size_t>(tokens * options.q_heads * dim));
  }
  for (auto* statistics : {&log_sum_exp, &plain_log_sum_exp}) {
    statistics->resize(static_cast<std::size_t>(tokens * options.q_heads));
  }
  std::int64_t token = 0;
  for (std::size_t s = 0; s < options.sequences.size(); ++s) {
    const DecodeSequence& sequence = options.sequences[s];
    if (sequence.rows == 0) continue;
    const auto row = static_cast<std::int64_t>(s);
    const auto dense = [&](const HostTensor& tensor, std::int64_t count) {
      return columns(tensor.view().slice(0, {row, row + 1}).slice(1, {0, sequence.length}), count);
    };
    AttentionProblem problem;
    const ConstTensorView queries =
        std::as_const(q).view().slice(0, {token, token + sequence.rows});
    problem.q = {queries.data, queries.dtype,
                 Shape{1, sequence.rows, options.q_heads, options.head_dim}};
    problem.k = dense(k, options.head_dim);
    problem.v = dense(options.latent ? k : v, dim);
    const std::vector<Slice> slices = slices_of(options, sequence);
    problem.mask = {slices, {}};
    problem.scale =
        static_cast<float>(options.spread / std::sqrt(static_cast<double>(options.head_dim)));
    problem.soft_cap = options.soft_cap;
    if (options.sinks) problem.sinks = std::as_const(sinks).view();
    const Shape outputs{1, sequence.rows, options.q_heads, dim};
    const Shape statistics{1, options.q_heads, sequence.rows};
    HostTensor out = poisoned(DType::f64, outputs);
    HostTensor lse = poisoned(DType::f64, statistics);
    attention_forward({problem, {}, ForwardCall::Start::fresh, out.view(), lse.view(), {}},
                      "reference");
    const std::vector<double> zeros(static_cast<std::size_t>(outputs.elements()), 0.0);
    HostTensor no_gradient = poisoned(options.dtype, outputs);
    no_gradient.fill(zeros);
    const PlainAttention plain =
        plain_attention(problem, std::as_const(no_gradient).view(), lse.values(), zeros);
    const auto at = static_cast<std::ptrdiff_t>(token * options.q_heads * dim);
    std::ranges::copy(out.values(), o.begin() + at);
    std::ranges::copy(plain.o, plain_o.begin() + at);
    for (std::int64_t h = 0; h < options.q_heads; ++h) {
      const auto from = static_cast<std::ptrdiff_t>(h * sequence.rows);
      const auto to = static_cast<std::ptrdiff_t>(h * tokens + token);
      std::copy_n(lse.values().begin() + from, sequence.rows, log_sum_exp.begin() + to);
      std::copy_n(plain.log_sum_exp.begin() + from, sequence.rows, plain_log_sum_exp.begin() + to);
    }
    token += sequence.rows;
  }
}

PagedCache DecodeCase::paged(const CacheDeal& deal, std::int64_t page_size,
                             std::uint64_t seed) const {
  Random random(seed);
  PagedCache cache;
  std::int64_t used = 0;
  cache.query_begin.push_back(0);
  for (const DecodeSequence& sequence : options.sequences) {
    const std::int64_t pages = (deal.tokens(sequence.length) + page_size - 1) / page_size;
    cache.max_pages = std::max(cache.max_pages, pages);
    used += pages;
    cache.lengths.push_back(static_cast<std::int32_t>(sequence.length));
    cache.starts.push_back(static_cast<std::int32_t>(sequence.start));
    cache.query_begin.push_back(cache.query_begin.back() +
                                static_cast<std::int32_t>(sequence.rows));
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(used + 3));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  const auto count = static_cast<std::int64_t>(order.size());
  cache.k = poisoned(options.dtype, Shape{count, page_size, options.kv_heads, options.head_dim});
  if (!options.latent) {
    cache.v = poisoned(options.dtype, Shape{count, page_size, options.kv_heads, options.value_dim});
  }
  // Entries without a page are no page's number.
  cache.page_table.assign(options.sequences.size() * static_cast<std::size_t>(cache.max_pages), -7);
  std::size_t next = 0;
  for (std::size_t s = 0; s < options.sequences.size(); ++s) {
    const auto row = static_cast<std::int64_t>(s);
    const std::int64_t tokens = deal.tokens(options.sequences[s].length);
    for (std::int64_t token = 0; token < tokens; ++token) {
      std::int32_t& page = cache.page_table[s * static_cast<std::size_t>(cache.max_pages) +
                                            static_cast<std::size_t>(token / page_size)];
      if (token % page_size == 0) page = order[next++];
      const std::int64_t position = deal.position(token);
      if (position < options.sequences[s].start) continue;
      const auto put = [&](const HostTensor& from, HostTensor& to) {
        const std::int64_t slot = token % page_size;
        copy(from.view().slice(0, {row, row + 1}).slice(1, {position, position + 1}),
             to.view().slice(0, {page, page + 1}).slice(1, {slot, slot + 1}));
      };
      put(k, cache.k);
      if (!options.latent) put(v, cache.v);
    }
  }
  return cache;
}

DecodeProblem PagedCache::problem(const DecodeCase& of, const CacheDeal& deal) const {
  const auto sequences = static_cast<std::int64_t>(lengths.size());
  DecodeProblem problem;
  problem.q = of.q.view();
  problem.query_begin = integers(query_begin, Shape{sequences + 1});
  problem.k = k.view();
  problem.v = of.options.latent ? columns(k.view(), of.options.value_dim) : v.view();
  problem.page_table = integers(page_table, Shape{sequences, max_pages});
  problem.lengths = integers(lengths, Shape{sequences});
  problem.starts = integers(starts, Shape{sequences});
  problem.deal = deal;
  problem.scale =
      static_cast<float>(of.options.spread / std::sqrt(static_cast<double>(of.options.head_dim)));
  problem.soft_cap = of.options.soft_cap;
  problem.causal = of.options.causal;
  problem.window_left = of.options.window_left;
  problem.window_right = of.options.window_right;
  if (of.options.sinks) problem.sinks = of.sinks.view();
  return problem;
}

void DecodeCase::expect(const std::vector<double>& o_,
                        const std::vector<double>& log_sum_exp_) const {
  const double factor = options.soft_cap > 0.0F ? 3.0 : 2.0;
  expect_close("O", o_, o, plain_o, options.dtype, factor);
  expect_close("LSE", log_sum_exp_, log_sum_exp, plain_log_sum_exp, DType::f32, factor);
}

void expect_decode(const DecodeCase& expected, const DecodeProblem& problem,
                   std::string_view backend) {
  HostTensor o(expected.options.dtype,
               Shape{problem.tokens(), problem.q_heads(), problem.value_dim()}, {0, 1, 2}, 5);
  HostTensor lse(DType::f32, Shape{problem.q_heads(), problem.tokens()}, {1, 0}, 3);
  decode_forward({problem, {}, o.view(), lse.view(), {}}, backend);
  expected.expect(o.values(), lse.values());
  EXPECT_TRUE(o.margins_intact());
  EXPECT_TRUE(lse.margins_intact());
}

}  // namespace annulus::testing
