#include "launch/commands.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>

#include "kernels/error.hpp"
#include "launch/bench.hpp"
#include "launch/diverged.hpp"
#include "launch/info.hpp"
#include "launch/ops.hpp"
#include "launch/plan.hpp"
#include "launch/run.hpp"
#include "launch/verify.hpp"
#include "runtime/posix_file.hpp"

namespace annulus::launch {
namespace {

constexpr std::array kCommands = {
    Command{"run", "attention over the tensors of an HDF5 file", run_attention},
    Command{"verify", "recomputes rows of an output in double and prints the errors",
            verify_output},
    Command{"ops", "the operations, their aliases and what each accepts", list_operations},
    Command{"info", "the build, MPI, devices and ranks per node", show_info},
    Command{"diverged", "the first rank that left the course of a job that hung", name_diverged},
    Command{"plan", "predicts and draws how ranks would share an attention", show_plan},
    Command{"bench", "measures kernels, ring, io, decode beside their ceilings", run_bench},
};

std::string names(std::span<const Command> table) {
  std::string text;
  for (const Command& command : table) {
    text += (text.empty() ? "" : ", ") + std::string(command.name);
  }
  return text;
}

void print_help(std::string_view program, std::span<const Command> table) {
  fmt::print("usage: {} COMMAND [OPTIONS]\n\n", program);
  for (const Command& command : table) fmt::print("  {:<8} {}\n", command.name, command.summary);
  fmt::print("\n{} COMMAND --help lists the options of a command.\n", program);
}

// What was printed may still lie in the process, and what holds it be full.
void flush_output() {
  const bool arrived = std::fflush(stdout) == 0;
  require(arrived, ExitCode::io, "standard output: {}", errno_text(errno));
  require(std::ferror(stdout) == 0, ExitCode::io, "standard output: a write failed");
}

}  // namespace

std::span<const Command> commands() { return kCommands; }

void dispatch(std::string_view program, std::span<const Command> table, Arguments arguments) {
  if (arguments.empty() || arguments[0] == "--help" || arguments[0] == "-h") {
    return print_help(program, table);
  }
  const auto command = std::find_if(table.begin(), table.end(), [&](const Command& candidate) {
    return candidate.name == arguments[0];
  });
  require(command != table.end(), ExitCode::usage, "{}: no command \"{}\"; there are {}", program,
          arguments[0], names(table));
  command->run(arguments.subspan(1));
}

void run_program(const std::vector<std::string>& arguments) {
  if (!arguments.empty() && arguments[0] == "--version") {
    fmt::print("annulus {}\n", ANNULUS_VERSION);
  } else {
    dispatch("annulus", commands(), arguments);
  }
  flush_output();
}

}  // namespace annulus::launch
