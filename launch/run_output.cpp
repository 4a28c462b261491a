#include "launch/run_output.hpp"

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>
#include <vector>

#include "launch/mask_input.hpp"
#include "launch/run_input.hpp"
#include "runtime/checkpoint_output.hpp"

namespace annulus::launch {
namespace {

bool holds(const Runs& runs, std::int64_t index) {
  return std::any_of(runs.begin(), runs.end(),
                     [&](Span run) { return run.begin <= index && index < run.end; });
}

// Local indices of a dimension which no lower part holds, too: KV heads that several ranks need are
// written by the lowest of them. They follow each other, since parts share what lies at their ends.
Span unshared(const TensorLayout& layout, int rank, int dim) {
  const int part = layout.sharding().part(rank, dim);
  const std::int64_t extent = layout.local_shape(rank)[dim];
  const auto is_shared = [&](std::int64_t local) {
    const std::int64_t index = layout.global_index(rank, dim, local);
    for (int lower = 0; lower < part; ++lower) {
      if (holds(layout.runs_of_part(dim, lower), index)) return true;
    }
    return false;
  };
  Span own{0, extent};
  while (own.begin < own.end && is_shared(own.begin)) ++own.begin;
  while (own.begin < own.end && is_shared(own.end - 1)) --own.end;
  return own;
}

void add(std::vector<OutputDataset>& datasets, std::string_view name,
         const DistributedTensor& tensor) {
  if (!tensor) return;
  const TensorLayout& layout = tensor.layout();
  OutputDataset dataset{"output/" + std::string(name), tensor.global_shape(), tensor.dtype(),
                        selection_of(layout, tensor.rank()), tensor.local()};
  for (int dim = 0; dim < layout.global_shape().rank(); ++dim) {
    if (!layout.shares(dim)) continue;
    const Span own = unshared(layout, tensor.rank(), dim);
    Runs runs;
    for (std::int64_t local = own.begin; local < own.end; ++local) {
      const std::int64_t index = layout.global_index(tensor.rank(), dim, local);
      runs.push_back({index, index + 1});
    }
    dataset.mine.set(dim, runs);
    dataset.data = dataset.data.slice(dim, own);
  }
  datasets.push_back(std::move(dataset));
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
