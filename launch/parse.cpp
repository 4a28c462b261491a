#include "launch/parse.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "kernels/error.hpp"

namespace annulus::launch {
namespace {

std::string one_line(std::string text) {
  while (!text.empty() && text.back() == '\n') text.pop_back();
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

}  // namespace

bool is_speaking_rank() {
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  if (rank == nullptr) rank = std::getenv("PMIX_RANK");
  return rank == nullptr || std::string_view(rank) == "0";
}

bool parse(CLI::App& app, Arguments arguments) {
  // CLI11 takes the arguments from the back.
  std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());
  try {
    app.parse(reversed);
    return true;
  } catch (const CLI::CallForHelp&) {
    if (is_speaking_rank()) fmt::print("{}", app.help());
    return false;
  } catch (const CLI::FileError& error) {
    throw Error(ExitCode::missing_input,
                fmt::format("{}: {}", app.get_name(), one_line(error.what())));
  } catch (const CLI::Error& error) {
    throw Error(ExitCode::usage, fmt::format("{}: {}", app.get_name(), one_line(error.what())));
  } catch (const std::logic_error&) {  // CLI11 lets stoll's pass for a flag with a bad value
    throw Error(ExitCode::usage, fmt::format("{}: a flag has a value that is not true or false: {}",
                                             app.get_name(), fmt::join(arguments, " ")));
  }
}

}  // namespace annulus::launch
