// Query and KV heads that tp does not divide: each tp rank computes its query heads with the KV
// heads they need, and gradients of KV heads that several ranks hold are summed. Every scheme
// against the reference in double over the whole tensors.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "runtime/context.hpp"
#include "runtime/redistribute.hpp"
#include "sharding/execution.hpp"
#include "sharding/head_layout.hpp"
#include "tests/sharding/attention_case.hpp"
#include "tests/sharding/random_layout.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus {
namespace {

using testing::AttentionCase;
using testing::AttentionTensors;
using testing::HostTensor;

struct Division {
  std::int64_t q_heads;
  std::int64_t kv_heads;
  int tp;
};

constexpr std::array kDivisions = {Division{9, 3, 2}, Division{9, 3, 3}, Division{6, 2, 3},
                                   Division{6, 3, 2}, Division{6, 2, 4}, Division{4, 1, 3},
                                   Division{2, 1, 4}, Division{7, 7, 2}};

/// Ranks that exchange heads in a hybrid of sp ranks.
int node_ranks(int sp) { return sp % 2 == 0 ? 2 : 1; }

/// Heads are exchanged among no more ranks than there are heads; else the plan refuses.
bool heads_suffice(const Division& division, int sp, Scheme scheme) {
  const HeadLayout heads(division.q_heads, division.kv_heads, division.tp);
  const int exchanging = scheme == Scheme::ulysses  ? sp
                         : scheme == Scheme::hybrid ? node_ranks(sp)
                                                    : 1;
  for (int part = 0; part < division.tp; ++part) {
    const std::int64_t count = heads.q_heads(part).size();
    if (count > 0 && count < exchanging) return false;
  }
  return true;
}

/// One rank's part of an attention over sp × tp.
class Part {
 public:
  Part(Context& context, const Mesh& mesh, const AttentionCase& c, Scheme scheme)
      : context_(context),
        mesh_(mesh),
        case_(c),
        rank_(context.rank()),
        sequence_group_(context.along(mesh, {"sp"})),  // collective, also where no heads are
        heads_(c.q_heads, c.kv_heads, mesh.size("tp")),
        head_part_(mesh.coordinate(rank_, "tp")),
        q_rows_(rows({c.batch, c.seq_q, c.q_heads, c.head_dim}).with_runs(2, heads_.q_runs())),
        kv_rows_(rows({c.batch, c.seq_kv, c.kv_heads, c.head_dim}).with_runs(2, heads_.kv_runs())),
        lse_rows_(TensorLayout({c.batch, c.q_heads, c.seq_q},
                               NamedSharding(mesh, PartitionSpec::parse("(-, tp, sp)")))
                      .with_runs(1, heads_.q_runs())) {
    const int sp = mesh.size("sp");
    auto request = testing::request_of(c, scheme, SequenceLayout::contiguous(c.seq_q, sp),
                                       SequenceLayout::contiguous(c.seq_kv, sp));
    const HeadGroups groups = heads_.groups(head_part_);
    request->q_heads = heads_.q_heads(head_part_).size();
    request->kv_heads = heads_.kv_heads(head_part_).size();
    request->group_size = groups.group_size;
    request->q_head_offset = groups.q_head_offset;
    request->node_ranks = node_ranks(sp);
    if (works()) plan_.emplace(std::move(request), mesh.coordinate(rank_, "sp"));
  }

  /// Compares with the outputs in `expected` on rank 0.
  void run(const AttentionTensors& expected) {
    const DistributedTensor q = take(expected.q, q_rows_), k = take(expected.k, kv_rows_),
                            v = take(expected.v, kv_rows_);
    DistributedTensor o = blank(q_rows_), lse = blank(lse_rows_);
    ForwardCall forward;
    forward.problem.q = q.local();
    forward.problem.k = k.local();
    forward.problem.v = v.local();
    forward.problem.scale = 1.0F / std::sqrt(static_cast<float>(case_.head_dim));
    forward.problem.groups = heads_.groups(head_part_);
    forward.o = o.local();
    forward.log_sum_exp = lse.local();
    if (works()) execute_forward(sequence_group_, *plan_, forward);
    compare(o, expected.o, 2e-5, "o");
    compare(lse, expected.lse, 2e-5, "log_sum_exp");
    run_backward(forward.problem, o, lse, expected);
  }

 private:
  bool works() const { return !heads_.q_heads(head_part_).empty(); }

  TensorLayout rows(const Shape& shape) const {
    return {shape, NamedSharding(mesh_, PartitionSpec::parse("(-, sp, tp, -)"))};
  }

  /// This rank's shard of a tensor that all ranks hold.
  DistributedTensor take(const HostTensor& whole, const TensorLayout& layout) {
    const TensorLayout everywhere(layout.global_shape(), NamedSharding(mesh_, PartitionSpec()));
    const DistributedTensor source(Tensor::borrow(whole.view), everywhere, rank_);
    return redistribute(source, layout, context_.world());
  }

  DistributedTensor blank(const TensorLayout& layout, int byte = 0xFF) const {
    DistributedTensor tensor(DType::f32, layout, rank_);
    const TensorView view = tensor.local();
    fill_bytes(view.data, Device::cpu, byte, view.shape.elements() * 4);
    return tensor;
  }

  void run_backward(const AttentionProblem& problem, const DistributedTensor& o,
                    const DistributedTensor& lse, const AttentionTensors& expected) {
    const DistributedTensor grad_o = take(expected.grad_o, q_rows_);
    DistributedTensor delta = blank(lse_rows_);
    DistributedTensor grad_q = blank(q_rows_, 0), grad_k = blank(kv_rows_, 0),
                      grad_v = blank(kv_rows_, 0);
    if (works()) {
      attention_delta(o.local(), grad_o.local(), delta.local());
      BackwardCall call;
      call.problem = problem;
      call.grad_o = grad_o.local();
      call.log_sum_exp = lse.local();
      call.delta = delta.local();
      call.grad_q = grad_q.local();
      call.grad_k = grad_k.local();
      call.grad_v = grad_v.local();
      execute_backward(sequence_group_, *plan_, call);
    }
    sum_shared(grad_k, context_.world());
    sum_shared(grad_v, context_.world());
    compare(grad_q, expected.grad_q, 1e-4, "grad_q");
    compare(grad_k, expected.grad_k, 1e-4, "grad_k");
    compare(grad_v, expected.grad_v, 1e-4, "grad_v");
  }

  void compare(const DistributedTensor& found, const HostTensor& expected, double tolerance,
               std::string_view what) {
    const Tensor whole = gather(found, context_.world(), 0);
    if (!whole) return;
    HostTensor copied(whole.shape());
    copy(whole.view(), copied.view);
    EXPECT_LE(testing::max_difference(copied, expected), tolerance) << what;
  }

  Context& context_;
  const Mesh& mesh_;
  const AttentionCase& case_;
  int rank_;
  Communicator& sequence_group_;
  HeadLayout heads_;
  int head_part_;
  TensorLayout q_rows_;
  TensorLayout kv_rows_;
  TensorLayout lse_rows_;
  std::optional<AttentionPlan> plan_;
};

void check(const Division& division, int sp, Scheme scheme) {
  AttentionCase c;
  c.mask.causal = true;
  c.batch = 2;
  c.seq_q = c.seq_kv = 23;
  c.q_heads = division.q_heads;
  c.kv_heads = division.kv_heads;
  const std::uint64_t seed = testing::fresh_seed();
  AttentionTensors tensors = testing::random_tensors(c, seed);
  testing::run_reference(c, tensors);
  SCOPED_TRACE(fmt::format("seed {}: {}, heads {}:{}, tp {}, sp {}", seed, name(scheme), c.q_heads,
                           c.kv_heads, division.tp, sp));
  const int ranks = sp * division.tp;
  const Mesh mesh({{"tp", division.tp}, {"sp", sp}}, ranks);
  testing::run_ranks(ranks, [&](Communicator& all) {
    Context context(all);
    Part(context, mesh, c, scheme).run(tensors);
  });
}

class HeadDivision : public ::testing::TestWithParam<Scheme> {};

TEST_P(HeadDivision, EqualsTheReference) {
  for (const Division& division : kDivisions) {
    for (const int sp : {1, 2, 3, 4}) {
      if (sp * division.tp > 8 || !heads_suffice(division, sp, GetParam())) continue;
      check(division, sp, GetParam());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Schemes, HeadDivision,
                         ::testing::Values(Scheme::ring, Scheme::all_gather, Scheme::ulysses,
                                           Scheme::hybrid),
                         [](const auto& param) { return std::string(name(param.param)); });

}  // namespace
}  // namespace annulus
