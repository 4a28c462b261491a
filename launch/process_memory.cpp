#include "launch/process_memory.hpp"

#include <fstream>
#include <sstream>
#include <string>

namespace annulus::launch {
namespace {

// "VmRSS:     1234 kB" of a file with one field a line.
std::int64_t field_bytes(const std::string& line) {
  std::istringstream text(line.substr(line.find(':') + 1));
  std::int64_t kilobytes = 0;
  text >> kilobytes;
  return kilobytes * 1024;
}

std::int64_t status_bytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field)) return field_bytes(line);
  }
  return 0;
}

}  // namespace

std::int64_t resident_bytes() { return status_bytes("VmRSS:"); }

std::int64_t peak_resident_bytes() { return status_bytes("VmHWM:"); }

void reset_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }

std::int64_t resident_window_bytes(Windows whose) {
  // Others' windows may only be read.
  const std::string access = whose == Windows::own ? " rw-s " : " r--s ";
  std::ifstream maps("/proc/self/smaps");
  std::int64_t bytes = 0;
  bool window = false;
  for (std::string line; std::getline(maps, line);) {
    // A mapping's own line starts with its addresses.
    const std::string first = line.substr(0, line.find(' '));
    if (first.find('-') != std::string::npos && first.back() != ':') {
      window =
          line.find("memfd:annulus") != std::string::npos && line.find(access) != std::string::npos;
    }
    if (window && line.starts_with("Rss:")) bytes += field_bytes(line);
  }
  return bytes;
}

}  // namespace annulus::launch
