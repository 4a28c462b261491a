#include "runtime/auto_attention.hpp"

#include <cstdlib>

#include "runtime/attention_operation.hpp"
#include "runtime/rates_file.hpp"
#include "sharding/simulate.hpp"

namespace annulus {
namespace {

class AutoAttention final : public AttentionOperation {
 public:
  using AttentionOperation::AttentionOperation;

  std::shared_ptr<const PlanRequest> choose(PlanRequest request,
                                            const AttentionShape& shape) const override {
    AttentionSizes sizes;
    sizes.head_dim = shape.head_dim;
    sizes.value_dim = shape.value_dim;
    sizes.element_bytes = size_bytes(metadata().runtime_dtype);
    Rates rates = known_rates();
    rates.node_ranks = request.node_ranks;
    rates.reads_in_place = tuning().in_place && metadata().backend == "cpu";
    rates.hides_node_transfers = metadata().backend != "cpu";
    return choose_scheme(request, sizes, rates, false);
  }

 private:
  Rates known_rates() const {
    if (!tuning().rates.empty()) return read_rates(tuning().rates);
    const char* const file = std::getenv("ANNULUS_RATES");
    if (file != nullptr && *file != '\0') return read_rates(file);
    return default_rates(metadata().backend == "cpu" ? Device::cpu : Device::cuda);
  }
};

}  // namespace

OperationEntry auto_attention() {
  return {.names = {"auto"},
          .computes = "attention over the sequence axis by the scheme of the least predicted time",
          .accepts =
              "documents, scale, causal (on), window, soft cap, sinks, cu_seqlens, mask, "
              "bias, dropout",
          .backends = "cpu, cuda, cudnn",
          .make = [](const std::string& name, const OperationMetadata& metadata) {
            return std::make_unique<AutoAttention>(
                name, metadata,
                AttentionOperation::Traits{.causal = true, .key_rows = KeyRows::dealt});
          }};
}

}  // namespace annulus
