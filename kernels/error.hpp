#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace annulus {

/// Why a program ends; the values are those of sysexits.h, which schedulers and shells know.
enum class ExitCode : int {
  usage = 64,
  bad_data = 65,
  missing_input = 66,
  internal = 70,
  no_memory = 71,
  cannot_create = 73,
  io = 74,
  peer = 75,  // a peer or the transport failed: worth another try
};

/// The one exception of the library. The message is one line: operation, what was wrong, the
/// values, what is accepted.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

/// Throws Error(code, formatted message) unless `condition` holds.
template <typename... Args>
void require(bool condition, ExitCode code, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

/// Foreign text as it can stand in a one-line message: control characters become '?', and what goes
/// beyond 200 bytes is left out.
inline std::string printable(std::string_view text) {
  constexpr std::size_t kMost = 200;
  std::string line(text.substr(0, kMost));
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return text.size() > kMost ? line + "..." : line;
}

}  // namespace annulus
