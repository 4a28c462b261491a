#include "kernels/cudnn/backward_cudnn.hpp"

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/buffer.hpp"
#include "kernels/cuda/check.hpp"
#include "kernels/cuda/output_of_delta.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/cudnn/sdpa_plan.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cudnn {
namespace {

constexpr std::int64_t kAlignment = 16;  // bytes, of what cuDNN reads

/// A tensor and the memory of its own that it may have.
template <typename View>
struct Owned {
  Buffer memory;
  View view;
};

Owned<TensorView> make(DType dtype, const Shape& shape, Stream stream) {
  Owned<TensorView> made{Buffer(Device::cuda, shape.elements() * size_bytes(dtype), stream), {}};
  made.view = {made.memory.data(), dtype, shape, Device::cuda};
  return made;
}

Owned<ConstTensorView> copy_of(const ConstTensorView& view, DType dtype, Stream stream) {
  Owned<TensorView> made = make(dtype, view.shape, stream);
  copy(view, made.view, stream);
  return {std::move(made.memory), made.view};
}

bool is_aligned(const ConstTensorView& view) {
  const std::int64_t elements = kAlignment / size_bytes(view.dtype);
  if (reinterpret_cast<std::uintptr_t>(view.data) % kAlignment != 0) return false;
  for (int dim = 0; dim + 1 < view.rank(); ++dim) {
    if (view.shape[dim] > 1 && view.strides[dim] % elements != 0) return false;
  }
  return view.strides[view.rank() - 1] == 1;
}

/// As cuDNN takes it, in place where it lies so.
Owned<ConstTensorView> readable(const ConstTensorView& view, DType dtype, Stream stream) {
  if (view.dtype == dtype && is_aligned(view)) return {Buffer(), view};
  return copy_of(view, dtype, stream);
}

/// cuDNN before 9.26 takes statistics with exactly the strides of a contiguous tensor.
Owned<ConstTensorView> packed(const ConstTensorView& view, Stream stream) {
  const ConstTensorView contiguous(view.data, view.dtype, view.shape, view.device);
  if (view.is_contiguous() && is_aligned(contiguous)) return {Buffer(), contiguous};
  return copy_of(view, view.dtype, stream);
}

Owned<ConstTensorView> output_of(const BackwardCall& call, const ConstTensorView& grad_o) {
  const DType dtype = call.problem.q.dtype;
  if (call.o) return readable(call.o, dtype, call.stream);
  Owned<TensorView> made = make(dtype, grad_o.shape, call.stream);
  cuda::output_of_delta(grad_o, call.delta, made.view,
                        static_cast<cudaStream_t>(call.stream.handle));
  return {std::move(made.memory), made.view};
}

/// cuDNN refuses one query with one key: a second key of zeros follows, which a causal mask hides.
Owned<ConstTensorView> with_second_key(const ConstTensorView& keys, Stream stream) {
  Shape shape = keys.shape;
  shape[1] = 2;
  Owned<TensorView> made = make(keys.dtype, shape, stream);
  fill_bytes(made.memory.data(), Device::cuda, 0, made.memory.bytes(), stream);
  copy(keys, made.view.slice(1, {0, 1}), stream);
  return {std::move(made.memory), made.view};
}

/// What all pieces of a call read.
struct Rows {
  ConstTensorView o;
  ConstTensorView grad_o;
};

/// One rectangle of a call.
struct Part {
  Span batch;
  BandPiece piece;
  HeadRun heads;

  template <typename View>
  View queries(const View& view) const {
    return view.slice(0, batch).slice(1, piece.q).slice(2, heads.q);
  }
  template <typename View>
  View keys(const View& view) const {
    return view.slice(0, batch).slice(1, piece.k).slice(2, heads.kv);
  }
  ConstTensorView statistics(const ConstTensorView& view) const {
    return view.slice(0, batch).slice(1, heads.q).slice(2, piece.q);
  }
};

void add(const TensorView& part, const TensorView& into, Stream stream) {
  if (into) cuda::accumulate(part.slice(1, {0, into.shape[1]}), into, stream);
}

void run(const BackwardCall& call, const Rows& rows, Part part) {
  const AttentionProblem& problem = call.problem;
  const Stream stream = call.stream;
  Owned<ConstTensorView> k{Buffer(), part.keys(problem.k)};
  Owned<ConstTensorView> v{Buffer(), part.keys(problem.v)};
  BandForm form = part.piece.form;
  if (part.piece.q.size() == 1 && part.piece.k.size() == 1) {
    k = with_second_key(k.view, stream);
    v = with_second_key(v.view, stream);
    form = {true, Diagonal::top_left, 0};
  }
  const ConstTensorView q = part.queries(problem.q);
  const ConstTensorView o = part.queries(rows.o);
  const ConstTensorView grad_o = part.queries(rows.grad_o);
  const Owned<ConstTensorView> lse = packed(part.statistics(call.log_sum_exp), stream);

  SdpaGradientDescriptor descriptor;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&descriptor.device));
  descriptor.dtype = problem.q.dtype;
  descriptor.q = rows_layout(q);
  descriptor.k = rows_layout(k.view);
  descriptor.v = rows_layout(v.view);
  descriptor.o = rows_layout(o);
  descriptor.grad_o = rows_layout(grad_o);
  descriptor.stats = statistics_layout(lse.view);
  const auto contiguous = [](const Shape& shape) {
    return rows_layout(ConstTensorView(nullptr, DType::f32, shape, Device::cuda));
  };
  descriptor.grad_q = contiguous(q.shape);
  descriptor.grad_k = contiguous(k.view.shape);
  descriptor.grad_v = contiguous(v.view.shape);
  descriptor.band = form;
  descriptor.scale = problem.scale;
  descriptor.deterministic = call.deterministic;

  const Owned<TensorView> grad_q = make(problem.q.dtype, q.shape, stream);
  const Owned<TensorView> grad_k = make(problem.q.dtype, k.view.shape, stream);
  const Owned<TensorView> grad_v = make(problem.q.dtype, v.view.shape, stream);
  run_sdpa_gradient(descriptor,
                    {q.data, k.view.data, v.view.data, o.data, grad_o.data, lse.view.data,
                     grad_q.view.data, grad_k.view.data, grad_v.view.data},
                    static_cast<cudaStream_t>(stream.handle));
  if (call.grad_q) add(grad_q.view, part.queries(call.grad_q), stream);
  if (call.grad_k) add(grad_k.view, part.keys(call.grad_k), stream);
  if (call.grad_v) add(grad_v.view, part.keys(call.grad_v), stream);
}

}  // namespace

std::vector<HeadRun> head_runs(const AttentionProblem& problem) {
  const HeadGroups& groups = problem.groups;
  const std::int64_t group =
      groups.group_size > 0 ? groups.group_size : problem.q_heads() / problem.kv_heads();
  std::vector<HeadRun> runs;
  bool last_is_whole = false;
  for (std::int64_t head = 0; head < problem.q_heads();) {
    const std::int64_t kv = problem.kv_head_of(head);
    const Span q{head, std::min(problem.q_heads(), (kv + 1) * group - groups.q_head_offset)};
    const bool whole = q.size() == group;
    if (whole && last_is_whole) {
      runs.back().q.end = q.end;
      runs.back().kv.end = kv + 1;
    } else {
      runs.push_back({q, {kv, kv + 1}});
    }
    last_is_whole = whole;
    head = q.end;
  }
  return runs;
}

void backward(const BackwardCall& call) {
  const AttentionProblem& problem = call.problem;
  if (problem.q.shape.elements() == 0 || problem.k.shape.elements() == 0) return;
  const Owned<ConstTensorView> grad_o = readable(call.grad_o, problem.q.dtype, call.stream);
  const Owned<ConstTensorView> o = output_of(call, grad_o.view);
  const std::vector<HeadRun> heads = head_runs(problem);
  const bool shared = problem.mask.batch_offsets.empty();
  for (std::int64_t b = 0; b < (shared ? 1 : problem.batch()); ++b) {
    const Span batch = shared ? Span{0, problem.batch()} : Span{b, b + 1};
    for (const Slice& slice : problem.mask.of_batch(b)) {
      for (const BandPiece& piece : band_pieces(slice)) {
        for (const HeadRun& run_of_heads : heads) {
          run(call, {o.view, grad_o.view}, {batch, piece, run_of_heads});
        }
      }
    }
  }
}

}  // namespace annulus::kernels::cudnn
