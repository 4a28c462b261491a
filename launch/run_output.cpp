#include "launch/run_output.hpp"

#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "launch/mask_input.hpp"
#include "launch/run_input.hpp"
#include "runtime/checkpoint_output.hpp"

namespace annulus::launch {
namespace {

void add(std::vector<OutputDataset>& datasets, std::string_view name,
         const DistributedTensor& tensor) {
  if (!tensor) return;
  datasets.push_back({"output/" + std::string(name), tensor.global_shape(), tensor.dtype(),
                      selection_of(tensor.layout(), tensor.rank()), tensor.local()});
}

// The options as given, with what the operation chose.
std::string resolved_options(const RunOptions& options, bool causal) {
  if (options.causal) return options.text;
  return options.text + (causal ? "causal=true\n" : "causal=false\n");
}

}  // namespace

void write_output(Context& context, const RunOptions& options, const OperationOutput& output,
                  const OperationGradients& gradients, const Provenance& provenance) {
  std::vector<OutputDataset> datasets;
  add(datasets, "attention_outputs", output.attention_outputs);
  add(datasets, "log_sum_exp", output.log_sum_exp);
  add(datasets, "attention_weights", output.attention_weights);
  add(datasets, "grad_query", gradients.query);
  add(datasets, "grad_key", gradients.key);
  add(datasets, "grad_value", gradients.value);
  add(datasets, "grad_bias", gradients.bias);
  add(datasets, "grad_sinks", gradients.sinks);
  const std::vector<OutputAttribute> attributes = {
      {"operation", provenance.report.operation},
      {"mesh", provenance.report.mesh},
      {"mask", describe_mask(options, provenance.causal)},
      {"options", resolved_options(options, provenance.causal)},
      {"report", to_json(provenance.report).dump()},
      {"annulus_version", std::string(ANNULUS_VERSION)},
      {"input_digest", provenance.input_digest},
  };
  write_checkpoint(context.world(), options.output, datasets, attributes, {.force = options.force});
}

}  // namespace annulus::launch
