#include "sharding/attention_case.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "kernels/attention_reference.hpp"
#include "kernels/buffer.hpp"
#include "sharding/memory_model.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

HostTensor random_tensor(const Shape& shape, std::mt19937_64& random) {
  HostTensor tensor(shape);
  std::normal_distribution<float> normal;
  for (float& value : tensor.data) value = normal(random);
  return tensor;
}

std::int64_t bias_heads(const AttentionCase& c) {
  return c.bias_heads > 0 ? c.bias_heads : c.q_heads;
}

AttentionProblem whole_problem(const AttentionCase& c, const AttentionTensors& t,
                               const MaskSlices& slices) {
  AttentionProblem problem;
  problem.q = t.q.view;
  problem.k = t.k.view;
  problem.v = t.v.view;
  problem.mask = slices.view();
  problem.scale = 1.0F / std::sqrt(static_cast<float>(c.head_dim));
  problem.soft_cap = c.soft_cap;
  if (c.sinks) problem.sinks = t.sinks.view;
  if (c.bias) problem.bias = t.bias.view;
  if (c.dense_mask) {
    problem.dense_mask =
        ConstTensorView(t.dense_mask.data(), DType::u8, Shape{c.batch, 1, c.seq_q, c.seq_kv});
  }
  problem.dropout.probability = c.dropout;
  problem.dropout.seed = 99;
  return problem;
}

// The rows of `runs`, one after the other, of dimension `dim`.
template <typename Visit>
void for_each_run(std::span<const RowRun> runs, int dim, const TensorView& whole,
                  const TensorView& local, Visit visit) {
  for (const RowRun& run : runs) visit(whole.slice(dim, run.global), local.slice(dim, run.rows()));
}

/// A rank's rows of a tensor, in memory of its own.
class Shard {
 public:
  Shard(const HostTensor& whole, int dim, std::span<const RowRun> runs, std::int64_t rows,
        bool head_major = false)
      : dim_(dim), runs_(runs) {
    if (!whole.view) return;
    Shape shape = whole.view.shape;
    shape[dim] = rows;
    if (head_major) std::swap(shape[1], shape[2]);
    tensor_ = HostTensor(shape, kNaN);
    view_ = head_major ? tensor_.view.transposed(1, 2) : tensor_.view;
  }
  const TensorView& view() const { return view_; }
  void load(const HostTensor& whole) {
    if (!whole.view) return;
    for_each_run(runs_, dim_, whole.view, view_,
                 [](const TensorView& from, const TensorView& to) { copy(from, to); });
  }
  void clear() { std::fill(tensor_.data.begin(), tensor_.data.end(), 0.0F); }
  void store(HostTensor& whole) const {
    if (!whole.view) return;
    for_each_run(runs_, dim_, whole.view, view_,
                 [](const TensorView& to, const TensorView& from) { copy(from, to); });
  }

 private:
  int dim_;
  std::span<const RowRun> runs_;
  HostTensor tensor_;
  TensorView view_;
};

// Holds what an execution reports to what its plan predicts.
class CostCheck {
 public:
  CostCheck(const AttentionCase& c, const AttentionPlan& plan, const RunOptions& options)
      : name_(c.name),
        plan_(plan),
        run_(options),
        options_(options.execute),
        plain_(!c.bias && !c.dense_mask),
        one_call_a_stage_(c.dropout == 0.0F && !c.head_major),
        has_sinks_(c.sinks) {
    sizes_.head_dim = c.head_dim;
    sizes_.value_dim = c.value_dim;
    sizes_.element_bytes = 4;
  }
  const ExecuteOptions& options() {
    report_ = {};
    options_.report = &report_;
    return options_;
  }
  void expect_forward() const {
    if (run_.execute.report != nullptr) *run_.execute.report = report_;
    expect_bytes(plan_.forward_bytes(sizes_.head_dim, sizes_.value_dim, 4, true));
    // Sinks cost a state more where blocks are merged.
    if (plan_.request().block_rows > 0 && has_sinks_) return;
    expect_memory(forward_buffer_bytes(plan_, sizes_, {.in_place = run_.execute.in_place}));
  }
  void expect_backward() const {
    expect_bytes(plan_.backward_bytes(sizes_.head_dim, sizes_.value_dim, 4));
    expect_memory(backward_buffer_bytes(plan_, sizes_, {.in_place = run_.execute.in_place}));
  }

 private:
  // Bias and dense mask are moved between heads besides; rows read in place are not sent.
  void expect_bytes(std::int64_t planned) const {
    if (!plain_) return;
    if (run_.execute.in_place) {
      EXPECT_LE(report_.bytes_sent, planned);
    } else {
      EXPECT_EQ(report_.bytes_sent, planned);
    }
  }
  void expect_memory(std::int64_t predicted) const {
    if (!plain_ || !one_call_a_stage_) return;
    if (run_.execute.in_place && run_.ranks_per_node != 0) return;
    constexpr double kAlignment = 2048.0;  // of the few buffers there are
    EXPECT_NEAR(static_cast<double>(report_.buffer_bytes), static_cast<double>(predicted),
                0.1 * static_cast<double>(predicted) + kAlignment)
        << name_ << ", " << name(plan_.scheme()) << ", rank " << plan_.rank() << " of "
        << plan_.ranks() << (run_.execute.in_place ? ", in place" : ", messages");
  }

  std::string name_;
  const AttentionPlan& plan_;
  const RunOptions& run_;
  ExecuteOptions options_;
  bool plain_;
  bool one_call_a_stage_;
  bool has_sinks_;
  AttentionSizes sizes_;
  ExecutionReport report_;
};

void expect_close(const HostTensor& found, const HostTensor& expected, double tolerance,
                  const char* what) {
  EXPECT_LE(max_difference(found, expected), tolerance) << what;
}

void expect_gradient(const HostTensor& found, const HostTensor& expected, const char* what) {
  double difference = 0.0;
  double norm = 0.0;
  for (std::size_t i = 0; i < expected.data.size(); ++i) {
    const double error = static_cast<double>(found.data[i]) - static_cast<double>(expected.data[i]);
    difference += error * error;
    norm += static_cast<double>(expected.data[i]) * static_cast<double>(expected.data[i]);
  }
  // Where the gradient itself cancels to nothing, a few roundings of its terms of order 1 remain.
  const double rounding = 1e-6 * std::sqrt(static_cast<double>(expected.data.size()));
  EXPECT_LE(std::sqrt(difference), 1e-4 * std::sqrt(norm) + rounding) << what;
}

}  // namespace

HostTensor::HostTensor(const Shape& shape, float value)
    : data(static_cast<std::size_t>(shape.elements()), value),
      view(data.data(), DType::f32, shape) {}

HostTensor::HostTensor(const HostTensor& other) : data(other.data), view(other.view) {
  view.data = other.view ? data.data() : nullptr;
}

HostTensor& HostTensor::operator=(const HostTensor& other) {
  data = other.data;
  view = other.view;
  view.data = other.view ? data.data() : nullptr;
  return *this;
}

AttentionTensors random_tensors(const AttentionCase& c, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const Shape q{c.batch, c.seq_q, c.q_heads, c.head_dim};
  const Shape o{c.batch, c.seq_q, c.q_heads, c.value_dim};
  const Shape k{c.batch, c.seq_kv, c.kv_heads, c.head_dim};
  const Shape v{c.batch, c.seq_kv, c.kv_heads, c.value_dim};
  const Shape statistics{c.batch, c.q_heads, c.seq_q};
  AttentionTensors t;
  t.q = random_tensor(q, random);
  t.k = random_tensor(k, random);
  t.v = random_tensor(v, random);
  t.grad_o = random_tensor(o, random);
  if (c.sinks) t.sinks = random_tensor({c.q_heads}, random);
  const Shape pairs{c.batch, bias_heads(c), c.seq_q, c.seq_kv};
  if (c.bias) t.bias = random_tensor(pairs, random);
  if (c.dense_mask) {
    t.dense_mask.resize(static_cast<std::size_t>(c.batch * c.seq_q * c.seq_kv));
    for (std::uint8_t& keep : t.dense_mask) keep = random() % 3 != 0;
  }
  t.o = HostTensor(o, kNaN);
  t.lse = HostTensor(statistics, kNaN);
  t.delta = HostTensor(statistics, kNaN);
  t.grad_q = HostTensor(q, kNaN);
  t.grad_k = HostTensor(k, kNaN);
  t.grad_v = HostTensor(v, kNaN);
  if (c.bias) t.grad_bias = HostTensor(pairs, kNaN);
  return t;
}

void run_reference(const AttentionCase& c, AttentionTensors& t) {
  const MaskSlices slices = make_slices(c.mask, c.batch, c.seq_q, c.seq_kv);
  ForwardCall forward;
  forward.problem = whole_problem(c, t, slices);
  forward.o = t.o.view;
  forward.log_sum_exp = t.lse.view;
  kernels::reference::forward(forward);
  attention_delta(t.o.view, t.grad_o.view, t.delta.view);
  for (HostTensor* gradient : {&t.grad_q, &t.grad_k, &t.grad_v, &t.grad_bias}) {
    std::fill(gradient->data.begin(), gradient->data.end(), 0.0F);
  }
  BackwardCall backward;
  backward.problem = forward.problem;
  backward.grad_o = t.grad_o.view;
  backward.log_sum_exp = t.lse.view;
  backward.delta = t.delta.view;
  backward.grad_q = t.grad_q.view;
  backward.grad_k = t.grad_k.view;
  backward.grad_v = t.grad_v.view;
  if (c.bias) backward.grad_bias = t.grad_bias.view;
  kernels::reference::backward(backward);
}

std::shared_ptr<PlanRequest> request_of(const AttentionCase& c, Scheme scheme,
                                        const SequenceLayout& q, const SequenceLayout& kv) {
  auto request = std::make_shared<PlanRequest>();
  request->scheme = scheme;
  request->q_layout = q;
  request->kv_layout = kv;
  request->mask = make_slices(c.mask, c.batch, c.seq_q, c.seq_kv);
  request->batch = c.batch;
  request->q_heads = c.q_heads;
  request->kv_heads = c.kv_heads;
  request->stage_rows = 0;
  return request;
}

void run_rank(Communicator& ranks, const AttentionCase& c,
              const std::shared_ptr<const PlanRequest>& request, AttentionTensors& t,
              const RunOptions& options) {
  const int rank = ranks.rank();
  const std::span<const RowRun> q_runs = request->q_layout.runs(rank);
  const std::span<const RowRun> k_runs = request->kv_layout.runs(rank);
  const std::int64_t q_rows = request->q_layout.rows(rank);
  const std::int64_t k_rows = request->kv_layout.rows(rank);
  Shard q(t.q, 1, q_runs, q_rows, c.head_major), o(t.o, 1, q_runs, q_rows);
  Shard k(t.k, 1, k_runs, k_rows, c.head_major), v(t.v, 1, k_runs, k_rows, c.head_major);
  Shard grad_o(t.grad_o, 1, q_runs, q_rows), grad_q(t.grad_q, 1, q_runs, q_rows);
  Shard grad_k(t.grad_k, 1, k_runs, k_rows), grad_v(t.grad_v, 1, k_runs, k_rows);
  Shard lse(t.lse, 2, q_runs, q_rows), delta(t.delta, 2, q_runs, q_rows);
  Shard bias(t.bias, 2, q_runs, q_rows), grad_bias(t.grad_bias, 2, q_runs, q_rows);
  q.load(t.q);
  k.load(t.k);
  v.load(t.v);
  grad_o.load(t.grad_o);
  bias.load(t.bias);
  std::vector<std::uint8_t> dense(static_cast<std::size_t>(c.batch * q_rows * c.seq_kv));

  ForwardCall forward;
  forward.problem = whole_problem(c, t, {});
  if (c.dense_mask) {
    const TensorView local(dense.data(), DType::u8, Shape{c.batch, 1, q_rows, c.seq_kv});
    for (const RowRun& run : q_runs) {
      copy(forward.problem.dense_mask.slice(2, run.global), local.slice(2, run.rows()));
    }
    forward.problem.dense_mask = local;
  }
  forward.problem.q = q.view();
  forward.problem.k = k.view();
  forward.problem.v = v.view();
  forward.problem.bias = bias.view();
  forward.o = o.view();
  forward.log_sum_exp = lse.view();
  const AttentionPlan plan(request, rank);
  CostCheck costs(c, plan, options);
  execute_forward(ranks, plan, forward, costs.options());
  costs.expect_forward();
  o.store(t.o);
  lse.store(t.lse);
  if (!options.backward) return;

  attention_delta(o.view(), grad_o.view(), delta.view());
  for (Shard* gradient : {&grad_q, &grad_k, &grad_v, &grad_bias}) gradient->clear();
  BackwardCall backward;
  backward.problem = forward.problem;
  backward.grad_o = grad_o.view();
  backward.log_sum_exp = lse.view();
  backward.delta = delta.view();
  backward.grad_q = grad_q.view();
  backward.grad_k = grad_k.view();
  backward.grad_v = grad_v.view();
  backward.grad_bias = grad_bias.view();
  execute_backward(ranks, plan, backward, costs.options());
  costs.expect_backward();
  grad_q.store(t.grad_q);
  grad_k.store(t.grad_k);
  grad_v.store(t.grad_v);
  grad_bias.store(t.grad_bias);
}

void run_on_threads(const AttentionCase& c, const std::shared_ptr<const PlanRequest>& request,
                    AttentionTensors& tensors, const RunOptions& options) {
  ThreadRanksOptions threads;
  threads.delay_seed = options.delay_seed;
  threads.ranks_per_node = options.ranks_per_node;
  threads.timeout_ms = 100'000;
  run_ranks(
      request->q_layout.ranks(),
      [&](Communicator& ranks) { run_rank(ranks, c, request, tensors, options); }, threads);
}

double max_difference(const HostTensor& a, const HostTensor& b) {
  double most = 0.0;
  for (std::size_t i = 0; i < b.data.size(); ++i) {
    if (a.data[i] == b.data[i]) continue;
    const double difference =
        std::abs(static_cast<double>(a.data[i]) - static_cast<double>(b.data[i]));
    most = std::isnan(difference) ? std::numeric_limits<double>::infinity()
                                  : std::max(most, difference);
  }
  return most;
}

bool same_bits(const HostTensor& a, const HostTensor& b) {
  if (a.data.size() != b.data.size() || a.data.empty()) return a.data.size() == b.data.size();
  return std::memcmp(a.data.data(), b.data.data(), a.data.size() * sizeof(float)) == 0;
}

void expect_equal(const AttentionCase& c, const AttentionTensors& found,
                  const AttentionTensors& expected, bool backward) {
  expect_close(found.o, expected.o, 2e-5, "O");
  expect_close(found.lse, expected.lse, 2e-5, "LSE");
  if (!backward) return;
  expect_gradient(found.grad_q, expected.grad_q, "dQ");
  expect_gradient(found.grad_k, expected.grad_k, "dK");
  expect_gradient(found.grad_v, expected.grad_v, "dV");
  if (c.bias) expect_gradient(found.grad_bias, expected.grad_bias, "dBias");
}

}  // namespace annulus::testing
