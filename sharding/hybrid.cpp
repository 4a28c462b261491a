#include "sharding/hybrid.hpp"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sharding/execution_accounting.hpp"
#include "sharding/gradient_tree.hpp"
#include "sharding/head_exchange.hpp"
#include "sharding/ring.hpp"
#include "sharding/solo_communicator.hpp"
#include "sharding/stage_compute.hpp"

namespace annulus {
namespace {

using Rows = HeadExchange::Rows;
using Pending = HeadExchange::Pending;

// A rank without rows may pass null data: a tensor is absent where it has no shape either.
bool is_given(const ConstTensorView& view) { return view.rank() > 0; }

// [batch, heads, rows] seen as [batch, rows, heads, 1], and back.
template <typename View>
View as_rows(const View& statistics) {
  View view = statistics;
  view.shape = {statistics.shape[0], statistics.shape[2], statistics.shape[1], 1};
  view.strides = {statistics.strides[0], statistics.strides[2], statistics.strides[1], 1};
  return view;
}

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

// Memory of one exchanged result, cleared.
struct Cleared {
  Buffer memory;
  TensorView view;

  Cleared() = default;
  Cleared(DType dtype, const Shape& shape, Device device, Stream stream)
      : memory(device, shape.elements() * size_bytes(dtype), stream),
        view(memory.data(), dtype, shape, device) {
    fill_bytes(memory.data(), device, 0, memory.bytes(), stream);
  }
};

// Rows against heads for everything that a problem reads.
class ExchangedProblem {
 public:
  ExchangedProblem(HeadExchange& exchange, const AttentionPlan& plan, const AttentionProblem& local)
      : exchange_(exchange),
        plan_(plan),
        q_heads_(exchange.q_heads()),
        kv_heads_(exchange.kv_heads()) {
    q_ = exchange.to_heads(Rows::queries, local.q, q_heads_);
    k_ = exchange.to_heads(Rows::keys, local.k, kv_heads_);
    v_ = exchange.to_heads(Rows::keys, local.v, kv_heads_);
    if (is_given(local.bias)) bias_ = pairs_to_heads(local.bias);
    if (is_given(local.dense_mask)) dense_mask_ = pairs_to_heads(local.dense_mask);
  }

  /// The problem of this rank's heads over the group's rows.
  AttentionProblem wait(const AttentionProblem& local) {
    const Span own = plan_.q_heads_of(plan_.head_rank());
    const Span own_kv = plan_.kv_heads_of(plan_.head_rank());
    for (Pending* pending : {&q_, &k_, &v_, &bias_, &dense_mask_}) pending->wait();
    AttentionProblem problem = local;
    problem.q = q_.result();
    problem.k = k_.result();
    problem.v = v_.result();
    problem.groups = {plan_.group_size(), own.begin + plan_.request().q_head_offset -
                                              own_kv.begin * plan_.group_size()};
    if (local.sinks) problem.sinks = local.sinks.slice(0, own);
    if (is_given(local.bias)) problem.bias = bias_.result().transposed(1, 2);
    if (is_given(local.dense_mask)) problem.dense_mask = dense_mask_.result().transposed(1, 2);
    problem.dropout.q_head_begin += own.begin;
    return problem;
  }

  std::int64_t buffer_bytes() const {
    std::int64_t bytes = 0;
    for (const Pending* pending : {&q_, &k_, &v_, &bias_, &dense_mask_}) {
      bytes += pending->buffer_bytes();
    }
    return bytes;
  }
  const std::vector<Span>& q_heads() const { return q_heads_; }
  const std::vector<Span>& kv_heads() const { return kv_heads_; }

 private:
  Pending pairs_to_heads(const ConstTensorView& pairs) {
    return exchange_.to_heads(Rows::queries, pairs.transposed(1, 2), pair_heads(pairs, q_heads_));
  }

  HeadExchange& exchange_;
  const AttentionPlan& plan_;
  std::vector<Span> q_heads_;
  std::vector<Span> kv_heads_;
  Pending q_, k_, v_, bias_, dense_mask_;
};

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
  ExecutionAccounting accounting(ranks.heads(), options, local.problem, local.stream);
  HeadExchange exchange(ranks.heads(), plan, local.stream);
  ForwardCall inner = local;
  std::int64_t buffer_bytes = 0;
  {
    std::optional<ScopedTimer> timer(accounting.exposed_seconds());
    std::optional<RecordedSpan> span(std::in_place, options.recorder, StageRecord::Kind::exchange);
    ExchangedProblem exchanged(exchange, plan, local.problem);
    inner.problem = exchanged.wait(local.problem);
    const Device device = local.problem.q.device;
    const Shape rows{inner.problem.batch(), inner.problem.seq_q(), inner.problem.q_heads(),
                     inner.problem.value_dim()};
    const Cleared o(local.o.dtype, rows, device, local.stream);
    const Shape statistics{rows[0], rows[1], rows[2], 1};
    Statistics lse;
    if (is_given(local.log_sum_exp)) lse = Statistics(statistics, device, local.stream);
    inner.o = o.view;
    inner.log_sum_exp = lse.view;
    timer.reset();
    span.reset();
    ring_forward(ranks.groups(), plan, inner, options);
    timer.emplace(accounting.exposed_seconds());
    span.emplace(options.recorder, StageRecord::Kind::exchange);
    Pending o_back = exchange.to_rows(Rows::queries, o.view, exchanged.q_heads(), local.o, false);
    Pending lse_back;
    Cleared lse_rows;
    if (is_given(local.log_sum_exp)) {
      lse_rows = Cleared(DType::f32, statistics, device, local.stream);
      copy(as_rows(lse.view), lse_rows.view, local.stream);
      lse_back = exchange.to_rows(Rows::queries, lse_rows.view, exchanged.q_heads(),
                                  as_rows(local.log_sum_exp), false);
    }
    o_back.wait();
    lse_back.wait();
    buffer_bytes = exchanged.buffer_bytes() + o.memory.bytes() + lse.memory.bytes() +
                   o_back.buffer_bytes() + lse_back.buffer_bytes();
  }
  accounting.close(buffer_bytes);
}

void hybrid_backward(HybridRanks& ranks, const AttentionPlan& plan, const BackwardCall& local,
                     const ExecuteOptions& options) {
  if (plan.head_ranks() == 1) return ring_backward(ranks.groups(), plan, local, options);
  ExecutionAccounting accounting(ranks.heads(), options, local.problem, local.stream);
  HeadExchange exchange(ranks.heads(), plan, local.stream);
  std::int64_t buffer_bytes = 0;
  {
    std::optional<ScopedTimer> timer(accounting.exposed_seconds());
    std::optional<RecordedSpan> span(std::in_place, options.recorder, StageRecord::Kind::exchange);
    ExchangedProblem exchanged(exchange, plan, local.problem);
    const std::vector<Span>& q_heads = exchanged.q_heads();
    const std::vector<Span>& kv_heads = exchanged.kv_heads();
    Pending grad_o = exchange.to_heads(Rows::queries, local.grad_o, q_heads);
    Pending lse = exchange.to_heads(Rows::queries, as_rows(local.log_sum_exp), q_heads);
    Pending delta = exchange.to_heads(Rows::queries, as_rows(local.delta), q_heads);
    BackwardCall inner = local;
    inner.problem = exchanged.wait(local.problem);
    for (Pending* pending : {&grad_o, &lse, &delta}) pending->wait();
    inner.grad_o = grad_o.result();
    inner.o = {};  // delta says as much, in fewer bytes
    const Statistics own_lse(lse.result(), local.stream);
    const Statistics own_delta(delta.result(), local.stream);
    inner.log_sum_exp = own_lse.view;
    inner.delta = own_delta.view;
    const Device device = local.problem.q.device;
    const auto cleared = [&](const Shape& shape) {
      return Cleared(DType::f32, shape, device, local.stream);
    };
    Cleared grad_q;
    if (is_given(local.grad_q)) grad_q = cleared(inner.problem.q.shape);
    // Where blocks of queries have sums of their own, so have the query heads of a KV head.
    const bool by_query_head = plan.request().q_block_rows > 0;
    const std::vector<Span>& grad_heads = by_query_head ? q_heads : kv_heads;
    const auto with_heads = [&](Shape shape, std::int64_t heads) {
      shape[2] = heads;
      return cleared(shape);
    };
    const Cleared grad_k = with_heads(inner.problem.k.shape, plan.gradient_heads());
    const Cleared grad_v = with_heads(inner.problem.v.shape, plan.gradient_heads());
    Cleared rows_k, rows_v;  // of all query heads
    if (by_query_head) {
      rows_k = with_heads(local.grad_k.shape, plan.request().q_heads);
      rows_v = with_heads(local.grad_v.shape, plan.request().q_heads);
    }
    inner.grad_q = grad_q.view;
    inner.grad_k = grad_k.view;
    inner.grad_v = grad_v.view;
    Cleared grad_bias;  // [batch|1, rows, heads|1, columns]
    if (is_given(local.grad_bias)) {
      const Shape& heads = inner.problem.bias.shape;
      grad_bias = cleared({heads[0], heads[2], heads[1], heads[3]});
      inner.grad_bias = grad_bias.view.transposed(1, 2);
    }
    timer.reset();
    span.reset();
    ring_backward(ranks.groups(), plan, inner, options);
    timer.emplace(accounting.exposed_seconds());
    span.emplace(options.recorder, StageRecord::Kind::exchange);
    std::vector<Pending> back;
    back.push_back(exchange.to_rows(Rows::keys, grad_k.view, grad_heads,
                                    by_query_head ? rows_k.view : local.grad_k, true));
    back.push_back(exchange.to_rows(Rows::keys, grad_v.view, grad_heads,
                                    by_query_head ? rows_v.view : local.grad_v, true));
    if (is_given(local.grad_q)) {
      back.push_back(exchange.to_rows(Rows::queries, grad_q.view, q_heads, local.grad_q, true));
    }
    if (is_given(local.grad_bias)) {
      back.push_back(exchange.to_rows(Rows::queries, grad_bias.view,
                                      pair_heads(local.grad_bias, q_heads),
                                      local.grad_bias.transposed(1, 2), true));
    }
    buffer_bytes = exchanged.buffer_bytes() + grad_o.buffer_bytes() + lse.buffer_bytes() +
                   delta.buffer_bytes() + grad_q.memory.bytes() + grad_k.memory.bytes() +
                   grad_v.memory.bytes() + grad_bias.memory.bytes();
    for (Pending& pending : back) {
      pending.wait();
      buffer_bytes += pending.buffer_bytes();
    }
    if (by_query_head) {
      const HeadGroups groups{plan.group_size(), plan.request().q_head_offset};
      add_query_heads(rows_k.view, local.grad_k, groups, local.stream);
      add_query_heads(rows_v.view, local.grad_v, groups, local.stream);
      buffer_bytes += rows_k.memory.bytes() + rows_v.memory.bytes();
    }
  }
  accounting.close(buffer_bytes);
}

}  // namespace annulus
