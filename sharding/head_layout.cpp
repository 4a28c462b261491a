#include "sharding/head_layout.hpp"

#include "kernels/error.hpp"
#include "sharding/named_sharding.hpp"

namespace annulus {

std::int64_t heads_per_kv_head(std::int64_t q_heads, std::int64_t kv_heads) {
  require(q_heads > 0 && kv_heads > 0 && q_heads % kv_heads == 0, ExitCode::bad_data,
          "heads: {} query heads do not group over {} KV heads; the KV heads must divide the query "
          "heads",
          q_heads, kv_heads);
  return q_heads / kv_heads;
}

HeadLayout::HeadLayout(std::int64_t q_heads, std::int64_t kv_heads, int parts)
    : q_heads_(q_heads), kv_heads_(kv_heads), parts_(parts) {
  heads_per_kv_head(q_heads, kv_heads);
  require(parts >= 1, ExitCode::usage, "heads: {} parts; there must be at least 1", parts);
}

Span HeadLayout::q_heads(int part) const { return split_evenly(q_heads_, parts_, part); }

Span HeadLayout::kv_heads(int part) const {
  const std::int64_t group = q_heads_ / kv_heads_;
  const Span q = q_heads(part);
  const std::int64_t begin = q.begin / group;
  return {begin, q.empty() ? begin : (q.end + group - 1) / group};
}

HeadGroups HeadLayout::groups(int part) const {
  const std::int64_t group = q_heads_ / kv_heads_;
  return {.group_size = group, .q_head_offset = q_heads(part).begin % group};
}

bool HeadLayout::kv_heads_divide() const {
  std::int64_t held = 0;
  for (int part = 0; part < parts_; ++part) held += kv_heads(part).size();
  return held == kv_heads_;
}

std::vector<std::vector<Span>> HeadLayout::q_runs() const {
  std::vector<std::vector<Span>> runs;
  for (int part = 0; part < parts_; ++part) runs.push_back({q_heads(part)});
  return runs;
}

std::vector<std::vector<Span>> HeadLayout::kv_runs() const {
  std::vector<std::vector<Span>> runs;
  for (int part = 0; part < parts_; ++part) runs.push_back({kv_heads(part)});
  return runs;
}

std::vector<std::int64_t> repeat_kv_heads(std::int64_t heads, std::int64_t times) {
  std::vector<std::int64_t> map;
  for (std::int64_t i = 0; i < heads * times; ++i) map.push_back(i / times);
  return map;
}

std::optional<std::vector<std::int64_t>> handle_kvhead(std::optional<std::int64_t> heads,
                                                       std::int64_t q_heads,
                                                       std::int64_t kv_heads) {
  const std::int64_t group = heads_per_kv_head(q_heads, kv_heads);
  if (!heads) return std::nullopt;
  if (*heads == q_heads || *heads == 1) return repeat_kv_heads(*heads, 1);
  require(*heads == kv_heads, ExitCode::bad_data,
          "Incompatible array shape. Got {} heads, expected {}, {}, or 1", *heads, q_heads,
          kv_heads);
  return repeat_kv_heads(kv_heads, group);
}

}  // namespace annulus
