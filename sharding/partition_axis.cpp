#include "sharding/partition_axis.hpp"

#include <algorithm>
#include <array>

namespace annulus {
namespace {

struct NamedRule {
  std::string_view name;
  AxisRule PartitionAxis::*rule;
};

constexpr std::array<NamedRule, 15> kRules = {{
    {"batch", &PartitionAxis::batch},
    {"sequence", &PartitionAxis::sequence},
    {"query_length", &PartitionAxis::query_length},
    {"key_length", &PartitionAxis::key_length},
    {"head", &PartitionAxis::head},
    {"kv_head", &PartitionAxis::kv_head},
    {"hidden", &PartitionAxis::hidden},
    {"mlp", &PartitionAxis::mlp},
    {"vocab", &PartitionAxis::vocab},
    {"expert", &PartitionAxis::expert},
    {"expert_gate", &PartitionAxis::expert_gate},
    {"head_dim", &PartitionAxis::head_dim},
    {"kv_head_dim", &PartitionAxis::kv_head_dim},
    {"bias_head", &PartitionAxis::bias_head},
    {"bias_key_length", &PartitionAxis::bias_key_length},
}};

}  // namespace

std::string_view name(Mode mode) {
  constexpr std::array<std::string_view, 4> kNames = {"train", "prefill", "decode", "insert"};
  return kNames[static_cast<std::size_t>(mode)];
}

const AxisTuple& AxisRule::in(Mode mode) const {
  const bool decodes = mode == Mode::decode || mode == Mode::insert;
  return decodes && decode ? *decode : train;
}

const AxisRule* PartitionAxis::find(std::string_view semantic) const {
  const auto found = std::find_if(kRules.begin(), kRules.end(),
                                  [&](const NamedRule& rule) { return rule.name == semantic; });
  return found == kRules.end() ? nullptr : &(this->*found->rule);
}

std::vector<std::string_view> PartitionAxis::names() {
  std::vector<std::string_view> names;
  for (const NamedRule& rule : kRules) names.push_back(rule.name);
  return names;
}

}  // namespace annulus
