#pragma once

#include <memory>

#include "sharding/gradient_return.hpp"
#include "sharding/stage_compute.hpp"

namespace annulus {

/// The backward pass of one rank's query rows over parts that arrive one by one.
class BackwardPass {
 public:
  virtual ~BackwardPass() = default;
  /// Gradients of K and V go to `back`: to its views of the stage, prepared, or of the own rows.
  virtual void add(const Stage& stage, const StagePart& part, const ConstTensorView& k,
                   const ConstTensorView& v, GradientReturn& back) = 0;
  virtual std::int64_t buffer_bytes() const = 0;
};

/// Gradients that add up as parts come, or in the trees over the plan's grids where it has both.
std::unique_ptr<BackwardPass> make_backward_pass(const BackwardCall& local,
                                                 const AttentionPlan& plan,
                                                 const ExecuteOptions& options);

}  // namespace annulus
