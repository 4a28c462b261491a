#include "kernels/sm90/forward_launch.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/check.hpp"
#include "kernels/error.hpp"
#include "kernels/sm90/forward_plans.hpp"
#include "kernels/sm90/scratch.hpp"
#include "kernels/sm90/tensor_map.hpp"
#include "kernels/sm90/ticket_counter.hpp"
#include "kernels/sm90/work_tables.hpp"

namespace annulus::kernels::sm90 {
namespace {

constexpr float kLog2E = 1.4426950408889634F;
constexpr int kRows = 64;                                       // of a warpgroup
constexpr std::int64_t kSectionBytes = std::int64_t{32} << 20;  // of keys and values in L2

std::int32_t narrow(std::int64_t value) {
  require(value >= 0 && value < (std::int64_t{1} << 30), ExitCode::bad_data,
          "sm90: extent {}; accepted: below 2^30", value);
  return static_cast<std::int32_t>(value);
}

/// [batch, seq, heads, dim]
RowStrides token_strides(const TensorView& view) {
  return {view.strides[0], view.strides[1], view.strides[2]};
}

/// [batch, heads, seq]
RowStrides head_strides(const TensorView& view) {
  return {view.strides[0], view.strides[2], view.strides[1]};
}

/// How many query heads of a group share a tile: all (at most 64 of them) where that fills the
/// tiles' rows better by more than a tenth.
std::int32_t choose_pack(const AttentionProblem& problem, int warpgroups) {
  const std::int64_t group = problem.groups.group_size > 0 ? problem.groups.group_size
                                                           : problem.q_heads() / problem.kv_heads();
  if (group == 1 || problem.q_heads() % group != 0 || problem.groups.q_head_offset % group != 0) {
    return 1;
  }
  std::int64_t pack = std::min<std::int64_t>(group, kRows);
  while (group % pack != 0) --pack;
  const auto efficiency = [&](std::int64_t heads) {
    const std::int64_t queries = warpgroups * (kRows / heads);
    const std::int64_t tiles = (problem.seq_q() + queries - 1) / queries;
    return static_cast<double>(problem.seq_q() * heads) /
           static_cast<double>(tiles * warpgroups * kRows);
  };
  return efficiency(1) < 0.9 * efficiency(pack) ? static_cast<std::int32_t>(pack) : 1;
}

CUtensorMap query_map(const ConstTensorView& q, std::int32_t pack, const ForwardVariant& variant) {
  return make_tensor_map<5>(
      q.data, q.dtype,
      {MapDim{q.shape[3], 1, variant.qk_columns}, MapDim{pack, q.strides[2], pack},
       MapDim{q.shape[1], q.strides[1], kRows / pack},
       MapDim{q.shape[2] / pack, q.strides[2] * pack, 1}, MapDim{q.shape[0], q.strides[0], 1}});
}

CUtensorMap key_map(const ConstTensorView& kv, int columns, int block) {
  return make_tensor_map<4>(
      kv.data, kv.dtype,
      {MapDim{kv.shape[3], 1, columns}, MapDim{kv.shape[1], kv.strides[1], block},
       MapDim{kv.shape[2], kv.strides[2], 1}, MapDim{kv.shape[0], kv.strides[0], 1}});
}

CUtensorMap output_map(const TensorView& o, int columns) {
  return make_tensor_map<4>(
      o.data, o.dtype,
      {MapDim{o.shape[3], 1, columns}, MapDim{o.shape[1], o.strides[1], 16},
       MapDim{o.shape[2], o.strides[2], 1}, MapDim{o.shape[0], o.strides[0], 1}});
}

void set_segments(ForwardParams& params, std::span<const ForwardSegment> segments,
                  const ForwardVariant& variant) {
  require(segments.size() <= kMaxSegments, ExitCode::internal,
          "sm90: {} segments in one launch; accepted: at most {}", segments.size(), kMaxSegments);
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const ForwardSegment& from = segments[i];
    KvSegment& to = params.segments[i];
    to.ready = from.ready;
    to.ready_value = from.ready_value;
    to.length = narrow(from.k.shape[1]);
    if (to.length == 0) continue;
    to.k = key_map(from.k, variant.qk_columns, variant.block);
    to.v = key_map(from.v, variant.v_columns, variant.block);
  }
}

void set_scale(ForwardParams& params, const AttentionProblem& problem) {
  const bool capped = problem.soft_cap > 0.0F;
  params.score_scale = capped ? problem.scale / problem.soft_cap : 1.0F;
  params.exp_scale = kLog2E * (capped ? problem.soft_cap : problem.scale);
}

void set_outputs(ForwardParams& params, const ForwardCall& call) {
  params.resume = call.start == ForwardCall::Start::resume;
  if (call.problem.sinks && !params.resume) {
    params.sinks = static_cast<const float*>(call.problem.sinks.data);
  }
  if (call.o) {
    params.o = call.o.data;
    params.o_strides = token_strides(call.o);
    params.output_f32 = call.o.dtype == DType::f32;
    if (call.log_sum_exp) {
      params.lse = static_cast<float*>(call.log_sum_exp.data);
      params.lse_strides = head_strides(call.log_sum_exp);
    }
  }
  params.inputs_ready = call.chained && params.resume;
  params.plain =
      params.o != nullptr && !params.output_f32 && !params.resume && params.sinks == nullptr;
  if (call.state.accumulator) {
    params.accumulator = static_cast<float*>(call.state.accumulator.data);
    params.row_max = static_cast<float*>(call.state.row_max.data);
    params.row_sum = static_cast<float*>(call.state.row_sum.data);
    params.accumulator_strides = token_strides(call.state.accumulator);
    params.max_strides = head_strides(call.state.row_max);
    params.sum_strides = head_strides(call.state.row_sum);
  }
}

int multiprocessors() {
  int device = 0;
  int count = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  ANNULUS_CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

void set_tickets(ForwardParams& params, const ForwardWork& work, const AttentionProblem& problem,
                 std::int64_t keys) {
  params.entries = work.rows();
  params.units =
      work.per_batch ? params.packs : narrow(std::int64_t{params.packs} * problem.batch());
  const std::int64_t bytes =
      std::max<std::int64_t>(keys * (problem.head_dim() + problem.value_dim()) * 2, 1);
  const std::int64_t per_kv_head = std::max<std::int64_t>(1, params.group_size / params.pack);
  params.section_units = static_cast<std::int32_t>(
      std::clamp<std::int64_t>(kSectionBytes / bytes * per_kv_head, 1, params.units));
  params.last_entries = work.short_entries;
  params.tickets = narrow(std::int64_t{params.entries} * params.units);
  params.last_tile_first = work.last_tile_first;
}

void set_pieces(ForwardParams& params, const TailCut& cut, std::int32_t warps,
                std::int32_t value_dim, cudaStream_t stream) {
  const std::int32_t cut_tiles = params.tickets - cut.whole;
  params.first_piece = cut.whole;
  params.cut_tiles = cut_tiles;
  params.pieces = cut.pieces;
  params.longest_piece = cut.longest;
  params.tickets = cut.whole + cut_tiles * cut.pieces;
  if (cut_tiles == 0) return;
  const std::int64_t lane_bytes =  // a lane holds two rows' statistics and a quarter of their O
      (4 + value_dim / 2) * std::int64_t{sizeof(float)};
  const Scratch memory =
      scratch(stream, cut_tiles * warps, lane_bytes * 32 * warps * cut_tiles * cut.pieces);
  params.partials = reinterpret_cast<float4*>(memory.data);
  params.arrivals = memory.arrivals;
}

/// By the pairs that the tiles compute, kept or not.
const ForwardVariant& choose_variant(const AttentionProblem& problem,
                                     std::span<const ForwardSegment> segments,
                                     const ForwardVariants& variants) {
  const auto pairs = [&](const ForwardVariant& variant) {
    return forward_plan(segments, problem.batch(), problem.seq_q(),
                        {variant.warpgroups * kRows, variant.block, variant.passes_over})
        ->pairs;
  };
  return pairs(variants.wide) <= variants.wide_gain * pairs(variants.narrow) ? variants.wide
                                                                             : variants.narrow;
}

}  // namespace

void launch_forward(const ForwardCall& call, std::span<const ForwardSegment> segments,
                    const ForwardVariants& variants) {
  const AttentionProblem& problem = call.problem;
  if (problem.batch() == 0 || problem.seq_q() == 0 || problem.q_heads() == 0) return;
  const ForwardVariant& variant = choose_variant(problem, segments, variants);
  const auto stream = static_cast<cudaStream_t>(call.stream.handle);

  ForwardParams params{};
  params.pack = choose_pack(problem, variant.warpgroups);
  params.warpgroup_queries = kRows / params.pack;
  params.packs = narrow(problem.q_heads() / params.pack);
  params.seq_q = narrow(problem.seq_q());
  params.group_size =
      narrow(problem.groups.group_size > 0 ? problem.groups.group_size
                                           : problem.q_heads() / problem.kv_heads());
  params.q_head_offset = narrow(problem.groups.q_head_offset);
  params.q = query_map(problem.q, params.pack, variant);
  set_segments(params, segments, variant);
  set_scale(params, problem);
  set_outputs(params, call);
  params.staged = params.plain && params.pack == 1;
  if (params.staged) params.out = output_map(call.o, variant.v_columns);

  const auto plan =
      forward_plan(segments, problem.batch(), problem.seq_q(),
                   {static_cast<std::int32_t>(variant.warpgroups * params.warpgroup_queries),
                    variant.block, variant.passes_over});
  const ForwardWork& work = plan->work;
  params.rows_by_slice = work.rows_by_slice;
  params.missing_rows = work.missing_rows;
  const WorkTables tables = work_tables(work, stream);
  params.slice_table = tables.slices;
  params.entry_table = tables.entries;
  if (work.entries.empty()) {
    params.inline_slices = static_cast<std::int32_t>(work.slices.size());
    std::copy(work.slices.begin(), work.slices.end(), params.slices);
  }
  std::int64_t keys = 0;
  for (const ForwardSegment& segment : segments) keys += segment.k.shape[1];
  set_tickets(params, work, problem, keys);
  params.ticket = ticket_counter(stream);
  const int processors = multiprocessors();
  // The next call of a chain fills the multiprocessors that run out of tiles.
  const bool goes_on = call.chained && !call.o;
  const std::int64_t blocks = (work.equal_keys + variant.block - 1) / variant.block;
  const TailCut cut =
      goes_on ? TailCut{params.tickets, 1} : cut_tail(params.tickets, blocks, processors);
  set_pieces(params, cut, variant.warpgroups * 4, narrow(problem.value_dim()), stream);
  variant.launch(params, problem.soft_cap > 0.0F, std::min(processors, params.tickets), stream);
}

}  // namespace annulus::kernels::sm90
