#include "launch/number_option.hpp"

#include "kernels/error.hpp"

namespace annulus::launch {

HeadCounts parse_heads(std::string_view text, std::string_view command) {
  const std::size_t colon = text.find(':');
  HeadCounts heads;
  bool good = read_whole(text.substr(0, colon), heads.query);
  heads.kv = heads.query;
  if (colon != std::string_view::npos) good = good && read_whole(text.substr(colon + 1), heads.kv);
  require(good && heads.kv > 0 && heads.query > 0 && heads.query % heads.kv == 0, ExitCode::usage,
          "{}: --heads {}; accepted: QUERY:KV, both 1 or more, KV divides QUERY", command, text);
  return heads;
}

}  // namespace annulus::launch
