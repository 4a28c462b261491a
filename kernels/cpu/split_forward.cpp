#include "kernels/cpu/split_forward.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/cpu/decode_in_place.hpp"
#include "kernels/cpu/decode_rows.hpp"
#include "kernels/cpu/forward_rows.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/state_rows.hpp"

namespace annulus::kernels::cpu {
namespace {

constexpr std::int64_t kPartKeys = 4096;
// Queries × heads of a group up to which a call counts as short.
constexpr std::int64_t kShortRows = 128;

std::int64_t largest_group(const AttentionProblem& problem) {
  std::int64_t largest = 0;
  for (std::int64_t kv_head = 0; kv_head < problem.kv_heads(); ++kv_head) {
    largest = std::max(largest, heads_of_kv_head(problem, kv_head).size());
  }
  return largest;
}

// Owned states of all rows, contiguous: one for each part of the keys.
class States {
 public:
  States(const AttentionProblem& problem, std::int64_t count)
      : rows_(problem.batch() * problem.seq_q() * problem.q_heads()),
        value_dim_(problem.value_dim()),
        accumulator_shape_{problem.batch(), problem.seq_q(), problem.q_heads(), value_dim_},
        statistic_shape_{problem.batch(), problem.q_heads(), problem.seq_q()},
        data_(static_cast<std::size_t>(count * rows_ * (value_dim_ + 2))) {}

  AttentionState operator[](std::int64_t i) {
    float* accumulator = data_.data() + i * rows_ * (value_dim_ + 2);
    float* max = accumulator + rows_ * value_dim_;
    return {TensorView(accumulator, DType::f32, accumulator_shape_),
            TensorView(max, DType::f32, statistic_shape_),
            TensorView(max + rows_, DType::f32, statistic_shape_)};
  }

 private:
  std::int64_t rows_;
  std::int64_t value_dim_;
  Shape accumulator_shape_;
  Shape statistic_shape_;
  std::vector<float> data_;
};

// What the rows hold before any key: the carried state, the sinks, or nothing.
void start(const ForwardCall& call, const AttentionState& state) {
  const AttentionProblem& problem = call.problem;
  if (call.start == ForwardCall::Start::resume) return copy_state(call.state, state);
  auto* accumulator = static_cast<float*>(state.accumulator.data);
  auto* max = static_cast<float*>(state.row_max.data);
  auto* sum = static_cast<float*>(state.row_sum.data);
  std::fill_n(accumulator, state.accumulator.shape.elements(), 0.0F);
  const std::int64_t heads = problem.q_heads();
  for (std::int64_t i = 0; i < state.row_max.shape.elements(); ++i) {
    const std::int64_t head = i / problem.seq_q() % heads;
    max[i] = problem.sinks
                 ? static_cast<const float*>(problem.sinks.data)[head * problem.sinks.strides[0]]
                 : -std::numeric_limits<float>::infinity();
    sum[i] = max[i] == -std::numeric_limits<float>::infinity() ? 0.0F : 1.0F;
  }
}

}  // namespace

bool splits_keys(const AttentionProblem& problem) {
  if (problem.q.shape.elements() == 0) return false;
  const std::int64_t rows = problem.seq_q() * largest_group(problem);
  return rows <= kMostDecodeRows || (rows <= kShortRows && problem.seq_kv() > kPartKeys);
}

void split_forward(const ForwardCall& call) {
  const AttentionProblem& problem = call.problem;
  const std::int64_t parts =
      std::max<std::int64_t>((problem.seq_kv() + kPartKeys - 1) / kPartKeys, 1);
  States states(problem, parts + 1);
  const auto keys_of = [&](std::int64_t part) {
    return intersect({0, problem.seq_kv()}, {part * kPartKeys, (part + 1) * kPartKeys});
  };
  if (problem.seq_q() * largest_group(problem) <= kMostDecodeRows) {
    const std::int64_t floats = std::max(decode_scratch(problem), decode_in_place_scratch(problem));
    parallel(parts * problem.batch(), floats, [&](std::int64_t i, Scratch& scratch) {
      const std::int64_t batch = i % problem.batch();
      const std::int64_t part = i / problem.batch();
      const auto decode =
          decodes_in_place(problem, batch, keys_of(part)) ? decode_in_place : decode_rows;
      decode(problem, batch, keys_of(part), states[part], scratch);
    });
  } else {
    const std::int64_t heads = problem.kv_heads();
    const auto block_of = [&](std::int64_t i) {
      const std::int64_t kv_head = i % heads;
      return RowBlock{i / heads % problem.batch(),
                      kv_head,
                      heads_of_kv_head(problem, kv_head),
                      {0, problem.seq_q()},
                      keys_of(i / heads / problem.batch())};
    };
    std::int64_t floats = 0;
    for (std::int64_t i = 0; i < heads; ++i) {
      floats = std::max(floats, forward_scratch(problem, block_of(i)));
    }
    parallel(parts * problem.batch() * heads, floats, [&](std::int64_t i, Scratch& scratch) {
      const AttentionState state = states[i / heads / problem.batch()];
      const RowBlock block = block_of(i);
      if (block.rows() > 0) forward_rows(call, {block, &state}, scratch);
    });
  }
  const AttentionState total = states[parts];
  start(call, total);
  for (std::int64_t part = 0; part < parts; ++part) merge_states(states[part], total);
  if (call.o) {
    finish_state(total, call.o, call.log_sum_exp);
  } else {
    copy_state(total, call.state);
  }
}

}  // namespace annulus::kernels::cpu
