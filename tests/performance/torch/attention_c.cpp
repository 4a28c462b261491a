// A C entry to the CPU kernels, so that torch_cpu_attention.py can time them on PyTorch's tensors.
#include <cmath>
#include <cstdio>
#include <exception>

#include "kernels/attention.hpp"
#include "kernels/cpu/peak.hpp"

namespace {

using namespace annulus;

DType dtype_of(int bf16) { return bf16 != 0 ? DType::bf16 : DType::f32; }

AttentionProblem problem_of(const void* q, const void* k, const void* v, const Shape& shape,
                            DType dtype, const MaskSlices& slices) {
  AttentionProblem problem;
  problem.q = ConstTensorView(q, dtype, shape);
  problem.k = ConstTensorView(k, dtype, shape);
  problem.v = ConstTensorView(v, dtype, shape);
  problem.mask = slices.view();
  problem.scale = 1.0F / std::sqrt(static_cast<float>(shape[3]));
  return problem;
}

MaskSlices mask_of(std::int64_t seq, int causal) {
  AttentionMask mask;
  mask.causal = causal != 0;
  return make_slices(mask, 1, seq, seq);
}

}  // namespace

/// All tensors [1, seq, heads, head_dim] in f32 or bf16; log_sum_exp f32 [1, heads, seq]. 0 for
/// success.
extern "C" int annulus_forward(const void* q, const void* k, const void* v, void* o,
                               float* log_sum_exp, std::int64_t seq, std::int64_t heads,
                               std::int64_t head_dim, int causal, int bf16) try {
  const Shape shape{1, seq, heads, head_dim};
  const MaskSlices slices = mask_of(seq, causal);
  const DType dtype = dtype_of(bf16);
  attention_forward({problem_of(q, k, v, shape, dtype, slices),
                     {},
                     ForwardCall::Start::fresh,
                     TensorView(o, dtype, shape),
                     TensorView(log_sum_exp, DType::f32, Shape{1, heads, seq}),
                     {}},
                    "cpu");
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}

/// Adds to the gradients, which are f32; `delta` is scratch, [1, heads, seq].
extern "C" int annulus_backward(const void* q, const void* k, const void* v, const void* o,
                                const void* grad_o, const float* log_sum_exp, float* delta,
                                float* grad_q, float* grad_k, float* grad_v, std::int64_t seq,
                                std::int64_t heads, std::int64_t head_dim, int causal,
                                int bf16) try {
  const DType dtype = dtype_of(bf16);
  const Shape shape{1, seq, heads, head_dim};
  const Shape statistic{1, heads, seq};
  const MaskSlices slices = mask_of(seq, causal);
  attention_delta(ConstTensorView(o, dtype, shape), ConstTensorView(grad_o, dtype, shape),
                  TensorView(delta, DType::f32, statistic));
  attention_backward({problem_of(q, k, v, shape, dtype, slices),
                      ConstTensorView(grad_o, dtype, shape),
                      ConstTensorView(log_sum_exp, DType::f32, statistic),
                      ConstTensorView(delta, DType::f32, statistic),
                      TensorView(grad_q, DType::f32, shape),
                      TensorView(grad_k, DType::f32, shape),
                      TensorView(grad_v, DType::f32, shape),
                      {},
                      true,
                      {}},
                     "cpu");
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}

/// Floating-point operations of so many rounds that never leave registers: multiply-adds of f32,
/// or dot products of bf16 where the processor has them.
extern "C" double annulus_peak_rounds(std::int64_t rounds, int bf16) {
  const double dots = bf16 != 0 ? kernels::cpu::bf16_dot_rounds(rounds) : 0.0;
  return dots > 0.0 ? dots : kernels::cpu::multiply_add_rounds(rounds);
}
