#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/decode_attention.hpp"
#include "launch/bench_decode.hpp"

namespace annulus::launch {

/// All that one decode call of `annulus bench decode` works on, on either device: random values,
/// one query token a sequence, pages in random order.
class DecodeCase {
 public:
  /// `cache`: contiguous, paged or mla. The cache holds this rank's tokens of a deal.
  DecodeCase(Device device, const DecodeBenchOptions& options, std::string_view cache,
             const DecodeShape& shape, const CacheDeal& deal = {});

  const DecodeProblem& problem() const { return problem_; }
  TensorView o() const { return o_; }
  TensorView log_sum_exp() const { return log_sum_exp_; }
  /// Of this rank's keys and values.
  std::int64_t cache_bytes() const { return cache_bytes_; }
  double flops() const;
  BenchRow row(std::string_view name) const;

 private:
  TensorView tensor(DType dtype, const Shape& shape);
  TensorView random(DType dtype, const Shape& shape);
  ConstTensorView integers(const std::vector<std::int32_t>& values, const Shape& shape);

  Device device_;
  DecodeShape shape_;
  std::string cache_;
  std::vector<Buffer> buffers_;
  std::mt19937 engine_{2024};
  DecodeProblem problem_;
  TensorView o_;
  TensorView log_sum_exp_;
  std::int64_t cache_bytes_ = 0;
};

}  // namespace annulus::launch
