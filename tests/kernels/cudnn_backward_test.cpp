#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/cudnn/backward_cudnn.hpp"
#include "kernels/cudnn/band_pieces.hpp"
#include "kernels/cudnn_support.hpp"
#include "kernels/plain_attention.hpp"
#include "kernels/random_attention.hpp"
#include "kernels/sm90/device_tensor.hpp"

// Any mask as rectangles that cuDNN can name, and their gradients against the double reference by
// FlashAttention's rule. The gradients need a GPU: build/test_kernels --gtest_filter='Cudnn*'
namespace annulus {
namespace {

using kernels::cudnn::band_form;
using kernels::cudnn::band_pieces;
using kernels::cudnn::BandPiece;
using kernels::cudnn::head_runs;
using kernels::cudnn::HeadRun;

TEST(BandPieces, KeepThePairsOfTheSliceOnceEach) {
  std::mt19937_64 random(testing::test_seed());
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  for (int round = 0; round < 20000; ++round) {
    const std::int64_t seq_q = pick(1, 12);
    const std::int64_t seq_kv = pick(1, 12);
    Slice slice{{pick(0, seq_q), seq_q}, {pick(0, seq_kv), seq_kv}, {}};
    if (pick(0, 2) > 0) slice.band.hi = pick(-seq_q - 1, seq_kv + 1);
    if (pick(0, 2) > 0) slice.band.lo = pick(-seq_q - 1, seq_kv + 1);
    const std::vector<BandPiece> pieces = band_pieces(slice);
    ASSERT_LE(pieces.size(), 4U);
    for (const BandPiece& piece : pieces) {
      // What cuDNN refuses.
      if (piece.form.diagonal == kernels::cudnn::Diagonal::bottom_right ||
          piece.form.left_bound > 0) {
        ASSERT_LE(piece.q.size(), piece.k.size());
      }
    }
    for (std::int64_t q = 0; q < seq_q; ++q) {
      for (std::int64_t k = 0; k < seq_kv; ++k) {
        int kept = 0;
        for (const BandPiece& piece : pieces) kept += piece.keeps(q, k) ? 1 : 0;
        ASSERT_EQ(kept, slice.keeps(q, k) ? 1 : 0)
            << "q " << slice.q.begin << ".." << slice.q.end << " k " << slice.k.begin << ".."
            << slice.k.end << " band " << slice.band.lo << ".." << slice.band.hi << " at " << q
            << "," << k;
      }
    }
  }
}

TEST(HeadRuns, ComeInWholeGroupsAndParts) {
  const std::vector<std::uint16_t> data(64);
  AttentionProblem problem;
  problem.q = {data.data(), DType::bf16, Shape{1, 1, 9, 1}};
  problem.k = problem.v = {data.data(), DType::bf16, Shape{1, 1, 4, 1}};
  problem.groups = {3, 2};
  // Heads 0 | 1 2 3, 4 5 6 | 7 8 of groups 0 | 1, 2 | 3.
  const std::vector<HeadRun> expected{{{0, 1}, {0, 1}}, {{1, 7}, {1, 3}}, {{7, 9}, {3, 4}}};
  EXPECT_EQ(head_runs(problem), expected);
  problem.q.shape[2] = 8;
  problem.groups = {};
  EXPECT_EQ(head_runs(problem), (std::vector<HeadRun>{{{0, 8}, {0, 4}}}));
}

struct Case {
  const char* what;
  std::int64_t seq_q, seq_kv, q_heads, kv_heads, head_dim;
  std::vector<Slice> slices;
  HeadGroups groups = {};
  bool rows_have_other_keys = false;  // as in a step of a ring
};

std::vector<Case> cases() {
  constexpr std::int64_t kFar = kUnbounded;
  return {
      {"full", 128, 192, 4, 4, 64, {{{0, 128}, {0, 192}, {}}}},
      {"causal", 256, 256, 4, 2, 128, {{{0, 256}, {0, 256}, {-kFar, 0}}}},
      {"bottom-right", 100, 333, 6, 2, 64, {{{0, 100}, {0, 333}, {-kFar, 233}}}},
      {"more queries than keys", 333, 100, 2, 2, 64, {{{233, 333}, {0, 100}, {-kFar, -233}}}},
      {"window", 200, 200, 2, 1, 64, {{{0, 200}, {0, 200}, {-37, 0}}}},
      {"far end of a window", 200, 200, 2, 1, 64, {{{0, 200}, {0, 200}, {20, kFar}}}, {}, true},
      {"documents and a single token",
       150,
       150,
       4,
       2,
       128,
       {{{0, 70}, {0, 70}, {-kFar, 0}},
        {{70, 71}, {70, 71}, {-kFar, 0}},
        {{71, 150}, {71, 150}, {-kFar, 0}}}},
      {"ring step", 130, 97, 5, 3, 128, {{{3, 130}, {0, 97}, {-kFar, 40}}}, {2, 1}, true},
      {"wide heads", 130, 130, 2, 2, 256, {{{0, 130}, {0, 130}, {-kFar, 0}}}},
  };
}

double largest_difference(const std::vector<double>& a, const std::vector<float>& b) {
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(a[i] - static_cast<double>(b[i]));
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}

/// max|x − ref| ≤ 2·max|pt − ref| + atol, in the unit that a gradient is written in.
void expect_by_the_rule(const std::vector<float>& found, const std::vector<double>& plain,
                        const std::vector<float>& exact, double unit, const char* what) {
  double largest = 0.0;
  for (const float value : exact) largest = std::max(largest, std::abs(double{value}));
  const std::vector<double> as_doubles(found.begin(), found.end());
  const double tolerance = 2.0 * largest_difference(plain, exact) + unit * largest;
  EXPECT_LE(largest_difference(as_doubles, exact), tolerance) << what;
}

struct Gradients {
  std::vector<float> q, k, v;
};

/// The LSE and delta of a case: those of its own keys, or with more keys elsewhere.
struct Statistics {
  std::vector<float> lse, delta;
  std::vector<double> o;
};

Statistics statistics_of(const AttentionProblem& host, const DeviceTensor& grad_o, const Case& c,
                         std::mt19937& random) {
  const Shape lse_shape{host.batch(), c.q_heads, c.seq_q};
  const auto rows = static_cast<std::size_t>(lse_shape.elements());
  Statistics statistics{std::vector<float>(rows), std::vector<float>(rows),
                        std::vector<double>(grad_o.host.size())};
  std::vector<double> lse(rows);
  ForwardCall call;
  call.problem = host;
  call.o = {statistics.o.data(), DType::f64, grad_o.shape};
  call.log_sum_exp = {lse.data(), DType::f64, lse_shape};
  attention_forward(call, "reference");
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < rows; ++i) {
    statistics.lse[i] = static_cast<float>(lse[i]) + (c.rows_have_other_keys ? 0.7F : 0.0F);
    if (c.rows_have_other_keys) statistics.delta[i] = normal(random);
  }
  if (c.rows_have_other_keys) return statistics;
  attention_delta({statistics.o.data(), DType::f64, grad_o.shape}, grad_o.host_view(),
                  {statistics.delta.data(), DType::f32, lse_shape});
  return statistics;
}

void run(const Case& c, DType dtype, bool give_o, std::mt19937& random) {
  SCOPED_TRACE(std::string(c.what) + (give_o ? ", with O" : ", without O"));
  const DeviceTensor q(Shape{2, c.seq_q, c.q_heads, c.head_dim}, dtype, random);
  const DeviceTensor k(Shape{2, c.seq_kv, c.kv_heads, c.head_dim}, dtype, random);
  const DeviceTensor v(k.shape, dtype, random);
  const DeviceTensor grad_o(q.shape, dtype, random);
  const Shape lse_shape{2, c.q_heads, c.seq_q};
  AttentionProblem host;
  host.q = q.host_view();
  host.k = k.host_view();
  host.v = v.host_view();
  host.mask = {c.slices, {}};
  host.groups = c.groups;
  host.scale = 1.0F / std::sqrt(static_cast<float>(c.head_dim));
  const Statistics statistics = statistics_of(host, grad_o, c, random);

  Gradients exact{std::vector<float>(q.host.size(), 0.5F), std::vector<float>(k.host.size(), 0.5F),
                  std::vector<float>(v.host.size(), 0.5F)};
  BackwardCall call;
  call.problem = host;
  call.grad_o = grad_o.host_view();
  call.log_sum_exp = {statistics.lse.data(), DType::f32, lse_shape};
  call.delta = {statistics.delta.data(), DType::f32, lse_shape};
  call.grad_q = {exact.q.data(), DType::f32, q.shape};
  call.grad_k = {exact.k.data(), DType::f32, k.shape};
  call.grad_v = {exact.v.data(), DType::f32, v.shape};
  attention_backward(call, "reference");
  AttentionProblem rounded = host;  // plain attention rounds to q's dtype
  std::vector<std::uint16_t> q16(q.host.size()), k16(k.host.size()), v16(v.host.size());
  const auto narrow = [dtype](const DeviceTensor& from, std::vector<std::uint16_t>& to) {
    const TensorView view(to.data(), dtype, from.shape);
    copy(from.host_view(), view);
    return ConstTensorView(view);
  };
  rounded.q = narrow(q, q16);
  rounded.k = narrow(k, k16);
  rounded.v = narrow(v, v16);
  std::vector<std::uint16_t> grad_o16(grad_o.host.size());
  const std::vector<double> lse(statistics.lse.begin(), statistics.lse.end());
  const std::vector<double> delta(statistics.delta.begin(), statistics.delta.end());
  testing::PlainAttention plain =
      testing::plain_attention(rounded, narrow(grad_o, grad_o16), lse, delta);
  for (auto* gradient : {&plain.grad_q, &plain.grad_k, &plain.grad_v}) {
    for (double& value : *gradient) value += 0.5;
  }

  const DeviceFloats device_lse(lse_shape), device_delta(lse_shape);
  copy(call.log_sum_exp, device_lse.view());
  copy(call.delta, device_delta.view());
  const Buffer o(Device::cuda, q.shape.elements() * 2);
  const TensorView device_o(o.data(), dtype, q.shape, Device::cuda);
  copy(ConstTensorView(statistics.o.data(), DType::f64, q.shape), device_o);
  const DeviceFloats grad_q(q.shape), grad_k(k.shape), grad_v(v.shape);
  copy(ConstTensorView(std::vector<float>(q.host.size(), 0.5F).data(), DType::f32, q.shape),
       grad_q.view());
  copy(ConstTensorView(std::vector<float>(k.host.size(), 0.5F).data(), DType::f32, k.shape),
       grad_k.view());
  copy(ConstTensorView(std::vector<float>(v.host.size(), 0.5F).data(), DType::f32, v.shape),
       grad_v.view());
  call.problem.q = q.view;
  call.problem.k = k.view;
  call.problem.v = v.view;
  call.grad_o = grad_o.view;
  call.log_sum_exp = device_lse.view();
  call.delta = device_delta.view();
  if (give_o) call.o = device_o;
  call.grad_q = grad_q.view();
  call.grad_k = grad_k.view();
  call.grad_v = grad_v.view();
  attention_backward(call, "cudnn");
  // Twice what rounding a result to the input's dtype would cost.
  const double unit = dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  expect_by_the_rule(grad_q.fetched(), plain.grad_q, exact.q, unit, "grad_q");
  expect_by_the_rule(grad_k.fetched(), plain.grad_k, exact.k, unit, "grad_k");
  expect_by_the_rule(grad_v.fetched(), plain.grad_v, exact.v, unit, "grad_v");
}

TEST(Cudnn, GradientsMeetTheAcceptanceRule) {
  if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no GPU here";
  if (kernels::cudnn::backends().empty()) GTEST_SKIP() << "built without cuDNN";
  std::mt19937 random(static_cast<unsigned>(testing::test_seed()));
  for (const Case& c : cases()) {
    for (const DType dtype : {DType::bf16, DType::f16}) {
      for (const bool give_o : {true, false}) {
        if (give_o && c.rows_have_other_keys) continue;
        run(c, dtype, give_o, random);
      }
    }
  }
}

}  // namespace
}  // namespace annulus
