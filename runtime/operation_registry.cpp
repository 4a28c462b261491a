#include "runtime/operation_registry.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <utility>

#include "kernels/error.hpp"
#include "runtime/operations.hpp"

namespace annulus {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<std::pair<std::string, std::shared_ptr<const OperationEntry>>> names;

  Registry() {
    for (const OperationEntry& entry : operations()) add(entry);
  }

  void add(const OperationEntry& entry) {
    const auto shared = std::make_shared<const OperationEntry>(entry);
    for (const std::string& name : entry.names) {
      if (auto at = find(name); at != names.end()) {
        fmt::print(stderr, "annulus: operation '{}' is registered again; the new one replaces it\n",
                   name);
        at->second = shared;
      } else {
        names.emplace_back(name, shared);
      }
    }
  }

  decltype(names)::iterator find(std::string_view name) {
    return std::find_if(names.begin(), names.end(),
                        [&](const auto& known) { return known.first == name; });
  }
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

void OperationRegistry::register_operation(OperationEntry entry) {
  require(!entry.names.empty() && entry.make, ExitCode::usage,
          "registry: an operation needs a name and a function that makes it");
  const std::scoped_lock lock(registry().mutex);
  registry().add(entry);
}

OperationEntry OperationRegistry::get(std::string_view name) {
  {
    const std::scoped_lock lock(registry().mutex);
    const auto at = registry().find(name);
    if (at != registry().names.end()) return *at->second;
  }
  throw Error(ExitCode::usage, fmt::format("registry: unknown operation '{}'; known are {}", name,
                                           fmt::join(list_implementations(), ", ")));
}

std::unique_ptr<OperationImpl> OperationRegistry::create(std::string_view name,
                                                         const OperationMetadata& metadata,
                                                         std::optional<bool> requires_cache) {
  const OperationEntry entry = get(name);
  OperationMetadata own = metadata;
  if (requires_cache) own.requires_cache = requires_cache;
  return entry.make(entry.names.front(), own);
}

std::vector<std::string> OperationRegistry::list_implementations() {
  const std::scoped_lock lock(registry().mutex);
  std::vector<std::string> names;
  for (const auto& known : registry().names) names.push_back(known.first);
  return names;
}

}  // namespace annulus
