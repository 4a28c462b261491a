#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "sharding/solo_communicator.hpp"
#include "tests/runtime/training.hpp"

// An attention layer learns for 200 steps: over all ranks, on one rank alone, and in double. The
// device's needs a GPU: mpirun -n 4 build/test_mpi --gtest_filter='*Training*'
namespace annulus::testing {
namespace {

/// Largest difference of two courses of a loss, in parts of the loss.
double largest_part(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double part = std::abs(a[i] - b[i]) / std::abs(b[i]);
    if (!(part <= largest)) largest = part;
  }
  return largest;
}

struct Courses {
  std::vector<double> over_ranks, alone, exact;

  Courses(Context& context, const TrainingProblem& problem, const std::string& operation,
          const OperationConfig& config)
      : over_ranks(train(context, problem, operation, config)) {
    if (context.rank() != 0) return;
    SoloCommunicator solo;
    Context one(solo);
    alone = train(one, problem, operation, config);
    exact = train_in_double(problem);
    fmt::print(
        "{} on {} over {} ranks: loss {:.6e} to {:.6e}; from one rank {:.1e}, from double "
        "{:.1e}, one rank from double {:.1e}\n",
        operation, *config.backend, context.size(), over_ranks.front(), over_ranks.back(),
        largest_part(over_ranks, alone), largest_part(over_ranks, exact),
        largest_part(alone, exact));
  }

  void expect_the_same(double tolerance) const {
    if (alone.empty()) return;
    EXPECT_LT(exact.back(), 0.2 * exact.front()) << "nothing was learned";
    EXPECT_LE(largest_part(alone, exact), tolerance);
    EXPECT_LE(largest_part(over_ranks, exact), tolerance);
    EXPECT_LE(largest_part(over_ranks, alone), tolerance);
  }
};

TEST(Training, LossesAreThoseOfOneRankAndOfDouble) {
  Context context;
  const TrainingProblem problem;
  for (const std::string operation : {"ring", "ulysses"}) {
    if (operation == "ulysses" && context.size() > problem.q_heads) continue;  // it deals heads
    const Courses courses(context, problem, operation,
                          {.runtime_dtype = DType::f32, .backend = "cpu"});
    // Each step may add a rounding of the loss and one of the weights that it leaves.
    courses.expect_the_same(200 * 0x1p-23);
  }
}

TEST(DeviceTraining, LossesAreThoseOfOneRankAndOfDouble) {
  Context context;
  if (context.device() != Device::cuda) GTEST_SKIP() << "not every rank has a GPU";
  TrainingProblem problem;
  problem.head_dim = 64;
  problem.kv_heads = 1;
  problem.q_heads = 2;
  const Courses courses(context, problem, "ring",
                        {.runtime_dtype = DType::bf16, .backend = "cuda"});
  // One rounding to bf16: those of many elements in a loss cancel.
  courses.expect_the_same(0x1p-8);
}

}  // namespace
}  // namespace annulus::testing
