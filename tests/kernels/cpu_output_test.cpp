#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"
#include "kernels/cpu/targets.hpp"
// clang-format off
#include "hwy/targets.h"
// clang-format on
#include "kernels/random_attention.hpp"

namespace annulus::testing {
namespace {

constexpr std::int64_t kLine = 64;

// O of 1.2 MB, which is written past the caches where its rows are whole lines: the bytes of all
// rows, which lie `offset` bytes behind the start of a line.
std::vector<std::uint8_t> bytes_of_output(DType dtype, std::int64_t head_dim, std::int64_t offset) {
  const std::int64_t seq = std::int64_t{1200000} / (8 * head_dim * size_bytes(dtype));
  const Shape shape{1, seq, 8, head_dim};
  std::mt19937_64 random(test_seed());
  const HostTensor q = random_tensor(random, dtype, shape, 1.0);
  const HostTensor k = random_tensor(random, dtype, shape, 1.0);
  const HostTensor v = random_tensor(random, dtype, shape, 1.0);
  const std::vector<Slice> slices{{{60, seq}, {0, 100}, {}}};
  AttentionProblem problem;
  problem.q = std::as_const(q).view();
  problem.k = k.view();
  problem.v = v.view();
  problem.mask = {slices, {}};
  problem.scale = 0.125F;
  const std::int64_t bytes = shape.elements() * size_bytes(dtype);
  const Buffer buffer(Device::cpu, bytes + kLine);
  auto* data = static_cast<std::uint8_t*>(buffer.data()) + offset;
  std::memset(data, 0x5a, static_cast<std::size_t>(bytes));
  attention_forward(
      {problem, {}, ForwardCall::Start::fresh, TensorView(data, dtype, shape), {}, {}}, "cpu");
  return {data, data + bytes};
}

// The first 60 queries see no key: their rows are zeros.
TEST(CpuOutput, RowsOfWholeLinesHoldTheSameBits) {
  hwy::SetSupportedTargetsForTest(0);
  for (std::int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    hwy::GetChosenTarget().Update(left & -left);
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const std::int64_t head_dim : {64, 96, 128, 72}) {
        const std::vector<std::uint8_t> lines = bytes_of_output(dtype, head_dim, 0);
        EXPECT_TRUE(lines == bytes_of_output(dtype, head_dim, 32))
            << hwy::TargetName(left & -left) << " " << name(dtype) << " D=" << head_dim;
        const std::int64_t empty = 60 * 8 * head_dim * size_bytes(dtype);
        EXPECT_TRUE(std::all_of(lines.begin(), lines.begin() + empty,
                                [](std::uint8_t byte) { return byte == 0; }));
      }
    }
  }
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace
}  // namespace annulus::testing
