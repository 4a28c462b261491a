#include "launch/destinations.hpp"

#include <filesystem>
#include <system_error>

#include "kernels/error.hpp"

namespace annulus::launch {
namespace {

bool is_same_file(std::string_view a, std::string_view b) {
  std::error_code none;
  if (std::filesystem::is_regular_file(a, none) && std::filesystem::is_regular_file(b, none)) {
    return std::filesystem::equivalent(a, b, none);
  }
  if (std::filesystem::exists(a, none) || std::filesystem::exists(b, none)) return false;
  return std::filesystem::weakly_canonical(a, none) == std::filesystem::weakly_canonical(b, none);
}

}  // namespace

void require_distinct_files(std::string_view command, std::initializer_list<NamedFile> written,
                            std::initializer_list<NamedFile> read) {
  const auto check = [&](const NamedFile& a, const NamedFile& b) {
    const bool same = !a.path.empty() && !b.path.empty() && is_same_file(a.path, b.path);
    require(!same, ExitCode::usage, "{}: {} {} and {} {} are the same file; expected two", command,
            a.option, a.path, b.option, b.path);
  };
  for (auto file = written.begin(); file != written.end(); ++file) {
    for (const NamedFile& input : read) check(*file, input);
    for (auto other = written.begin(); other != file; ++other) check(*file, *other);
  }
}

}  // namespace annulus::launch
