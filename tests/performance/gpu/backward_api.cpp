#include <cstdint>
#include <cstdio>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/error.hpp"

// The backward kernel behind a C function, so that a Python script can time it beside its peers in
// one process. Contiguous [batch, seq, heads, dim] tensors; fp32 gradients are added to, those of
// keys and values overwritten where asked.
extern "C" {

struct AnnulusBackward {
  const void *q, *k, *v, *o, *grad_o;
  const float* lse;
  float *delta, *grad_q, *grad_k, *grad_v;
  std::int64_t batch, seq_q, seq_kv, q_heads, kv_heads, head_dim, value_dim;
  const std::int64_t* slices;  // q begin, end, k begin, end, lo, hi of each
  std::int64_t slice_count;
  std::int64_t f16;
  std::int64_t deterministic;
  std::int64_t overwrites_kv;
  double scale;
  void* stream;
};

/// Delta and the three gradients. 0, or 1 after printing why not.
int annulus_backward(const AnnulusBackward* args);
}

namespace {

using annulus::Device;
using annulus::DType;
using annulus::Shape;

annulus::BackwardCall call_of(const AnnulusBackward& args, std::span<const annulus::Slice> slices) {
  const DType dtype = args.f16 != 0 ? DType::f16 : DType::bf16;
  const Shape q_shape{args.batch, args.seq_q, args.q_heads, args.head_dim};
  const Shape k_shape{args.batch, args.seq_kv, args.kv_heads, args.head_dim};
  const Shape v_shape{args.batch, args.seq_kv, args.kv_heads, args.value_dim};
  const Shape o_shape{args.batch, args.seq_q, args.q_heads, args.value_dim};
  const Shape row_shape{args.batch, args.q_heads, args.seq_q};
  annulus::BackwardCall call;
  call.problem.q = {args.q, dtype, q_shape, Device::cuda};
  call.problem.k = {args.k, dtype, k_shape, Device::cuda};
  call.problem.v = {args.v, dtype, v_shape, Device::cuda};
  call.problem.mask = {slices, {}};
  call.problem.scale = static_cast<float>(args.scale);
  call.grad_o = {args.grad_o, dtype, o_shape, Device::cuda};
  call.log_sum_exp = {args.lse, DType::f32, row_shape, Device::cuda};
  call.delta = {args.delta, DType::f32, row_shape, Device::cuda};
  call.grad_q = {args.grad_q, DType::f32, q_shape, Device::cuda};
  call.grad_k = {args.grad_k, DType::f32, k_shape, Device::cuda};
  call.grad_v = {args.grad_v, DType::f32, v_shape, Device::cuda};
  call.deterministic = args.deterministic != 0;
  call.overwrites_kv = args.overwrites_kv != 0;
  call.stream.handle = args.stream;
  return call;
}

}  // namespace

int annulus_backward(const AnnulusBackward* args) {
  try {
    std::vector<annulus::Slice> slices;
    for (std::int64_t i = 0; i < args->slice_count; ++i) {
      const std::int64_t* s = args->slices + 6 * i;
      slices.push_back({{s[0], s[1]}, {s[2], s[3]}, {s[4], s[5]}});
    }
    const annulus::BackwardCall call = call_of(*args, slices);
    const annulus::ConstTensorView o(args->o, call.problem.q.dtype, call.grad_o.shape,
                                     Device::cuda);
    annulus::attention_delta(
        o, call.grad_o, {args->delta, DType::f32, call.delta.shape, Device::cuda}, call.stream);
    annulus::attention_backward(call, "sm90");
    return 0;
  } catch (const annulus::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
