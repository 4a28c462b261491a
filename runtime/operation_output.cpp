#include "runtime/operation_output.hpp"

#include "runtime/redistribute.hpp"
#include "runtime/statement.hpp"

namespace annulus {

GatheredOutput OperationOutput::gather(Context& context, std::optional<int> root) const {
  static_cast<void>(Statement("gather")
                        .add("root", root ? fmt::format("rank {}", *root) : "every rank")
                        .agree(context.world()));
  const auto whole = [&](const DistributedTensor& tensor) {
    return tensor ? annulus::gather(tensor, context.world(), root) : Tensor{};
  };
  return {whole(attention_outputs), whole(attention_weights), whole(log_sum_exp)};
}

}  // namespace annulus
