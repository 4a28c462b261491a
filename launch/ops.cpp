#include "launch/ops.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "launch/parse.hpp"
#include "runtime/operation_registry.hpp"

namespace annulus::launch {

void list_operations(Arguments arguments) {
  CLI::App app("The operations, their aliases, backends and what each accepts.", "annulus ops");
  if (!parse(app, arguments) || !is_speaking_rank()) return;
  std::set<std::string> shown;
  for (const std::string& name : OperationRegistry::list_implementations()) {
    const OperationEntry entry = OperationRegistry::get(name);
    if (!shown.insert(entry.names.front()).second) continue;
    std::string aliases;
    for (std::size_t i = 1; i < entry.names.size(); ++i) {
      aliases += (i == 1 ? "" : ", ") + entry.names[i];
    }
    fmt::print("{}{}\n", entry.names.front(), aliases.empty() ? "" : " (" + aliases + ")");
    fmt::print("  computes  {}\n", entry.computes);
    fmt::print("  accepts   {}\n", entry.accepts);
    fmt::print("  backends  {}\n", entry.backends);
  }
}

}  // namespace annulus::launch
