#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/operation.hpp"

namespace annulus {

/// One operation as programs find it.
struct OperationEntry {
  using Make = std::function<std::unique_ptr<OperationImpl>(const std::string& name,
                                                            const OperationMetadata& metadata)>;
  /// The name, then its aliases.
  std::vector<std::string> names;
  std::string computes;
  /// What it takes beyond query, key and value, in words.
  std::string accepts;
  std::string backends;
  Make make;
};

/// The operations of this program: those of operations() and what was registered since.
class OperationRegistry {
 public:
  /// Under all of the entry's names. A name that is taken is overwritten, with a warning.
  static void register_operation(OperationEntry entry);

  /// Throws usage, listing the names, for an unknown one.
  static OperationEntry get(std::string_view name);

  /// The operation `name`; `requires_cache` overrides the metadata's for this instance.
  static std::unique_ptr<OperationImpl> create(std::string_view name,
                                               const OperationMetadata& metadata,
                                               std::optional<bool> requires_cache = std::nullopt);

  /// All names, in the order of registration.
  static std::vector<std::string> list_implementations();
};

}  // namespace annulus
