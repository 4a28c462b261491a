#include "runtime/operation_output.hpp"

#include "runtime/redistribute.hpp"

namespace annulus {

GatheredOutput OperationOutput::gather(Context& context, std::optional<int> root) const {
  const auto whole = [&](const DistributedTensor& tensor) {
    return tensor ? annulus::gather(tensor, context.world(), root) : Tensor{};
  };
  return {whole(attention_outputs), whole(attention_weights), whole(log_sum_exp)};
}

}  // namespace annulus
