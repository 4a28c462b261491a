#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/context.hpp"
#include "runtime/operation_registry.hpp"
#include "runtime/tensor.hpp"

namespace annulus::testing {

/// One attention over whole tensors with random contents.
struct OperationCase {
  AttentionShape shape;
  AttentionOptions options;  // `causal` is given
  std::uint64_t seed = 1;

  std::string in_words() const;
};

/// Global tensors of a case and the double reference's results, in f32.
struct OperationTensors {
  Tensor query, key, value, bias, mask, sinks, grad_output;
  Tensor output, log_sum_exp;
  Tensor grad_query, grad_key, grad_value, grad_bias, grad_sinks;
  /// Norm that grad_sinks would have if no terms cancelled: a head's gradient sums signed terms of
  /// all rows, and its rounding error goes with their magnitudes (Higham, Accuracy and Stability of
  /// Numerical Algorithms, 4.2), however small the sum is.
  double sink_magnitudes = 0.0;
};

/// Inputs only.
OperationTensors random_inputs(const OperationCase& c);
/// Runs the reference: output and log_sum_exp, with `backward` the gradients too.
void run_reference(const OperationCase& c, OperationTensors& tensors, bool backward);

/// The part of a global tensor that a layout gives `rank`.
Tensor shard_of(const Tensor& whole, const TensorLayout& layout, int rank);

/// Spreads a tensor as `layout` says.
DistributedTensor spread(const Tensor& whole, const TensorLayout& layout, int rank);

/// Where the inputs of a run lie.
enum class Placement : std::uint8_t {
  working,     // where the operation wants them
  replicated,  // whole on every rank
  by_spec,     // cut by the default shardings, KV heads evenly as query heads
};

/// The processor, whatever devices there are: f32 is computed there only.
inline OperationConfig on_the_host() { return {.backend = "cpu"}; }

/// An operation on a mesh, applied to a case on all ranks of `context`. Rank 0 compares output and
/// log_sum_exp with `tensors` (which only needs them there), within `tolerance`.
void expect_forward(Context& context, const std::string& operation, const Mesh& mesh,
                    const OperationCase& c, const OperationTensors& tensors, double tolerance,
                    Placement placement = Placement::working,
                    const OperationConfig& config = on_the_host());

/// Output and gradients of such a run, whole, on rank 0; absent elsewhere. Runs both passes.
struct WholeResults {
  Tensor output, grad_query, grad_key, grad_value, grad_sinks;
};
WholeResults run_both_passes(Context& context, const std::string& operation, const Mesh& mesh,
                             const OperationCase& c, const OperationTensors& tensors,
                             const OperationConfig& config);

/// The same with all gradients, within `tolerance` relative to the norm of each; of grad_sinks to
/// sink_magnitudes.
void expect_backward(Context& context, const std::string& operation, const Mesh& mesh,
                     const OperationCase& c, const OperationTensors& tensors, double tolerance,
                     Placement placement = Placement::working);

/// Largest difference; NaN counts as infinite, −inf equals −inf. Both f32 and row-major.
double max_difference(const Tensor& a, const Tensor& b);

}  // namespace annulus::testing
