#include "kernels/sm90/backward_launch.hpp"

#include <algorithm>
#include <memory>

#include "kernels/buffer.hpp"
#include "kernels/cuda/check.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "kernels/sm90/backward_work.hpp"
#include "kernels/sm90/tensor_map.hpp"
#include "kernels/sm90/ticket_counter.hpp"
#include "kernels/sm90/work_tables.hpp"

namespace annulus::kernels::sm90 {
namespace {

constexpr float kLog2E = 1.4426950408889634F;
constexpr std::int64_t kLongPass = 32;  // blocks of queries, beside which its end is short
constexpr std::int64_t kLongUnequalPass = 4;
constexpr std::int64_t kTurnBlocks = 4;    // of queries pass while an addition and its turn do
constexpr std::int64_t kDriftRows = 4096;  // of a pass
constexpr std::int64_t kPasses = 16;       // of a thread block in a section
constexpr std::int64_t kMostPasses = 20;   // without sections
constexpr std::int64_t kSectionBytes = std::int64_t{32} << 20;  // of queries in L2

std::int32_t narrow(std::int64_t value) {
  require(value >= 0 && value < (std::int64_t{1} << 30), ExitCode::bad_data,
          "sm90: extent {}; accepted: below 2^30", value);
  return static_cast<std::int32_t>(value);
}

/// [batch, heads, seq]
RowStrides head_strides(const ConstTensorView& view) {
  return {view.strides[0], view.strides[2], view.strides[1]};
}

/// Whether rows start at multiples of 16 bytes, as the copy engine wants them.
bool is_aligned(const TensorView& view) {
  bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) {
    aligned =
        aligned && (view.shape[dim] == 1 || (view.strides[dim] > 0 && view.strides[dim] % 4 == 0));
  }
  return aligned;
}

/// Where the kernel adds a gradient: in place, or beside it where the copy engine cannot.
class GradientPlace {
 public:
  GradientPlace(const TensorView& wanted, const char* what, Stream stream)
      : wanted_(wanted), view_(wanted), stream_(stream) {
    if (!wanted) return;
    require(wanted.dtype == DType::f32 && wanted.strides[3] == 1, ExitCode::usage,
            "sm90: {} has dtype {} and head_dim stride {}; accepted: f32 and 1", what,
            name(wanted.dtype), wanted.strides[3]);
    if (is_aligned(wanted)) return;
    beside_ = Buffer(Device::cuda, wanted.shape.elements() * 4, stream);
    fill_bytes(beside_.data(), Device::cuda, 0, beside_.bytes(), stream);
    view_ = TensorView(beside_.data(), DType::f32, wanted.shape, Device::cuda);
  }

  /// After the launch.
  void finish() const {
    if (beside_.data() != nullptr) accumulate(view_, wanted_, stream_);
  }

  GradientRows rows() const {
    if (!view_) return {};
    return {static_cast<float*>(view_.data),
            {view_.strides[0], view_.strides[1], view_.strides[2]}};
  }
  const TensorView& view() const { return view_; }

 private:
  TensorView wanted_;
  TensorView view_;
  Buffer beside_;
  Stream stream_;
};

CUtensorMap tile_map(const ConstTensorView& view, int columns, int rows) {
  return make_tensor_map<4>(
      view.data, view.dtype,
      {MapDim{view.shape[3], 1, columns}, MapDim{view.shape[1], view.strides[1], rows},
       MapDim{view.shape[2], view.strides[2], 1}, MapDim{view.shape[0], view.strides[0], 1}});
}

int multiprocessors() {
  int device = 0;
  int count = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  ANNULUS_CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

struct Gradients {
  GradientPlace q, k, v;
};

void set_tensors(BackwardParams& params, const BackwardCall& call, const BackwardVariant& variant,
                 const Gradients& gradients) {
  const AttentionProblem& problem = call.problem;
  params.q = tile_map(problem.q, variant.qk_columns, variant.queries / variant.query_boxes);
  params.grad_o = tile_map(call.grad_o, variant.v_columns, variant.queries / variant.query_boxes);
  params.k = tile_map(problem.k, variant.qk_columns, variant.keys / variant.cluster);
  params.v = tile_map(problem.v, variant.v_columns, variant.keys / variant.cluster);
  params.lse = static_cast<const float*>(call.log_sum_exp.data);
  params.delta = static_cast<const float*>(call.delta.data);
  params.lse_strides = head_strides(call.log_sum_exp);
  params.delta_strides = head_strides(call.delta);
  params.grad_q = gradients.q.rows();
  params.grad_k = gradients.k.rows();
  params.grad_v = gradients.v.rows();
  if (call.grad_q) params.grad_q_map = tile_map(gradients.q.view(), 32, variant.grad_q_rows);
  if (call.grad_k) params.grad_k_map = tile_map(gradients.k.view(), 32, 64);
  if (call.grad_v) params.grad_v_map = tile_map(gradients.v.view(), 32, 64);
}

/// Freed in the order of the stream: after the launch that uses it.
struct StreamDeleter {
  Stream stream;
  void operator()(std::uint32_t* words) const { cuda::release(words, stream); }
};
using DeviceWords = std::unique_ptr<std::uint32_t, StreamDeleter>;

DeviceWords set_turns(BackwardParams& params, const BackwardCall& call,
                      const BackwardVariant& variant) {
  const AttentionProblem& problem = call.problem;
  const std::int64_t blocks = (problem.seq_q() + variant.queries - 1) / variant.queries;
  params.turn_rows = narrow(blocks * variant.queries / 16 * variant.cluster);
  const std::int64_t bytes = problem.batch() * problem.q_heads() * params.turn_rows * 4;
  DeviceWords turns(static_cast<std::uint32_t*>(cuda::allocate(bytes, call.stream)),
                    StreamDeleter{call.stream});
  cuda::fill_bytes(turns.get(), 0, bytes, call.stream);
  params.turns = turns.get();
  return turns;
}

void set_scale(BackwardParams& params, const AttentionProblem& problem) {
  const bool capped = problem.soft_cap > 0.0F;
  params.scale = problem.scale;
  params.score_scale = capped ? problem.scale / problem.soft_cap : 1.0F;
  params.exp_scale = kLog2E * (capped ? problem.soft_cap : problem.scale);
}

/// How many units must be under way at a time so that turns come before they are waited for: a
/// block of queries is added to once a unit's block of keys, of `query_blocks` for each query head,
/// is done with kTurnBlocks more of them.
std::int64_t units_for_turns(std::int64_t query_blocks, std::int64_t chunk, int processors) {
  return processors * kTurnBlocks / std::max<std::int64_t>(query_blocks * chunk, 1);
}

/// Of Q, dO and dQ in a row of a pass.
std::int64_t row_bytes(const AttentionProblem& problem) {
  return problem.head_dim() * 6 + problem.value_dim() * 2;
}

/// Whether all passes are alike, in no fixed order, and too large for those that are under way
/// together to keep together for long.
bool passes_drift(const BackwardCall& call, const ForwardWork& work, const BackwardVariant& variant,
                  std::int64_t chunk_heads) {
  const std::int64_t blocks = equal_blocks(work, static_cast<std::int32_t>(variant.keys),
                                           static_cast<std::int32_t>(variant.queries));
  return !call.deterministic && blocks * variant.queries * chunk_heads >= kDriftRows &&
         row_bytes(call.problem) >= kDriftBytes;
}

/// A chunk of query heads shares one pass over a block of keys, which saves loads and additions of
/// dK and dV; fewer than the group where the pass is long enough without, and soon so where passes
/// are of unequal length, since those drift apart from head to head and no longer find each other's
/// queries in L2, and where there would be too little work for the device.
void set_units(BackwardParams& params, const BackwardCall& call, const ForwardWork& work,
               const BackwardVariant& variant, int processors) {
  const AttentionProblem& problem = call.problem;
  const std::int64_t group = problem.groups.group_size > 0 ? problem.groups.group_size
                                                           : problem.q_heads() / problem.kv_heads();
  const std::int64_t offset = problem.groups.q_head_offset;
  const std::int64_t first = offset / group;
  const std::int64_t kv_heads = (offset + problem.q_heads() - 1) / group - first + 1;
  std::int64_t chunk = group;
  const std::int64_t blocks = work.rows() * kv_heads * (work.per_batch ? 1 : problem.batch());
  const auto keys = static_cast<std::int32_t>(variant.keys);
  const auto queries = static_cast<std::int32_t>(variant.queries);
  const std::int64_t query_blocks = blocks_of_queries(work, keys, queries) / work.rows();
  const bool unequal = 4 * query_blocks < 3 * most_blocks_of_queries(work, keys, queries);
  const std::int64_t long_pass =
      unequal && row_bytes(problem) >= kDriftBytes ? kLongUnequalPass : kLongPass;
  const auto halves = [&] {
    return (chunk + 1) / 2 * query_blocks >= long_pass ||
           blocks * ((group + chunk - 1) / chunk) < std::int64_t{4} * processors;
  };
  while (!call.deterministic && chunk > 1 && halves()) chunk = (chunk + 1) / 2;
  params.group_size = narrow(group);
  params.q_head_offset = narrow(offset);
  params.first_kv_head = narrow(first);
  params.chunk_heads = narrow(chunk);
  params.chunks = narrow((group + chunk - 1) / chunk);
  params.q_heads = narrow(problem.q_heads());
  params.seq_q = narrow(problem.seq_q());
  params.batch_units = narrow(kv_heads * params.chunks);
  params.units = work.per_batch ? params.batch_units
                                : narrow(std::int64_t{params.batch_units} * problem.batch());
  params.entries = work.rows();
  const std::int64_t bytes =
      std::max<std::int64_t>(problem.seq_q() * chunk * row_bytes(problem), 1);
  const std::int64_t pass_rows = call.deterministic ? 0 : query_blocks * chunk * variant.queries;
  const std::int64_t together = keys_together(pass_rows, row_bytes(problem));
  std::int64_t section =
      std::max(kSectionBytes / bytes, processors * std::int64_t{variant.keys} / together);
  // Rather twice as many at once than two sections; but those that begin together drift apart in
  // the long run, which the next section ends.
  if (together > kFewKeysTogether && pass_rows <= kLongPassRows) {
    const std::int64_t passes = std::int64_t{params.entries} * params.units;
    if (passes <= kMostPasses * processors) {
      if (params.units <= 2 * section) section = params.units;
    } else if (pass_rows >= kDriftRows) {
      section = std::min(section, kPasses * processors / params.entries);
    }
  }
  if (call.deterministic) {
    section = std::max(section, units_for_turns(query_blocks, chunk, processors));
  }
  section = std::clamp<std::int64_t>(section, 1, params.units);
  if (call.deterministic) {  // evenly: blocks of a short last one would wait
    const std::int64_t sections = params.units / section;
    section = (params.units + sections - 1) / sections;
  }
  params.section_units = narrow(section);
  params.tickets = narrow(std::int64_t{params.entries} * params.units);
}

/// Whether each row of dK and dV belongs to just one block of keys and one pass over it, so that
/// it need not be added to.
bool writes_all_keys(const BackwardParams& params, const BackwardCall& call,
                     const ForwardWork& work, const BackwardVariant& variant) {
  const AttentionProblem& problem = call.problem;
  const auto takes_boxes = [](const TensorView& view) { return !view || is_aligned(view); };
  return params.chunks == 1 && params.batch_units == problem.kv_heads() &&
         takes_boxes(call.grad_k) && takes_boxes(call.grad_v) &&
         covers_all_keys(work, problem.batch(), problem.seq_kv(),
                         static_cast<std::int32_t>(variant.keys),
                         static_cast<std::int32_t>(variant.key_box));
}

bool has_packed_rows(const TensorView& view) {
  return !view ||
         (view.strides[2] == view.shape[3] && view.strides[1] == view.shape[2] * view.shape[3]);
}

void clear_keys(const TensorView& grad, Span rows, Stream stream) {
  if (!grad) return;
  for (std::int64_t b = 0; b < grad.shape[0]; ++b) {
    clear(grad.slice(0, {b, b + 1}).slice(1, rows), stream);
  }
}

/// Cuts the last blocks of keys. Their dK and dV, of several passes each, are cleared where the
/// others' are overwritten. A section of passes that keep together, with others after it, is left
/// alone: they would no longer do so.
void cut_tail(BackwardParams& params, const BackwardCall& call, ForwardWork& work,
              const BackwardVariant& variant, int processors) {
  const auto keys = static_cast<std::int32_t>(variant.keys);
  const auto queries = static_cast<std::int32_t>(variant.queries);
  params.whole_entries = params.entries;
  if (call.deterministic || variant.cluster > 1 || work.per_batch ||
      (params.units > params.section_units &&
       !passes_drift(call, work, variant, params.chunk_heads)) ||
      (params.overwrites_kv && !(has_packed_rows(call.grad_k) && has_packed_rows(call.grad_v)))) {
    return;
  }
  const std::int32_t last_units = (params.units - 1) % params.section_units + 1;
  const TailCut cut = cut_last_keys(work, params.units, last_units, keys, queries, processors);
  if (cut.pieces == 1) return;
  for (auto i = static_cast<std::size_t>(cut.whole);
       params.overwrites_kv && i < work.entries.size();) {
    Span rows{work.entries[i].q_begin, work.entries[i].q_begin};
    for (; i < work.entries.size() && work.entries[i].q_begin == rows.end; ++i) {
      rows.end = std::min(rows.end + keys, call.problem.seq_kv());
    }
    clear_keys(call.grad_k, rows, call.stream);
    clear_keys(call.grad_v, rows, call.stream);
  }
  cut_entries(work, cut, keys, queries);
  params.whole_entries = cut.whole;
  params.entries = work.rows();
  params.tickets = narrow(std::int64_t{params.entries} * params.units);
}

ForwardWork plan(const BackwardCall& call, const BackwardVariant& variant) {
  const AttentionProblem& problem = call.problem;
  if (problem.batch() == 0 || problem.seq_q() == 0 || problem.seq_kv() == 0 ||
      problem.q_heads() == 0) {
    return {};
  }
  return plan_backward(
      problem.mask, problem.batch(), static_cast<std::int32_t>(variant.keys),
      call.deterministic ? BlockOrder::first_keys_first : BlockOrder::most_queries_first);
}

}  // namespace

void launch_backward(const BackwardCall& call, const BackwardVariant& variant) {
  const AttentionProblem& problem = call.problem;
  ForwardWork work = plan(call, variant);
  const int clusters = multiprocessors() / variant.cluster;
  BackwardParams params{};
  if (!work.entries.empty()) set_units(params, call, work, variant, clusters);
  params.overwrites_kv = call.overwrites_kv && writes_all_keys(params, call, work, variant);
  if (call.overwrites_kv && !params.overwrites_kv) {
    clear(call.grad_k, call.stream);
    clear(call.grad_v, call.stream);
  }
  if (work.entries.empty()) return;
  const auto stream = static_cast<cudaStream_t>(call.stream.handle);

  const Gradients gradients{{call.grad_q, "grad_q", call.stream},
                            {call.grad_k, "grad_k", call.stream},
                            {call.grad_v, "grad_v", call.stream}};
  set_tensors(params, call, variant, gradients);
  set_scale(params, problem);
  cut_tail(params, call, work, variant, clusters);
  const WorkTables tables = work_tables(work, stream);
  params.slice_table = tables.slices;
  params.entry_table = tables.entries;
  params.ticket = ticket_counter(stream);
  const DeviceWords turns = call.deterministic ? set_turns(params, call, variant) : DeviceWords{};
  variant.launch(params, std::min(clusters, params.tickets), stream);
  gradients.q.finish();
  gradients.k.finish();
  gradients.v.finish();
}

}  // namespace annulus::kernels::sm90
