#include "launch/sampled_rows.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kernels/attention_reference.hpp"
#include "launch/attention_cut.hpp"

namespace annulus::launch {
namespace {

std::vector<std::int64_t> sample_indices(std::int64_t size, std::int64_t count,
                                         std::mt19937_64& random) {
  std::vector<std::int64_t> indices(static_cast<std::size_t>(size));
  std::iota(indices.begin(), indices.end(), std::int64_t{0});
  if (count >= size) return indices;
  std::vector<std::int64_t> sampled = {0, size - 1};
  std::uniform_int_distribution<std::int64_t> any(0, size - 1);
  while (static_cast<std::int64_t>(sampled.size()) < count) sampled.push_back(any(random));
  std::sort(sampled.begin(), sampled.end());
  sampled.erase(std::unique(sampled.begin(), sampled.end()), sampled.end());
  return sampled;
}

}  // namespace

std::vector<RowSample> sample_rows(const Shape& shape, const SampleSize& size) {
  std::mt19937_64 random(size.seed);
  std::vector<RowSample> samples;
  for (std::int64_t b = 0; b < shape[0]; ++b) {
    for (std::int64_t h = 0; h < shape[2]; ++h) samples.push_back({b, h, {}});
  }
  if (samples.size() > size.most_heads) {
    std::shuffle(samples.begin(), samples.end(), random);
    samples.resize(size.most_heads);
  }
  const double work_of_all = static_cast<double>(samples.size()) * size.row_work;
  const auto rows = static_cast<std::int64_t>(std::ceil(size.work / std::max(work_of_all, 1.0)));
  for (RowSample& sample : samples) {
    sample.rows = sample_indices(shape[1], std::max<std::int64_t>(rows, 2), random);
  }
  return samples;
}

AttentionCut row_cut(const Checkpoint& checkpoint, const RowSample& sample) {
  const std::int64_t seq_kv = checkpoint.shape(CheckpointField::key)[1];
  return {sample.batch, sample.head, single_rows(sample.rows), {{0, seq_kv}}};
}

DoubleRows recompute(const CutAttention& cut) {
  ForwardCall call;
  call.problem = cut.problem();
  const std::int64_t rows = call.problem.seq_q();
  const std::int64_t value_dim = call.problem.value_dim();
  DoubleRows result;
  result.outputs.resize(static_cast<std::size_t>(rows * value_dim));
  result.log_sum_exp.resize(static_cast<std::size_t>(rows));
  call.o = {result.outputs.data(), DType::f64, Shape{1, rows, 1, value_dim}};
  call.log_sum_exp = {result.log_sum_exp.data(), DType::f64, Shape{1, 1, rows}};
  kernels::reference::forward(call);
  return result;
}

}  // namespace annulus::launch
