#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace annulus::testing {

/// How a program ended and what it said.
struct Outcome {
  int exit_code = -1;
  std::string out;
  std::string err;

  /// The lines of `err` that annulus wrote: those that start with "rank N: ".
  std::vector<std::string> messages() const;
};

/// Runs `annulus ARGUMENTS...` on so many ranks under the launcher; 0: without a launcher.
Outcome run_annulus(int ranks, const std::vector<std::string>& arguments);

/// Runs any program of the PATH.
Outcome run_program(const std::vector<std::string>& command);

/// A folder that lives as long as this object.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string file(const std::string& name) const { return (path_ / name).string(); }
  /// Names of what it holds, sorted.
  std::vector<std::string> listing() const;

 private:
  std::filesystem::path path_;
};

std::string content_of(const std::string& path);
void write_text(const std::string& path, const std::string& text);

/// A Python that has h5py: the system's, else the one of the path.
const std::string& python();

/// The small real file of the tests.
std::string sample_file();

}  // namespace annulus::testing
