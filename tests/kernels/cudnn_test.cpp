#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/cudnn_support.hpp"
#include "kernels/error.hpp"

// The vendor library behind our interface, held against the double reference by FlashAttention's
// rule. Needs a GPU: build/test_kernels --gtest_filter='Cudnn*'
namespace annulus {
namespace {

struct Case {
  const char* what;
  std::int64_t seq_q, seq_kv, q_heads, kv_heads, head_dim;
  bool causal;
  std::int64_t window_left;
  bool sinks;
};

constexpr Case kCases[] = {
    {"full", 128, 128, 4, 4, 64, false, -1, false},
    {"causal", 256, 256, 4, 2, 128, true, -1, false},
    {"bottom-right", 100, 333, 6, 2, 64, true, -1, false},
    {"window", 200, 200, 2, 1, 64, true, 37, false},
    {"sinks", 130, 130, 4, 2, 64, true, -1, true},
};

std::vector<float> random_values(std::mt19937& random, std::int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// Values rounded to `dtype` on the device, and the rounded values back in `values`.
Buffer upload(std::vector<float>& values, const Shape& shape, DType dtype) {
  Buffer memory(Device::cuda, shape.elements() * size_bytes(dtype));
  const TensorView device(memory.data(), dtype, shape, Device::cuda);
  copy(ConstTensorView(values.data(), DType::f32, shape), device);
  copy(device, TensorView(values.data(), DType::f32, shape));
  return memory;
}

std::vector<double> reference(AttentionProblem problem, const Shape& o_shape,
                              std::vector<double>& lse) {
  std::vector<double> o(static_cast<std::size_t>(o_shape.elements()));
  ForwardCall call;
  call.problem = problem;
  call.o = {o.data(), DType::f64, o_shape};
  call.log_sum_exp = {lse.data(), DType::f64, Shape{o_shape[0], o_shape[2], o_shape[1]}};
  attention_forward(call, "reference");
  return o;
}

void run(const Case& c, DType dtype, std::mt19937& random) {
  SCOPED_TRACE(c.what);
  const Shape q_shape{2, c.seq_q, c.q_heads, c.head_dim};
  const Shape k_shape{2, c.seq_kv, c.kv_heads, c.head_dim};
  const Shape lse_shape{2, c.q_heads, c.seq_q};
  std::vector<float> q = random_values(random, q_shape.elements());
  std::vector<float> k = random_values(random, k_shape.elements());
  std::vector<float> v = random_values(random, k_shape.elements());
  std::vector<float> sinks = random_values(random, c.q_heads);
  const Buffer q_device = upload(q, q_shape, dtype);
  const Buffer k_device = upload(k, k_shape, dtype);
  const Buffer v_device = upload(v, k_shape, dtype);
  const Buffer sinks_device = upload(sinks, Shape{c.q_heads}, DType::f32);
  AttentionMask mask;
  mask.causal = c.causal;
  mask.window_left = c.window_left;
  const MaskSlices slices = make_slices(mask, 2, c.seq_q, c.seq_kv);

  AttentionProblem host;
  host.q = {q.data(), DType::f32, q_shape};
  host.k = {k.data(), DType::f32, k_shape};
  host.v = {v.data(), DType::f32, k_shape};
  if (c.sinks) host.sinks = {sinks.data(), DType::f32, Shape{c.q_heads}};
  host.mask = slices.view();
  host.scale = 1.0F / std::sqrt(static_cast<float>(c.head_dim));
  std::vector<double> lse(static_cast<std::size_t>(lse_shape.elements()));
  const std::vector<double> expected = reference(host, q_shape, lse);

  ForwardCall call;
  call.problem = host;
  call.problem.q = {q_device.data(), dtype, q_shape, Device::cuda};
  call.problem.k = {k_device.data(), dtype, k_shape, Device::cuda};
  call.problem.v = {v_device.data(), dtype, k_shape, Device::cuda};
  if (c.sinks) {
    call.problem.sinks = {sinks_device.data(), DType::f32, Shape{c.q_heads}, Device::cuda};
  }
  const Buffer o(Device::cuda, q_shape.elements() * 4);
  const Buffer lse_device(Device::cuda, lse_shape.elements() * 4);
  fill_bytes(o.data(), Device::cuda, 0xff, o.bytes());
  call.o = {o.data(), DType::f32, q_shape, Device::cuda};
  call.log_sum_exp = {lse_device.data(), DType::f32, lse_shape, Device::cuda};
  attention_forward(call, "cudnn");
  std::vector<float> actual(expected.size());
  std::vector<float> actual_lse(lse.size());
  copy(call.o, TensorView(actual.data(), DType::f32, q_shape));
  copy(call.log_sum_exp, TensorView(actual_lse.data(), DType::f32, lse_shape));
  // P and O are rounded to `dtype`, half a unit in the last place each, at |O| <= max |V|.
  const double unit = dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  const float largest = std::abs(*std::max_element(
      v.begin(), v.end(), [](float a, float b) { return std::abs(a) < std::abs(b); }));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(actual[i]), expected[i], 2.0 * unit * largest) << i;
  }
  for (std::size_t i = 0; i < lse.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(actual_lse[i]), lse[i], 1e-4) << i;
  }
}

TEST(Cudnn, MatchesTheReference) {
  if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no GPU here";
  if (kernels::cudnn::backends().empty()) GTEST_SKIP() << "built without cuDNN";
  std::mt19937 random(31);
  for (const Case& c : kCases) {
    for (const DType dtype : {DType::bf16, DType::f16}) run(c, dtype, random);
  }
}

TEST(Cudnn, RefusesByNameWhatItCannotDo) {
  if (kernels::cudnn::backends().empty()) GTEST_SKIP() << "built without cuDNN";
  const AttentionBackend& cudnn = kernels::cudnn::backends().front();
  alignas(16) std::uint16_t data[8] = {};
  AttentionProblem problem;
  problem.q = {data, DType::bf16, Shape{1, 64, 4, 64}, Device::cuda};
  problem.k = problem.q;
  problem.v = problem.q;
  const std::vector<Slice> whole{{{0, 64}, {0, 64}, {}}};
  problem.mask = {whole, {}};
  EXPECT_EQ(cudnn.unsupported(problem, Direction::forward), "");
  AttentionProblem capped = problem;
  capped.soft_cap = 30.0F;
  EXPECT_EQ(cudnn.unsupported(capped, Direction::forward), "no soft cap");
  const std::vector<Slice> documents{{{0, 20}, {0, 20}, {}}, {{20, 64}, {20, 64}, {}}};
  problem.mask = {documents, {}};
  EXPECT_NE(cudnn.unsupported(problem, Direction::forward), "");
  const std::vector<Slice> shifted{{{0, 64}, {0, 64}, {-kUnbounded, 5}}};
  problem.mask = {shifted, {}};
  EXPECT_NE(cudnn.unsupported(problem, Direction::forward), "");
  EXPECT_EQ(cudnn.unsupported(problem, Direction::backward), "");  // slice by slice
  EXPECT_EQ(cudnn.unsupported(capped, Direction::backward), "no soft cap");
  problem.bias = {data, DType::bf16, Shape{1, 1, 64, 64}, Device::cuda};
  EXPECT_EQ(cudnn.unsupported(problem, Direction::backward), "no gradient of a bias");
}

}  // namespace
}  // namespace annulus
