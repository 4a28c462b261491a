#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/context.hpp"
#include "runtime/operation_metadata.hpp"

namespace annulus::testing {

/// A regression that one attention layer learns: rows X are projected to queries, keys and values
/// by weights W, O = causal attention, loss = mean |O − Y|² with Y from weights of a teacher. Plain
/// gradient descent; everything follows from the seed.
struct TrainingProblem {
  std::int64_t rows = 96;
  std::int64_t inputs = 8;  // columns of X
  std::int64_t q_heads = 4;
  std::int64_t kv_heads = 2;
  std::int64_t head_dim = 16;
  int steps = 200;
  double learning_rate = 4.0;
  std::uint64_t seed = 7;
};

/// The loss before each step, over the ranks of `context`: rows are dealt to them, gradients of
/// weights are summed over them. The operation and what it computes in come from `config`.
std::vector<double> train(Context& context, const TrainingProblem& problem,
                          const std::string& operation, OperationConfig config);

/// The same in double, in plain loops that share no code with annulus.
std::vector<double> train_in_double(const TrainingProblem& problem);

}  // namespace annulus::testing
