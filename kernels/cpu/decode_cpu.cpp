#include "kernels/cpu/decode_cpu.hpp"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "kernels/cpu/decode_pages.hpp"
#include "kernels/cpu/decode_tiles.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/state_rows.hpp"

namespace annulus::kernels::cpu {
namespace {

// Tokens of a part: long enough that its state costs little beside its keys, short enough that the
// parts fill the threads.
constexpr std::int64_t kLeastPart = 512;
constexpr std::int64_t kMostPart = 4096;
constexpr std::int64_t kWantedParts = 32;
// Rows of a KV head in a block: their queries and sums stay in L2.
constexpr std::int64_t kBlockRows = 64;
// With as many blocks of queries as this, their keys are not split.
constexpr std::int64_t kManyBlocks = 16;

float* at(const TensorView& view, std::int64_t i) { return static_cast<float*>(view.data) + i; }

// Some query rows of a sequence and the parts of the keys that they see.
struct RowsTask {
  std::int64_t sequence = 0;
  Span queries;
  Span tokens;
  std::int64_t parts = 0;
  std::int64_t first_part = 0;  // in the list of all
};

std::int64_t integer(const ConstTensorView& view, std::int64_t i) {
  return static_cast<const std::int32_t*>(view.data)[i];
}

std::vector<RowsTask> tasks_of(const DecodeProblem& problem) {
  std::vector<RowsTask> tasks;
  const std::int64_t step = std::max<std::int64_t>(kBlockRows / problem.group_size(), 1);
  for (std::int64_t s = 0; s < problem.sequences(); ++s) {
    const std::int64_t end = integer(problem.query_begin, s + 1);
    for (std::int64_t query = integer(problem.query_begin, s); query < end; query += step) {
      const Span queries{query, std::min(query + step, end)};
      // Both ends of what a row sees grow with its position, but for rows that see nothing.
      Span tokens;
      for (std::int64_t row = queries.begin; row < queries.end; ++row) {
        const Span seen = visible_tokens(problem, s, row);
        if (seen.empty()) continue;
        tokens = tokens.empty()
                     ? seen
                     : Span{std::min(tokens.begin, seen.begin), std::max(tokens.end, seen.end)};
      }
      tasks.push_back({s, queries, tokens, 0, 0});
    }
  }
  return tasks;
}

// Cuts the tokens of every task; returns the length of a part.
std::int64_t cut(std::vector<RowsTask>& tasks) {
  std::int64_t tokens = 0;
  for (const RowsTask& task : tasks) tokens += task.tokens.size();
  std::int64_t part = std::clamp(tokens / kWantedParts / 64 * 64, kLeastPart, kMostPart);
  if (static_cast<std::int64_t>(tasks.size()) >= kManyBlocks) part = std::max(part, tokens);
  std::int64_t first = 0;
  for (RowsTask& task : tasks) {
    task.parts = (task.tokens.size() + part - 1) / part;
    task.first_part = first;
    first += task.parts;
  }
  return part;
}

// Parts of a task that a thread takes one after the other: starting on one takes as long as 4% of
// 2,048 tokens of 8 heads of 128 in bf16.
struct PartsRun {
  const RowsTask* task = nullptr;
  Span parts;
};

// Long runs first and short ones last, so that threads end together.
std::vector<PartsRun> runs_of(const std::vector<RowsTask>& tasks) {
  const int threads = omp_get_max_threads();
  std::int64_t left = tasks.back().first_part + tasks.back().parts;
  std::vector<PartsRun> runs;
  for (const RowsTask& task : tasks) {
    for (std::int64_t i = 0; i < task.parts; i = runs.back().parts.end) {
      const std::int64_t share = threads > 1 ? left / (2 * threads) : left;
      runs.push_back({&task, {i, std::min(task.parts, i + std::max<std::int64_t>(share, 1))}});
      left -= runs.back().parts.size();
    }
  }
  return runs;
}

// Rows [1, queries, heads, dim] of a state.
AttentionState rows_of(const AttentionState& state, Span queries) {
  return {state.accumulator.slice(1, queries), state.row_max.slice(2, queries),
          state.row_sum.slice(2, queries)};
}

AttentionState state_at(float* data, std::int64_t queries, const DecodeProblem& problem) {
  const std::int64_t heads = problem.q_heads();
  float* max = data + queries * heads * problem.value_dim();
  const Shape statistics{1, heads, queries};
  return {TensorView(data, DType::f32, Shape{1, queries, heads, problem.value_dim()}),
          TensorView(max, DType::f32, statistics),
          TensorView(max + queries * heads, DType::f32, statistics)};
}

std::int64_t state_floats(std::int64_t queries, const DecodeProblem& problem) {
  return queries * problem.q_heads() * (problem.value_dim() + 2);
}

// What rows hold before any key: their sinks or nothing.
void start_rows(const DecodeProblem& problem, const AttentionState& state) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  const TensorView& o = state.accumulator;
  for (std::int64_t query = 0; query < o.shape[1]; ++query) {
    for (std::int64_t head = 0; head < o.shape[2]; ++head) {
      const float sink =
          problem.sinks
              ? static_cast<const float*>(problem.sinks.data)[head * problem.sinks.strides[0]]
              : kEmpty;
      std::fill_n(at(o, query * o.strides[1] + head * o.strides[2]), o.shape[3], 0.0F);
      const auto place = [&](const TensorView& view) {
        return at(view, head * view.strides[1] + query * view.strides[2]);
      };
      *place(state.row_max) = sink;
      *place(state.row_sum) = sink == kEmpty ? 0.0F : 1.0F;
    }
  }
}

// [tokens, heads, dim] and [heads, tokens] with a batch of one.
TensorView batched(const TensorView& view) {
  if (!view) return {};
  Shape shape{1, view.shape[0], view.shape[1]};
  Shape strides{0, view.strides[0], view.strides[1]};
  if (view.rank() == 3) {
    shape = Shape{1, view.shape[0], view.shape[1], view.shape[2]};
    strides = Shape{0, view.strides[0], view.strides[1], view.strides[2]};
  }
  return {view.data, view.dtype, shape, strides, view.device};
}

std::string unsupported_dim(const ConstTensorView& view, int dim, std::string_view what) {
  if (view.shape[dim] % 8 != 0 || view.shape[dim] < 8) {
    return fmt::format("{} has {} columns; accepted: multiples of 8", what, view.shape[dim]);
  }
  if (view.strides[dim] != 1) return fmt::format("{} is not contiguous in its columns", what);
  return {};
}

std::int64_t block_scratch(const DecodeProblem& problem, std::int64_t queries) {
  return std::max(decode_pages_scratch(problem, queries), decode_tiles_scratch(problem, queries));
}

void decode_block(const DecodeProblem& problem, const DecodeBlock& block,
                  std::span<const AttentionState> partials, Scratch& scratch) {
  const std::int64_t queries = block.queries.size();
  if (!decode_tiles_fit(problem, queries)) return decode_pages(problem, block, partials, scratch);
  for (std::size_t i = 0; i < partials.size(); ++i) {
    const std::int64_t begin = block.tokens.begin + static_cast<std::int64_t>(i) * block.part;
    DecodeBlock part = block;
    part.tokens = intersect(block.tokens, {begin, begin + block.part});
    if (decode_tiles(problem, part, partials[i], scratch)) continue;
    scratch.reserve(decode_pages_scratch(problem, queries));
    decode_pages(problem, part, partials.subspan(i, 1), scratch);
  }
}

}  // namespace

std::string decode_unsupported(const DecodeProblem& problem) {
  if (problem.q.dtype == DType::f64) return "dtype f64; accepted: f32, f16, bf16";
  for (const std::string& reason :
       {unsupported_dim(problem.q, 2, "query"), unsupported_dim(problem.k, 3, "key"),
        unsupported_dim(problem.v, 3, "value")}) {
    if (!reason.empty()) return reason;
  }
  return {};
}

void decode_forward(const DecodeCall& call) {
  const DecodeProblem& problem = call.problem;
  std::vector<RowsTask> tasks = tasks_of(problem);
  if (tasks.empty()) return;
  const std::int64_t part = cut(tasks);
  std::int64_t floats = 0;
  std::int64_t queries = 1;
  std::vector<std::int64_t> places;  // of the parts' states
  for (const RowsTask& task : tasks) {
    queries = std::max(queries, task.queries.size());
    for (std::int64_t i = 0; i < task.parts; ++i) {
      places.push_back(floats);
      floats += state_floats(task.queries.size(), problem);
    }
  }
  // Not cleared: every part writes all of its own.
  const std::unique_ptr<float[]> states(new float[static_cast<std::size_t>(floats)]);
  const auto state_of = [&](const RowsTask& task, std::int64_t i) {
    const auto place = places[static_cast<std::size_t>(task.first_part + i)];
    return state_at(states.get() + place, task.queries.size(), problem);
  };
  const std::vector<PartsRun> runs = runs_of(tasks);
  parallel(static_cast<std::int64_t>(runs.size()), block_scratch(problem, queries),
           [&](std::int64_t i, Scratch& scratch) {
             const auto& [task, of_task] = runs[static_cast<std::size_t>(i)];
             const Span tokens{task->tokens.begin + of_task.begin * part,
                               task->tokens.begin + of_task.end * part};
             std::vector<AttentionState> partials;
             for (std::int64_t j = of_task.begin; j < of_task.end; ++j) {
               partials.push_back(state_of(*task, j));
             }
             decode_block(problem,
                          {task->sequence, task->queries, intersect(task->tokens, tokens), part},
                          partials, scratch);
           });

  const std::int64_t rows = problem.tokens();
  std::unique_ptr<float[]> total_data;
  AttentionState total = call.state;
  if (call.o) {
    total_data.reset(new float[static_cast<std::size_t>(state_floats(rows, problem))]);
    total = state_at(total_data.get(), rows, problem);
  }
  parallel(static_cast<std::int64_t>(tasks.size()), 0, [&](std::int64_t i, Scratch&) {
    const RowsTask& task = tasks[static_cast<std::size_t>(i)];
    const AttentionState mine = rows_of(total, task.queries);
    start_rows(problem, mine);
    for (std::int64_t j = 0; j < task.parts; ++j) {
      merge_states(state_of(task, j), mine);
    }
    if (!call.o) return;
    const TensorView log_sum_exp = batched(call.log_sum_exp);
    finish_state(mine, batched(call.o).slice(1, task.queries),
                 log_sum_exp ? log_sum_exp.slice(2, task.queries) : log_sum_exp);
  });
}

}  // namespace annulus::kernels::cpu
