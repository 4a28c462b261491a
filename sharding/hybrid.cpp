#include "sharding/hybrid.hpp"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "sharding/execution_accounting.hpp"
#include "sharding/gradient_tree.hpp"
#include "sharding/head_exchange.hpp"
#include "sharding/head_parts.hpp"
#include "sharding/own_rows_backward.hpp"
#include "sharding/own_rows_forward.hpp"
#include "sharding/ring.hpp"
#include "sharding/solo_communicator.hpp"
#include "sharding/stage_compute.hpp"
#include "sharding/statistics_rows.hpp"

namespace annulus {
namespace {

using Rows = HeadExchange::Rows;

// A rank without rows may pass null data: a tensor is absent where it has no shape either.
bool is_given(const ConstTensorView& view) { return view.rank() > 0; }

// [batch, rows, heads, 1] as a contiguous [batch, heads, rows], which every kernel reads.
struct Statistics {
  Buffer memory;
  TensorView view;

  Statistics() = default;
  Statistics(const Shape& rows, Device device, Stream stream)
      : memory(device, rows.elements() * size_bytes(DType::f32), stream),
        view(memory.data(), DType::f32, {rows[0], rows[2], rows[1]}, device) {}
  Statistics(const TensorView& rows, Stream stream) : Statistics(rows.shape, rows.device, stream) {
    copy(rows, as_rows(view), stream);
  }
};

// Heads of a bias or dense mask for each rank: its query heads, or the one that all share.
std::vector<Span> pair_heads(const ConstTensorView& view, const std::vector<Span>& q_heads) {
  if (view.shape[1] > 1) return q_heads;
  std::vector<Span> shared;
  for (const Span heads : q_heads) shared.push_back({0, heads.empty() ? 0 : 1});
  return shared;
}

// Memory of one result.
struct Result {
  Buffer memory;
  TensorView view;

  Result() = default;
  Result(DType dtype, const Shape& shape, Device device, Stream stream)
      : memory(device, shape.elements() * size_bytes(dtype), stream),
        view(memory.data(), dtype, shape, device) {}
};

Result cleared(const Shape& shape, Device device, Stream stream) {
  Result result(DType::f32, shape, device, stream);
  fill_bytes(result.memory.data(), device, 0, result.memory.bytes(), stream);
  return result;
}

// Rows against heads for everything that a problem reads, of one part of the heads.
class ExchangedProblem {
 public:
  ExchangedProblem(HeadExchange::Bundle& bundle, const AttentionPlan& plan, const HeadPart& heads,
                   const AttentionProblem& local)
      : bundle_(bundle), plan_(plan), heads_(heads) {
    problem_ = local;
    problem_.q = bundle.to_heads(Rows::queries, local.q, heads.q);
    problem_.k = bundle.to_heads(Rows::keys, local.k, heads.kv);
    problem_.v = bundle.to_heads(Rows::keys, local.v, heads.kv);
    if (is_given(local.bias)) problem_.bias = pairs_to_heads(local.bias);
    if (is_given(local.dense_mask)) problem_.dense_mask = pairs_to_heads(local.dense_mask);
    const auto rank = static_cast<std::size_t>(plan.head_rank());
    const Span own = heads.q[rank];
    problem_.groups = {plan.group_size(), own.begin + plan.request().q_head_offset -
                                              heads.kv[rank].begin * plan.group_size()};
    if (local.sinks) problem_.sinks = local.sinks.slice(0, own);
    problem_.dropout.q_head_begin += own.begin;
  }

  /// Of this rank's heads over the group's rows, which are there once the bundle is.
  const AttentionProblem& problem() const { return problem_; }

 private:
  ConstTensorView pairs_to_heads(const ConstTensorView& pairs) {
    return bundle_.to_heads(Rows::queries, pairs.transposed(1, 2), pair_heads(pairs, heads_.q))
        .transposed(1, 2);
  }

  HeadExchange::Bundle& bundle_;
  const AttentionPlan& plan_;
  const HeadPart& heads_;
  AttentionProblem problem_;
};

// One part of the heads on its way through the forward pass.
class ForwardPart {
 public:
  /// Its rows start to travel.
  ForwardPart(HeadExchange& exchange, const AttentionPlan& plan, const HeadPart& heads,
              const ForwardCall& local)
      : local_(local), heads_(heads), there_(exchange), back_(exchange) {
    call_ = local;
    call_.problem = ExchangedProblem(there_, plan, heads, local.problem).problem();
    there_.start();
  }

  void receive() { there_.receive(); }
  void wait() { there_.wait(); }

  void compute(Communicator& groups, const AttentionPlan& plan, const ExecuteOptions& options) {
    const AttentionProblem& problem = call_.problem;
    const Device device = problem.q.device;
    const Shape rows{problem.batch(), problem.seq_q(), problem.q_heads(), problem.value_dim()};
    o_ = Result(local_.o.dtype, rows, device, local_.stream);
    call_.o = o_.view;
    if (is_given(local_.log_sum_exp)) {
      lse_ = Statistics({rows[0], rows[1], rows[2], 1}, device, local_.stream);
      call_.log_sum_exp = lse_.view;
    }
    ring_forward(groups, plan, call_, options);
  }

  /// Its results start to travel.
  void give_back() {
    back_.to_rows(Rows::queries, o_.view, heads_.q, local_.o, false);
    if (is_given(local_.log_sum_exp)) {
      const TensorView rows = as_rows(lse_.view);
      lse_rows_ = Result(DType::f32, rows.shape, rows.device, local_.stream);
      copy(rows, lse_rows_.view, local_.stream);
      back_.to_rows(Rows::queries, lse_rows_.view, heads_.q, as_rows(local_.log_sum_exp), false);
    }
    back_.start();
    back_.receive();
  }

  void finish() { back_.wait(); }

  std::int64_t buffer_bytes() const {
    return there_.buffer_bytes() + o_.memory.bytes() + lse_.memory.bytes() + back_.buffer_bytes();
  }

 private:
  const ForwardCall& local_;
  const HeadPart& heads_;
  HeadExchange::Bundle there_;
  HeadExchange::Bundle back_;
  ForwardCall call_;
  Result o_;
  Statistics lse_;
  Result lse_rows_;
};

// One part of the heads on its way through the backward pass.
class BackwardPart {
 public:
  BackwardPart(HeadExchange& exchange, const AttentionPlan& plan, const HeadPart& heads,
               const BackwardCall& local)
      : plan_(plan), local_(local), heads_(heads), there_(exchange), back_(exchange) {
    call_ = local;
    call_.problem = ExchangedProblem(there_, plan, heads, local.problem).problem();
    call_.grad_o = there_.to_heads(Rows::queries, local.grad_o, heads.q);
    call_.o = {};  // delta says as much, in fewer bytes
    lse_rows_ = there_.to_heads(Rows::queries, as_rows(local.log_sum_exp), heads.q);
    delta_rows_ = there_.to_heads(Rows::queries, as_rows(local.delta), heads.q);
    there_.start();
  }

  void receive() { there_.receive(); }
  void wait() { there_.wait(); }

  void compute(Communicator& groups, const ExecuteOptions& options) {
    const Stream stream = local_.stream;
    const AttentionProblem& problem = call_.problem;
    const Device device = problem.q.device;
    const Statistics lse(lse_rows_, stream);
    const Statistics delta(delta_rows_, stream);
    call_.log_sum_exp = lse.view;
    call_.delta = delta.view;
    if (is_given(local_.grad_q)) grad_q_ = cleared(problem.q.shape, device, stream);
    const std::int64_t heads = by_query_head() ? problem.q_heads() : problem.kv_heads();
    grad_k_ = cleared(with_heads(problem.k.shape, heads), device, stream);
    grad_v_ = cleared(with_heads(problem.v.shape, heads), device, stream);
    call_.grad_q = grad_q_.view;
    call_.grad_k = grad_k_.view;
    call_.grad_v = grad_v_.view;
    if (is_given(local_.grad_bias)) {
      const Shape& pairs = problem.bias.shape;
      grad_bias_ = cleared({pairs[0], pairs[2], pairs[1], pairs[3]}, device, stream);
      call_.grad_bias = grad_bias_.view.transposed(1, 2);
    }
    ring_backward(groups, plan_, call_, options);
  }

  void give_back() {
    TensorView grad_k = local_.grad_k;
    TensorView grad_v = local_.grad_v;
    if (by_query_head()) {
      const std::int64_t heads = plan_.request().q_heads;
      rows_k_ = cleared(with_heads(grad_k.shape, heads), grad_k.device, local_.stream);
      rows_v_ = cleared(with_heads(grad_v.shape, heads), grad_v.device, local_.stream);
      grad_k = rows_k_.view;
      grad_v = rows_v_.view;
    }
    const std::vector<Span>& heads = by_query_head() ? heads_.q : heads_.kv;
    back_.to_rows(Rows::keys, grad_k_.view, heads, grad_k, true);
    back_.to_rows(Rows::keys, grad_v_.view, heads, grad_v, true);
    if (is_given(local_.grad_q)) {
      back_.to_rows(Rows::queries, grad_q_.view, heads_.q, local_.grad_q, true);
    }
    if (is_given(local_.grad_bias)) {
      back_.to_rows(Rows::queries, grad_bias_.view, pair_heads(local_.grad_bias, heads_.q),
                    local_.grad_bias.transposed(1, 2), true);
    }
    back_.start();
    back_.receive();
  }

  void finish() {
    back_.wait();
    if (!by_query_head()) return;
    const HeadGroups groups{plan_.group_size(), plan_.request().q_head_offset};
    add_query_heads(rows_k_.view, local_.grad_k, groups, local_.stream);
    add_query_heads(rows_v_.view, local_.grad_v, groups, local_.stream);
  }

  std::int64_t buffer_bytes() const {
    std::int64_t bytes = there_.buffer_bytes() + back_.buffer_bytes();
    for (const Result* result : {&grad_q_, &grad_k_, &grad_v_, &grad_bias_, &rows_k_, &rows_v_}) {
      bytes += result->memory.bytes();
    }
    return bytes;
  }

 private:
  // Where blocks of queries have sums of their own, so have the query heads of a KV head.
  bool by_query_head() const { return plan_.request().q_block_rows > 0; }
  static Shape with_heads(Shape shape, std::int64_t heads) {
    shape[2] = heads;
    return shape;
  }

  const AttentionPlan& plan_;
  const BackwardCall& local_;
  const HeadPart& heads_;
  HeadExchange::Bundle there_;
  HeadExchange::Bundle back_;
  BackwardCall call_;
  TensorView lse_rows_, delta_rows_;
  Result grad_q_, grad_k_, grad_v_, grad_bias_;
  Result rows_k_, rows_v_;  // of all query heads
};

// While one part is computed, the next one's rows arrive and the results of the one before leave.
template <typename Part, typename Start, typename Compute>
std::int64_t run_parts(std::size_t count, const Start& start, const Compute& compute,
                       ExecutionAccounting& accounting, StageRecorder* recorder) {
  std::vector<std::unique_ptr<Part>> parts;
  for (std::size_t i = 0; i < count; ++i) {
    {
      const ScopedTimer timer(accounting.exposed_seconds());
      const RecordedSpan span(recorder, StageRecord::Kind::exchange, static_cast<int>(i));
      while (parts.size() < std::min(i + 2, count)) parts.push_back(start(parts.size()));
      parts[i]->wait();
    }
    compute(*parts[i]);
    const ScopedTimer timer(accounting.exposed_seconds());
    if (i + 1 < count) parts[i + 1]->receive();
    parts[i]->give_back();
  }
  const ScopedTimer timer(accounting.exposed_seconds());
  const RecordedSpan span(recorder, StageRecord::Kind::exchange);
  std::int64_t buffer_bytes = 0;
  for (const std::unique_ptr<Part>& part : parts) {
    part->finish();
    buffer_bytes += part->buffer_bytes();
  }
  return buffer_bytes;
}

std::vector<HeadPart> choose_parts(const AttentionPlan& plan, const AttentionProblem& local,
                                   const ExecuteOptions& options) {
  if (is_given(local.bias) || is_given(local.dense_mask)) return head_parts(plan, 1);
  if (options.head_parts > 0) return head_parts(plan, options.head_parts);
  const AttentionSizes sizes{local.head_dim(), local.value_dim(), size_bytes(local.q.dtype), true};
  // A processor's own core moves the rows.
  return head_parts(plan, local.q.device == Device::cuda ? choose_head_parts(plan, sizes) : 1);
}

}  // namespace

HybridRanks::HybridRanks(Communicator& ranks, int head_ranks) : heads_(&ranks), groups_(&ranks) {
  if (head_ranks == ranks.size()) {
    alone_ = std::make_unique<SoloCommunicator>(ranks.device());
    groups_ = alone_.get();
  } else if (head_ranks == 1) {
    alone_ = std::make_unique<SoloCommunicator>(ranks.device());
    heads_ = alone_.get();
  } else {
    const std::string by = " by " + std::to_string(head_ranks);
    heads_ = &ranks.part("heads" + by, ranks.rank() / head_ranks, ranks.rank());
    groups_ = &ranks.part("groups" + by, ranks.rank() % head_ranks, ranks.rank());
  }
}

int find_node_ranks(Communicator& ranks) {
  const std::unique_ptr<Window> window = ranks.expose(64);
  int first = ranks.rank();
  int last = ranks.rank();
  while (first > 0 && window->peer(first - 1) != nullptr) --first;
  while (last + 1 < ranks.size() && window->peer(last + 1) != nullptr) ++last;
  const int mine = last + 1 - first;
  std::vector<int> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  const bool equal = std::all_of(all.begin(), all.end(), [&](int n) { return n == all.front(); });
  return equal && ranks.size() % mine == 0 ? mine : 1;
}

void hybrid_forward(HybridRanks& ranks, const AttentionPlan& plan, const ForwardCall& local,
                    const ExecuteOptions& options) {
  if (plan.head_ranks() == 1) return ring_forward(ranks.groups(), plan, local, options);
  if (forward_own_rows_in_place(ranks.heads(), plan, local, options)) return;
  ExecutionAccounting accounting(ranks.heads(), options, local.problem, local.stream);
  HeadExchange exchange(ranks.heads(), plan, local.stream);
  const std::vector<HeadPart> heads = choose_parts(plan, local.problem, options);
  const auto start = [&](std::size_t part) {
    return std::make_unique<ForwardPart>(exchange, plan, heads[part], local);
  };
  const auto compute = [&](ForwardPart& part) { part.compute(ranks.groups(), plan, options); };
  accounting.close(
      run_parts<ForwardPart>(heads.size(), start, compute, accounting, options.recorder));
}

void hybrid_backward(HybridRanks& ranks, const AttentionPlan& plan, const BackwardCall& local,
                     const ExecuteOptions& options) {
  if (plan.head_ranks() == 1) return ring_backward(ranks.groups(), plan, local, options);
  if (backward_own_rows_in_place(ranks.heads(), plan, local, options)) return;
  ExecutionAccounting accounting(ranks.heads(), options, local.problem, local.stream);
  HeadExchange exchange(ranks.heads(), plan, local.stream);
  const std::vector<HeadPart> heads = choose_parts(plan, local.problem, options);
  const auto start = [&](std::size_t part) {
    return std::make_unique<BackwardPart>(exchange, plan, heads[part], local);
  };
  const auto compute = [&](BackwardPart& part) { part.compute(ranks.groups(), options); };
  accounting.close(
      run_parts<BackwardPart>(heads.size(), start, compute, accounting, options.recorder));
}

}  // namespace annulus
