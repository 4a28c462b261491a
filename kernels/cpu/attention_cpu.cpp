#include "kernels/cpu/attention_cpu.hpp"

#include <omp.h>

#include <algorithm>
#include <deque>
#include <vector>

#include "kernels/cpu/backward_keys.hpp"
#include "kernels/cpu/forward_rows.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/split_forward.hpp"
#include "kernels/work_meter.hpp"

namespace annulus::kernels::cpu {
namespace {

// A task packs the keys that it needs, so that more of its rows mean less packing: at most as many
// as their tiles should take memory, and at least enough to hide it.
constexpr std::int64_t kMostTaskRows = 8192;
constexpr std::int64_t kLeastTaskRows = 384;
constexpr std::int64_t kTasksOfThread = 4;

bool is_half_or_single(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
}

std::string unsupported_rows(const ConstTensorView& view, std::string_view what) {
  if (view.shape[3] % 8 != 0 || view.shape[3] < 8 || view.shape[3] > 512) {
    return fmt::format("{} has head_dim {}; accepted: multiples of 8 up to 512", what,
                       view.shape[3]);
  }
  if (view.strides[3] != 1) return fmt::format("{} is not contiguous in head_dim", what);
  return {};
}

// Queries of a task: several tasks for each thread where the heads alone are too few.
std::int64_t queries_of_task(const AttentionProblem& problem, std::int64_t group) {
  const std::int64_t rows = problem.seq_q() * group;
  const std::int64_t threads = omp_get_max_threads();
  const std::int64_t wanted = threads == 1 ? 1 : threads * kTasksOfThread;
  const std::int64_t heads = problem.batch() * problem.kv_heads();
  const std::int64_t parts =
      std::max((rows + kMostTaskRows - 1) / kMostTaskRows,
               std::min((wanted + heads - 1) / heads, rows / kLeastTaskRows));
  const std::int64_t part_rows = rows / std::max<std::int64_t>(parts, 1);
  return std::max<std::int64_t>((part_rows + group - 1) / group, 1);
}

// Tasks from the last queries to the first: under a causal mask the longest come first.
std::vector<ForwardBlock> forward_blocks(const AttentionProblem& problem) {
  std::vector<ForwardBlock> blocks;
  for (std::int64_t batch = 0; batch < problem.batch(); ++batch) {
    for (std::int64_t kv_head = 0; kv_head < problem.kv_heads(); ++kv_head) {
      const Span heads = heads_of_kv_head(problem, kv_head);
      if (heads.empty()) continue;
      const std::int64_t step = queries_of_task(problem, heads.size());
      for (std::int64_t query = 0; query < problem.seq_q(); query += step) {
        const Span queries{query, std::min(query + step, problem.seq_q())};
        blocks.push_back({{batch, kv_head, heads, queries, {0, problem.seq_kv()}}, nullptr});
      }
    }
  }
  std::stable_sort(blocks.begin(), blocks.end(), [](const auto& a, const auto& b) {
    return a.rows.queries.begin > b.rows.queries.begin;
  });
  return blocks;
}

// One (batch, KV head) of a backward call: its rows, all keys, and who adds to dQ when.
struct BackwardRows {
  RowBlock rows;
  AccumulationOrder order;
};

std::deque<BackwardRows> backward_rows(const AttentionProblem& problem, std::int64_t chunk_keys) {
  std::deque<BackwardRows> all;
  for (std::int64_t batch = 0; batch < problem.batch(); ++batch) {
    for (std::int64_t kv_head = 0; kv_head < problem.kv_heads(); ++kv_head) {
      const RowBlock rows{batch,
                          kv_head,
                          heads_of_kv_head(problem, kv_head),
                          {0, problem.seq_q()},
                          {0, problem.seq_kv()}};
      if (rows.rows() == 0) continue;
      all.push_back({rows, AccumulationOrder(problem.mask.of_batch(batch), rows, chunk_keys,
                                             backward_tile_rows(problem))});
    }
  }
  return all;
}

bool shares_grad_bias(const BackwardCall& call) {
  if (!call.grad_bias) return false;
  return (call.grad_bias.shape[0] == 1 && call.problem.batch() > 1) ||
         (call.grad_bias.shape[1] == 1 && call.problem.kv_heads() > 1);
}

// Kept pairs of a problem by its number of tasks: what one of them does on average.
double pairs_of_task(const AttentionProblem& problem, std::int64_t tasks) {
  std::int64_t pairs = 0;
  for (std::int64_t b = 0; b < problem.batch(); ++b) {
    for (const Slice& slice : problem.mask.of_batch(b)) pairs += slice.area();
  }
  return static_cast<double>(pairs * problem.q_heads()) /
         static_cast<double>(std::max<std::int64_t>(tasks, 1));
}

}  // namespace

std::string unsupported(const AttentionProblem& problem, Direction /*direction*/) {
  if (problem.q.device != Device::cpu) return "host tensors only";
  if (!is_half_or_single(problem.q.dtype)) {
    return fmt::format("dtype {}; accepted: f32, f16, bf16", name(problem.q.dtype));
  }
  if (problem.bias && !is_half_or_single(problem.bias.dtype)) {
    return fmt::format("bias of dtype {}; accepted: f32, f16, bf16", name(problem.bias.dtype));
  }
  if (problem.sinks && problem.sinks.dtype != DType::f32) {
    return fmt::format("sinks of dtype {}; accepted: f32", name(problem.sinks.dtype));
  }
  if (problem.dense_mask && problem.dense_mask.dtype != DType::u8) {
    return fmt::format("mask of dtype {}; accepted: u8", name(problem.dense_mask.dtype));
  }
  for (const auto& [view, what] :
       {std::pair{problem.q, "query"}, {problem.k, "key"}, {problem.v, "value"}}) {
    if (const std::string reason = unsupported_rows(view, what); !reason.empty()) return reason;
  }
  return {};
}

void forward(const ForwardCall& call) {
  if (!call.row_invariant && splits_keys(call.problem)) {
    split_forward(call);
    return work_meter().advance(pairs_of_task(call.problem, 1));
  }
  const std::vector<ForwardBlock> blocks = forward_blocks(call.problem);
  std::int64_t scratch_floats = 0;
  for (const ForwardBlock& block : blocks) {
    scratch_floats = std::max(scratch_floats, forward_scratch(call.problem, block.rows));
  }
  const auto tasks = static_cast<std::int64_t>(blocks.size());
  const double task_pairs = pairs_of_task(call.problem, tasks);
  parallel(tasks, scratch_floats, [&](std::int64_t i, Scratch& scratch) {
    forward_rows(call, blocks[static_cast<std::size_t>(i)], scratch);
    work_meter().advance(task_pairs);
  });
}

void backward(const BackwardCall& call) {
  const std::int64_t chunk_keys = backward_chunk_keys(call.problem);
  std::deque<BackwardRows> all = backward_rows(call.problem, chunk_keys);
  const auto heads = static_cast<std::int64_t>(all.size());
  const std::int64_t chunks = (call.problem.seq_kv() + chunk_keys - 1) / chunk_keys;
  const double task_pairs = kBackwardWork * pairs_of_task(call.problem, chunks * heads);
  const auto run = [&](std::int64_t chunk, std::int64_t head, Scratch& scratch) {
    BackwardRows& item = all[static_cast<std::size_t>(head)];
    RowBlock rows = item.rows;
    rows.keys = intersect(rows.keys, {chunk * chunk_keys, (chunk + 1) * chunk_keys});
    backward_keys(call, rows, chunk, item.order, scratch);
    scratch.reserve(0);
    work_meter().advance(task_pairs);
  };
  // Chunks in order, so that whoever waits for an earlier chunk waits for a started one. Heads that
  // share a bias gradient take turns on one thread for each chunk's columns.
  const std::int64_t floats = backward_scratch(call.problem);
  if (shares_grad_bias(call)) {
    parallel(chunks, floats, [&](std::int64_t chunk, Scratch& scratch) {
      for (std::int64_t head = 0; head < heads; ++head) run(chunk, head, scratch);
    });
  } else {
    parallel(chunks * heads, floats,
             [&](std::int64_t i, Scratch& scratch) { run(i / heads, i % heads, scratch); });
  }
}

}  // namespace annulus::kernels::cpu
