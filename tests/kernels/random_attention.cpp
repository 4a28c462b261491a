#include "kernels/random_attention.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <utility>

#include "kernels/element.hpp"

namespace annulus::testing {
namespace {

using Random = std::mt19937_64;

std::int64_t pick(Random& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

bool chance(Random& random, double probability) {
  return std::uniform_real_distribution<double>(0.0, 1.0)(random) < probability;
}

std::int64_t pick_of(Random& random, const std::vector<std::int64_t>& choices) {
  return choices[static_cast<std::size_t>(
      pick(random, 0, static_cast<std::int64_t>(choices.size()) - 1))];
}

// 0, 1, tiles ± 1 of all targets (12 to 48 lanes, 128 keys) and primes.
std::int64_t awkward_length(Random& random) {
  static const std::vector<std::int64_t> lengths{0,   1,   2,   3,   7,   11,  12, 13, 16,
                                                 17,  23,  25,  31,  47,  48,  49, 61, 97,
                                                 127, 128, 129, 149, 191, 255, 257};
  return chance(random, 0.7) ? pick_of(random, lengths) : pick(random, 1, 200);
}

std::int64_t pick_head_dim(Random& random) {
  return chance(random, 0.85) ? 8 * pick(random, 2, 10) : 8 * pick(random, 11, 32);
}

std::vector<std::int64_t> cuts(Random& random, std::int64_t length) {
  std::vector<std::int64_t> points{0, length};
  for (int i = static_cast<int>(pick(random, 0, 2)); i > 0; --i) {
    points.push_back(pick(random, 0, length));
  }
  std::sort(points.begin(), points.end());
  return points;
}

// Disjoint rectangles, each with a band of its own.
std::vector<Slice> random_slices(Random& random, std::int64_t seq_q, std::int64_t seq_kv) {
  std::vector<Slice> slices;
  const std::vector<std::int64_t> rows = cuts(random, seq_q);
  const std::vector<std::int64_t> columns = cuts(random, seq_kv);
  for (std::size_t i = 0; i + 1 < rows.size(); ++i) {
    for (std::size_t j = 0; j + 1 < columns.size(); ++j) {
      if (chance(random, 0.3)) continue;
      Slice slice{{rows[i], rows[i + 1]}, {columns[j], columns[j + 1]}, {}};
      if (chance(random, 0.6)) slice.band.hi = pick(random, -seq_q, seq_kv);
      if (chance(random, 0.3)) slice.band.lo = pick(random, -seq_q, seq_kv);
      slices.push_back(slice);
    }
  }
  return slices;
}

std::vector<Segment> random_segments(Random& random, std::int64_t length) {
  std::vector<Segment> segments;
  const std::vector<std::int64_t> points = cuts(random, length);
  for (std::size_t i = 0; i + 1 < points.size(); ++i) {
    if (points[i] < points[i + 1]) {
      segments.push_back({{points[i], points[i + 1]}, pick(random, -1, 2)});
    }
  }
  return segments;
}

MaskSlices random_mask(Random& random, std::int64_t batch, std::int64_t seq_q,
                       std::int64_t seq_kv) {
  const std::int64_t kind = pick(random, 0, 4);
  if (kind == 0) {
    MaskSlices mask;
    mask.batch_offsets.push_back(0);
    for (std::int64_t b = 0; b < batch; ++b) {
      const std::vector<Slice> row = random_slices(random, seq_q, seq_kv);
      mask.slices.insert(mask.slices.end(), row.begin(), row.end());
      mask.batch_offsets.push_back(static_cast<std::int64_t>(mask.slices.size()));
    }
    return mask;
  }
  AttentionMask mask;
  mask.causal = chance(random, 0.5);
  if (kind == 1) mask.window_left = pick(random, 0, 40);
  if (kind == 1 && chance(random, 0.5)) mask.window_right = pick(random, 0, 40);
  if (kind == 2) {
    for (std::int64_t b = 0; b < batch; ++b) {
      mask.q_segments.push_back(random_segments(random, seq_q));
      mask.kv_segments.push_back(random_segments(random, seq_kv));
    }
  }
  return make_slices(mask, batch, seq_q, seq_kv);
}

std::vector<PositionRun> random_positions(Random& random, std::int64_t length) {
  if (length < 2 || chance(random, 0.4)) return {};
  const std::int64_t half = pick(random, 1, length - 1);
  return {{0, pick(random, 0, 1000)}, {half, pick(random, 2000, 9999)}};
}

HostTensor random_pairs(Random& random, DType dtype, const AttentionProblem& problem, bool mask) {
  const Shape shape{chance(random, 0.5) ? problem.batch() : 1,
                    chance(random, 0.5) ? problem.q_heads() : 1, problem.seq_q(), problem.seq_kv()};
  const std::vector<int> order =
      chance(random, 0.8) ? std::vector<int>{0, 1, 2, 3} : std::vector<int>{1, 0, 3, 2};
  HostTensor tensor(dtype, shape, order, pick(random, 0, 3));
  std::vector<double> values(static_cast<std::size_t>(shape.elements()));
  std::normal_distribution<double> normal(0.0, 1.0);
  for (double& value : values) value = mask ? (chance(random, 0.7) ? 1.0 : 0.0) : normal(random);
  tensor.fill(values);
  return tensor;
}

}  // namespace

HostTensor::HostTensor(DType dtype, const Shape& shape, const std::vector<int>& order,
                       std::int64_t gap)
    : dtype_(dtype), shape_(shape), strides_(shape) {
  std::int64_t stride = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    strides_[*dim] = stride;
    stride *= std::max<std::int64_t>(shape[*dim], 1);
    if (dim == order.rbegin()) stride += gap;
  }
  // A margin on both sides, so that a read or a write past either end meets poison.
  constexpr std::int64_t kMargin = 64;
  bytes_.assign(static_cast<std::size_t>((stride + 2 * kMargin) * size_bytes(dtype)), 0xA5);
  if (!is_floating(dtype)) return;
  for (std::int64_t i = 0; i < stride + 2 * kMargin; ++i) {
    store_element(bytes_.data(), dtype, i, std::numeric_limits<double>::quiet_NaN());
  }
}

TensorView HostTensor::view_at(std::int64_t offset) {
  if (absent()) return {};
  return {bytes_.data() + (64 + offset) * size_bytes(dtype_), dtype_, shape_, strides_};
}

template <typename Visit>
void HostTensor::for_each_offset(Visit visit) const {
  const std::int64_t count = shape_.elements();
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t rest = i;
    std::int64_t offset = 0;
    for (int dim = shape_.rank() - 1; dim >= 0; --dim) {
      offset += rest % shape_[dim] * strides_[dim];
      rest /= shape_[dim];
    }
    visit(i, offset);
  }
}

std::vector<double> HostTensor::values() const {
  std::vector<double> all(static_cast<std::size_t>(shape_.elements()));
  const ConstTensorView from = view();
  for_each_offset([&](std::int64_t i, std::int64_t offset) {
    all[static_cast<std::size_t>(i)] = load_element(from.data, dtype_, offset);
  });
  return all;
}

void HostTensor::fill(const std::vector<double>& values) {
  const TensorView to = view();
  for_each_offset([&](std::int64_t i, std::int64_t offset) {
    store_element(to.data, dtype_, offset, values[static_cast<std::size_t>(i)]);
  });
}

bool HostTensor::margins_intact() const {
  std::vector<bool> inside(bytes_.size(), false);
  const std::int64_t size = size_bytes(dtype_);
  for_each_offset([&](std::int64_t, std::int64_t offset) {
    for (std::int64_t byte = 0; byte < size; ++byte) {
      inside[static_cast<std::size_t>((64 + offset) * size + byte)] = true;
    }
  });
  const HostTensor fresh(dtype_, Shape{1}, {0}, 0);
  for (std::size_t i = 0; i < bytes_.size(); ++i) {
    if (!inside[i] && bytes_[i] != fresh.bytes_[i % static_cast<std::size_t>(size)]) return false;
  }
  return true;
}

HostTensor random_tensor(std::mt19937_64& random, DType dtype, const Shape& shape, double spread) {
  static const std::vector<std::vector<int>> orders{{0, 1, 2, 3}, {0, 2, 1, 3}, {2, 0, 1, 3}};
  HostTensor tensor(dtype, shape, orders[static_cast<std::size_t>(pick(random, 0, 2))],
                    pick(random, 0, 1) * pick(random, 1, 9));
  std::vector<double> values(static_cast<std::size_t>(shape.elements()));
  std::normal_distribution<double> normal(0.0, spread);
  for (double& value : values) value = normal(random);
  tensor.fill(values);
  return tensor;
}

RandomAttention::RandomAttention(std::uint64_t seed) {
  Random random(seed);
  const DType dtype = std::array{DType::f32, DType::f32, DType::bf16,
                                 DType::f16}[static_cast<std::size_t>(pick(random, 0, 3))];
  const std::int64_t head_dim = pick_head_dim(random);
  const std::int64_t value_dim = chance(random, 0.7) ? head_dim : pick_head_dim(random);
  const std::int64_t kv_heads = pick(random, 1, 3);
  const std::int64_t group = pick_of(random, {1, 1, 2, 3, 4, 8});
  const bool part_of_group = chance(random, 0.2);
  const std::int64_t offset = part_of_group ? pick(random, 0, group - 1) : 0;
  const std::int64_t q_heads =
      part_of_group ? pick(random, 1, kv_heads * group - offset) : kv_heads * group;
  std::int64_t batch = pick(random, 1, 3);
  std::int64_t seq_q = awkward_length(random);
  std::int64_t seq_kv = awkward_length(random);
  while (batch * q_heads * seq_q * seq_kv * (head_dim + value_dim) > 2'000'000) {
    if (batch > 1)
      batch = 1;
    else if (seq_q > seq_kv && seq_q > 60)
      seq_q /= 2;
    else if (seq_kv > 60)
      seq_kv /= 2;
    else
      break;
  }
  q = random_tensor(random, dtype, Shape{batch, seq_q, q_heads, head_dim}, 1.0);
  k = random_tensor(random, dtype, Shape{batch, seq_kv, kv_heads, head_dim}, 1.0);
  v = random_tensor(random, dtype, Shape{batch, seq_kv, kv_heads, value_dim}, 1.0);
  grad_o = random_tensor(random, dtype, Shape{batch, seq_q, q_heads, value_dim}, 1.0);
  problem.q = std::as_const(q).view();
  problem.k = std::as_const(k).view();
  problem.v = std::as_const(v).view();
  problem.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  if (chance(random, 0.15)) problem.scale *= chance(random, 0.5) ? -1.0F : 4.0F;
  if (chance(random, 0.03)) problem.scale = 0.0F;
  if (part_of_group) problem.groups = {group, offset};
  slices = random_mask(random, batch, seq_q, seq_kv);
  problem.mask = slices.view();
  if (chance(random, 0.2)) {
    problem.soft_cap = chance(random, 0.5) ? 2.0F : 30.0F;
    rule_factor = 3.0;
  }
  if (chance(random, 0.2)) sinks = random_tensor(random, DType::f32, Shape{q_heads, 1, 1, 1}, 1.0);
  if (!sinks.absent()) {
    const ConstTensorView all = std::as_const(sinks).view();
    problem.sinks = {all.data, DType::f32, Shape{q_heads}, Shape{all.strides[0]}};
  }
  if (chance(random, 0.2)) {
    bias = random_pairs(random, chance(random, 0.6) ? DType::f32 : dtype, problem, false);
    problem.bias = std::as_const(bias).view();
  }
  if (chance(random, 0.2)) {
    dense_mask = random_pairs(random, DType::u8, problem, true);
    problem.dense_mask = std::as_const(dense_mask).view();
  }
  if (chance(random, 0.2)) {
    q_positions = random_positions(random, seq_q);
    k_positions = random_positions(random, seq_kv);
    problem.dropout = {0.3F,        random(),   pick(random, 0, 9), pick(random, 0, 9),
                       q_positions, k_positions};
  }
  description = fmt::format(
      "problem {}: {} q {} k {} value_dim {} slices {} scale {} cap {} offset {} group {} sinks {} "
      "bias {} dense {} dropout {}",
      seed, name(dtype), problem.q.shape.to_string(), problem.k.shape.to_string(), value_dim,
      slices.slices.size(), problem.scale, problem.soft_cap, offset, group, !sinks.absent(),
      bias.absent() ? "none" : problem.bias.shape.to_string(),
      dense_mask.absent() ? "none" : problem.dense_mask.shape.to_string(),
      problem.dropout.probability);
}

std::uint64_t test_seed() {
  static const std::uint64_t seed = [] {
    const char* given = std::getenv("ANNULUS_TEST_SEED");
    const std::uint64_t chosen =
        given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
    fmt::print("ANNULUS_TEST_SEED={}\n", chosen);
    return chosen;
  }();
  return seed;
}

}  // namespace annulus::testing
