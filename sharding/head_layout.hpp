#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/types.hpp"

namespace annulus {

/// Query heads cut into parts by split_evenly(), each part with the KV heads its query heads need.
/// Any number of parts works: a KV head whose group is cut lies on several parts, and a part
/// without query heads has none.
class HeadLayout {
 public:
  /// Throws bad_data unless both counts are positive and kv_heads divides q_heads.
  HeadLayout(std::int64_t q_heads, std::int64_t kv_heads, int parts);

  int parts() const { return parts_; }
  Span q_heads(int part) const;
  Span kv_heads(int part) const;
  /// How the part's local query heads map to its local KV heads.
  HeadGroups groups(int part) const;
  /// False when a KV head lies on several parts.
  bool kv_heads_divide() const;

  /// The global heads of every part, for TensorLayout::with_runs.
  std::vector<std::vector<Span>> q_runs() const;
  std::vector<std::vector<Span>> kv_runs() const;

 private:
  std::int64_t q_heads_;
  std::int64_t kv_heads_;
  int parts_;
};

/// Throws bad_data unless kv_heads divides q_heads; gives the query heads of one KV head.
std::int64_t heads_per_kv_head(std::int64_t q_heads, std::int64_t kv_heads);

/// The KV head behind each of heads·times heads, blocked: (2, 3) gives 0 0 0 1 1 1. An index map:
/// kernels never repeat heads in memory.
std::vector<std::int64_t> repeat_kv_heads(std::int64_t heads, std::int64_t times);

/// The head of a bias or mask of `heads` heads that each query head reads: itself, the only one, or
/// that of its KV head; absent for absent. A map as long as `heads` leaves the array unchanged.
/// Throws bad_data for another number of heads, and unless kv_heads divides q_heads.
std::optional<std::vector<std::int64_t>> handle_kvhead(std::optional<std::int64_t> heads,
                                                       std::int64_t q_heads, std::int64_t kv_heads);

}  // namespace annulus
