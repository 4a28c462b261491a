#include "runtime/text_file.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>

#include "kernels/error.hpp"
#include "runtime/posix_file.hpp"

namespace annulus {

void require_writable_text(std::string_view what, const std::string& path) {
  const auto check = [&](int status) {
    require(status == 0, ExitCode::cannot_create, "{}: cannot write {}: {}", what, path,
            errno_text(errno));
  };
  struct stat status {};
  if (stat(path.c_str(), &status) == 0) {
    require(!S_ISDIR(status.st_mode), ExitCode::cannot_create, "{}: cannot write {}: {}", what,
            path, errno_text(EISDIR));
    return check(access(path.c_str(), W_OK));
  }
  if (errno != ENOENT) check(-1);
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  check(access(folder.empty() ? "." : folder.c_str(), W_OK | X_OK));
}

void write_text(std::string_view what, const std::string& path, std::string_view text) {
  errno = 0;
  std::ofstream file(path);
  file << text;
  file.close();
  require(file.good(), ExitCode::cannot_create, "{}: cannot write {}: {}", what, path,
          errno_text(errno));
}

}  // namespace annulus
