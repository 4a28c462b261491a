#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "kernels/buffer.hpp"
#include "tests/kernels/plain_attention.hpp"
#include "tests/runtime/operation_case.hpp"

// Gradients of operations on device tensors, through every transport, held against the double
// reference by FlashAttention's rule; several ranks may share one device. Needs a GPU:
//   mpirun -n 4 build/test_mpi --gtest_filter='*DeviceBackward*'
namespace annulus::testing {
namespace {

Tensor rounded(const Tensor& values, DType dtype) {
  const Tensor narrow = Tensor::copy_of(values.view(), dtype);
  return Tensor::copy_of(narrow.view(), DType::f32);
}

std::vector<double> as_doubles(const Tensor& tensor) {
  const auto* values = static_cast<const float*>(tensor.view().data);
  return {values, values + tensor.shape().elements()};
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= largest)) largest = std::abs(a[i] - b[i]);
  }
  return largest;
}

/// A case, its double gradients, and how far plain attention in bf16 is from them.
class Expectation {
 public:
  explicit Expectation(const OperationCase& c) : case_(c), tensors_(random_inputs(c)) {
    for (Tensor* tensor :
         {&tensors_.query, &tensors_.key, &tensors_.value, &tensors_.grad_output}) {
      *tensor = rounded(*tensor, DType::bf16);
    }
  }

  const OperationCase& operation_case() const { return case_; }
  const OperationTensors& tensors() const { return tensors_; }

  /// On one rank: the others only give their part of the inputs.
  void solve() {
    run_reference(case_, tensors_, true);
    const AttentionShape& shape = case_.shape;
    AttentionMask mask = case_.options.mask;
    mask.causal = *case_.options.causal;
    const MaskSlices slices = make_slices(mask, shape.batch, shape.seq_q, shape.seq_kv);
    const auto narrow = [](const Tensor& tensor) {
      return Tensor::copy_of(tensor.view(), DType::bf16);
    };
    const Tensor q = narrow(tensors_.query), k = narrow(tensors_.key), v = narrow(tensors_.value);
    const Tensor grad_o = narrow(tensors_.grad_output);
    AttentionProblem problem;
    problem.q = q.view();
    problem.k = k.view();
    problem.v = v.view();
    problem.mask = slices.view();
    problem.scale = 1.0F / std::sqrt(static_cast<float>(shape.head_dim));
    // As a backward pass gets it: from the O that the forward pass rounded.
    const Tensor o = rounded(tensors_.output, DType::bf16);
    Tensor delta(DType::f32, tensors_.log_sum_exp.shape());
    attention_delta(o.view(), std::as_const(tensors_.grad_output).view(), delta.view());
    plain_ = plain_attention(problem, grad_o.view(), as_doubles(tensors_.log_sum_exp),
                             as_doubles(delta));
  }

  void expect(const WholeResults& found, const std::string& what) const {
    expect_by_the_rule(found.grad_query, plain_.grad_q, tensors_.grad_query, what + ", grad_query");
    expect_by_the_rule(found.grad_key, plain_.grad_k, tensors_.grad_key, what + ", grad_key");
    expect_by_the_rule(found.grad_value, plain_.grad_v, tensors_.grad_value, what + ", grad_value");
  }

 private:
  /// max|x − ref| ≤ 2·max|pt − ref|, where pt is rounded to bf16 in the end.
  static void expect_by_the_rule(const Tensor& found, const std::vector<double>& plain,
                                 const Tensor& exact, const std::string& what) {
    ASSERT_EQ(found.shape(), exact.shape()) << what;
    const std::vector<double> reference = as_doubles(exact);
    double largest = 0.0;
    for (const double value : reference) largest = std::max(largest, std::abs(value));
    const double tolerance = 2.0 * largest_difference(plain, reference) + 0x1p-8 * largest;
    EXPECT_LE(largest_difference(as_doubles(found), reference), tolerance) << what;
  }

  OperationCase case_;
  OperationTensors tensors_;
  PlainAttention plain_;
};

constexpr AttentionShape kShape{.batch = 1,
                                .seq_q = 420,
                                .seq_kv = 420,
                                .q_heads = 4,
                                .kv_heads = 2,
                                .head_dim = 128,
                                .value_dim = 128};

OperationCase documents_case() {
  OperationCase c{kShape, {}, 52};
  c.options.causal = true;
  constexpr std::int64_t kOffsets[] = {0, 70, 71, 255, 420};
  c.options.mask.q_segments = {segments_of_offsets(kOffsets, 420)};
  c.options.mask.kv_segments = c.options.mask.q_segments;
  return c;
}

/// By name: made and solved once for all transports.
Expectation& expectation(const std::string& name, bool solve) {
  static std::map<std::string, Expectation> all;
  const auto found = all.find(name);
  if (found != all.end()) return found->second;
  OperationCase c{kShape, {}, 51};
  c.options.causal = name != "full";
  if (name == "zigzag") c.options.deal = SequenceDeal::zigzag;
  if (name == "many heads") {
    c.shape.batch = 2;
    c.shape.seq_q = c.shape.seq_kv = 203;
    c.shape.q_heads = c.shape.kv_heads = 6;
    c.shape.head_dim = c.shape.value_dim = 64;
  }
  if (name == "documents") c = documents_case();
  Expectation& made = all.emplace(name, c).first->second;
  if (solve) made.solve();
  return made;
}

class DeviceBackward : public ::testing::TestWithParam<Transport> {
 protected:
  void SetUp() override {
    context_ = std::make_unique<Context>();
    if (context_->device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  }

  void expect_everywhere(const std::string& name) {
    const Expectation& expected = expectation(name, context_->rank() == 0);
    const OperationConfig config{
        .runtime_dtype = DType::bf16, .backend = "cuda", .transport = GetParam()};
    const int ranks = context_->size();
    std::vector<std::string> meshes{fmt::format("sp={}", ranks)};
    if (ranks % 2 == 0) meshes.push_back("sp=-1,tp=2");
    for (const std::string& mesh : meshes) {
      for (const char* operation : {"ring", "ulysses", "hybrid", "flash", "sdpa"}) {
        const std::string what = fmt::format("{}, {} over {}", name, operation, mesh);
        SCOPED_TRACE(what);
        const WholeResults found =
            run_both_passes(*context_, operation, Mesh::parse(mesh, ranks),
                            expected.operation_case(), expected.tensors(), config);
        if (context_->rank() == 0) expected.expect(found, what);
      }
    }
  }

 private:
  std::unique_ptr<Context> context_;
};

TEST_P(DeviceBackward, Causal) { expect_everywhere("causal"); }
TEST_P(DeviceBackward, Full) { expect_everywhere("full"); }
TEST_P(DeviceBackward, Zigzag) { expect_everywhere("zigzag"); }
TEST_P(DeviceBackward, Documents) { expect_everywhere("documents"); }
TEST_P(DeviceBackward, ManyHeadsAndUnevenRows) { expect_everywhere("many heads"); }

INSTANTIATE_TEST_SUITE_P(Transports, DeviceBackward,
                         ::testing::Values(Transport::peer, Transport::nccl, Transport::mpi),
                         [](const auto& info) { return std::string(name(info.param)); });

}  // namespace
}  // namespace annulus::testing
