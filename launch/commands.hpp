#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace annulus::launch {

using Arguments = std::span<const std::string>;

/// One word of the command line and what it starts.
struct Command {
  std::string_view name;
  std::string_view summary;
  void (*run)(Arguments arguments);
};

/// Everything `annulus` can do; a new command is a line in this table.
std::span<const Command> commands();

/// Runs the command that the first argument names with the others, prints the list of commands for
/// none or --help. Throws usage for an unknown one.
void run_program(const std::vector<std::string>& arguments);

/// The same for a table inside a command; `program` is what stands before the name.
void dispatch(std::string_view program, std::span<const Command> table, Arguments arguments);

}  // namespace annulus::launch
