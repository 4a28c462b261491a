#include <cstdint>
#include <cstdio>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/error.hpp"
#include "kernels/sm90/attention_sm90.hpp"

// The forward kernel behind a C function, so that a Python script can time it beside its peers in
// one process. Contiguous [batch, seq, heads, dim] tensors.
extern "C" {

struct AnnulusForward {
  const void *q, *k, *v;
  void* o;
  float* lse;
  float *accumulator, *row_max, *row_sum;  // null: no carried state
  std::int64_t batch, seq_q, seq_kv, q_heads, kv_heads, head_dim, value_dim;
  const std::int64_t* slices;  // q begin, end, k begin, end, lo, hi of each
  std::int64_t slice_count;
  const void* const* segment_k;  // null: one segment, k and v; else each of seq_kv keys
  const void* const* segment_v;
  std::int64_t segment_count;
  std::int64_t f16;
  std::int64_t resume, chained;
  double scale;
  void* stream;
};

/// 0, or 1 after printing why not.
int annulus_forward(const AnnulusForward* args);
}

namespace {

using annulus::Device;
using annulus::DType;
using annulus::Shape;
using annulus::kernels::sm90::ForwardSegment;

annulus::ForwardCall call_of(const AnnulusForward& args, std::span<const annulus::Slice> slices) {
  const DType dtype = args.f16 != 0 ? DType::f16 : DType::bf16;
  const Shape row_shape{args.batch, args.q_heads, args.seq_q};
  const Shape o_shape{args.batch, args.seq_q, args.q_heads, args.value_dim};
  annulus::ForwardCall call;
  call.problem.q = {args.q, dtype, Shape{args.batch, args.seq_q, args.q_heads, args.head_dim},
                    Device::cuda};
  call.problem.k = {args.k, dtype, Shape{args.batch, args.seq_kv, args.kv_heads, args.head_dim},
                    Device::cuda};
  call.problem.v = {args.v, dtype, Shape{args.batch, args.seq_kv, args.kv_heads, args.value_dim},
                    Device::cuda};
  call.problem.mask = {slices, {}};
  call.problem.scale = static_cast<float>(args.scale);
  if (args.o != nullptr) call.o = {args.o, dtype, o_shape, Device::cuda};
  if (args.lse != nullptr) call.log_sum_exp = {args.lse, DType::f32, row_shape, Device::cuda};
  if (args.accumulator != nullptr) {
    call.state = {{args.accumulator, DType::f32, o_shape, Device::cuda},
                  {args.row_max, DType::f32, row_shape, Device::cuda},
                  {args.row_sum, DType::f32, row_shape, Device::cuda}};
  }
  call.start =
      args.resume != 0 ? annulus::ForwardCall::Start::resume : annulus::ForwardCall::Start::fresh;
  call.chained = args.chained != 0;
  call.stream.handle = args.stream;
  return call;
}

}  // namespace

int annulus_forward(const AnnulusForward* args) {
  try {
    std::vector<annulus::Slice> slices;
    for (std::int64_t i = 0; i < args->slice_count; ++i) {
      const std::int64_t* s = args->slices + 6 * i;
      slices.push_back({{s[0], s[1]}, {s[2], s[3]}, {s[4], s[5]}});
    }
    const annulus::ForwardCall call = call_of(*args, slices);
    if (args->segment_k == nullptr) {
      annulus::attention_forward(call, "sm90");
      return 0;
    }
    std::vector<ForwardSegment> segments;
    for (std::int64_t i = 0; i < args->segment_count; ++i) {
      segments.push_back({call.problem.k, call.problem.v, call.problem.mask});
      segments.back().k.data = args->segment_k[i];
      segments.back().v.data = args->segment_v[i];
    }
    annulus::kernels::sm90::forward_segments(call, segments);
    return 0;
  } catch (const annulus::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
