// Any words as the arguments of `annulus run`: they read as options whose text reads back to the
// same, or are refused. Words end at newlines. Left out: --config, which opens files, and --help.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/error.hpp"
#include "launch/options.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const std::string_view left_out : {"--c", "--h", "-h"}) {
    if (text.find(left_out) != std::string_view::npos) return 0;
  }
  std::vector<std::string> words;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    words.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  try {
    const auto options = annulus::launch::parse_run_options(words);
    if (!options) return 0;
    const auto again = annulus::launch::restore_run_options(options->text);
    if (again.operation != options->operation || again.window != options->window) std::abort();
  } catch (const annulus::Error&) {
  }
  return 0;
}
