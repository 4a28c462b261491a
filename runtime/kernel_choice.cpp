#include "runtime/kernel_choice.hpp"

#include <algorithm>
#include <span>
#include <string_view>

namespace annulus {
namespace {

constexpr std::string_view kVendor = "cudnn";

bool vendor_serves(const AttentionProblem& problem, Direction direction) {
  const std::span<const AttentionBackend> all = attention_backends();
  return std::any_of(all.begin(), all.end(), [&](const AttentionBackend& backend) {
    return backend.name == kVendor && backend.unsupported(problem, direction).empty();
  });
}

}  // namespace

std::string_view kernel_of(const AttentionOperation& operation, Device device,
                           const AttentionProblem& problem, Direction direction) {
  const std::string& tuned = operation.tuning().kernel;
  if (!tuned.empty() || device == Device::cpu) return tuned;
  if (operation.metadata().backend == kVendor) return kVendor;
  const bool vendor = operation.traits().vendor && vendor_serves(problem, direction);
  return vendor ? kVendor : std::string_view();
}

}  // namespace annulus
