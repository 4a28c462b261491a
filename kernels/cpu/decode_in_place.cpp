#include "kernels/cpu/decode_in_place.hpp"

#include <array>

#include "kernels/cpu/decode_pages.hpp"
#include "kernels/cpu/key_runs.hpp"
#include "kernels/cpu/row_block.hpp"

namespace annulus::kernels {
namespace {

/// A batch row as a sequence of one page, and the integers that say so.
class OnePage {
 public:
  OnePage(const AttentionProblem& problem, std::int64_t batch)
      : query_begin_{0, static_cast<std::int32_t>(problem.seq_q())},
        length_(static_cast<std::int32_t>(problem.seq_kv())) {
    problem_.q = row_of(problem.q, batch, false);
    problem_.k = row_of(problem.k, batch, true);
    problem_.v = row_of(problem.v, batch, true);
    problem_.query_begin = {query_begin_.data(), DType::i32, Shape{2}};
    problem_.page_table = {&page_, DType::i32, Shape{1, 1}};
    problem_.lengths = {&length_, DType::i32, Shape{1}};
    problem_.scale = problem.scale;
    problem_.soft_cap = problem.soft_cap;
    problem_.causal = false;
  }
  OnePage(const OnePage&) = delete;
  OnePage& operator=(const OnePage&) = delete;

  const DecodeProblem& problem() const { return problem_; }

 private:
  // [seq, heads, dim], or [1, seq, heads, dim].
  static ConstTensorView row_of(const ConstTensorView& view, std::int64_t batch, bool page) {
    const ConstTensorView row = view.slice(0, {batch, batch + 1});
    if (page) return row;
    const Shape& n = row.shape;
    const Shape& s = row.strides;
    return {row.data, row.dtype, Shape{n[1], n[2], n[3]}, Shape{s[1], s[2], s[3]}, row.device};
  }

  std::array<std::int32_t, 2> query_begin_;
  std::int32_t length_;
  std::int32_t page_ = 0;
  DecodeProblem problem_;
};

bool serves(const ConstTensorView& view) {
  const int last = view.rank() - 1;
  return view.strides[last] == 1 && view.shape[last] % 8 == 0 && view.dtype != DType::f64;
}

bool even_groups(const AttentionProblem& problem) {
  if (problem.q_heads() % problem.kv_heads() != 0) return false;
  const std::int64_t group = problem.q_heads() / problem.kv_heads();
  for (std::int64_t head = 0; head < problem.kv_heads(); ++head) {
    if (heads_of_kv_head(problem, head) != Span{head * group, (head + 1) * group}) return false;
  }
  return true;
}

}  // namespace

bool decodes_in_place(const AttentionProblem& problem, std::int64_t batch, Span keys) {
  if (problem.bias || problem.dense_mask || problem.dropout.probability > 0.0F || keys.empty() ||
      problem.seq_kv() >= (std::int64_t{1} << 31) || !serves(problem.q) || !serves(problem.k) ||
      !serves(problem.v) || !even_groups(problem)) {
    return false;
  }
  KeyRuns runs;
  const auto found = runs.find(problem.mask.of_batch(batch), {0, problem.seq_q()}, keys);
  return found.size() == 1 && found.front().full && found.front().keys == keys;
}

std::int64_t decode_in_place_scratch(const AttentionProblem& problem) {
  if (problem.kv_heads() == 0 || problem.batch() == 0) return 0;
  return decode_pages_scratch(OnePage(problem, 0).problem(), problem.seq_q());
}

void decode_in_place(const AttentionProblem& problem, std::int64_t batch, Span keys,
                     const AttentionState& partial, Scratch& scratch) {
  const OnePage page(problem, batch);
  const Span row{batch, batch + 1};
  const AttentionState state{partial.accumulator.slice(0, row), partial.row_max.slice(0, row),
                             partial.row_sum.slice(0, row)};
  decode_pages(page.problem(), {0, {0, problem.seq_q()}, keys, keys.size()}, {&state, 1}, scratch);
}

}  // namespace annulus::kernels
