#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace annulus::testing {

/// An HDF5 file of random f32 queries, keys and values, with what may be wrong about it.
struct QkvFile {
  std::vector<std::uint64_t> query = {2, 12, 2, 16};
  std::vector<std::uint64_t> key = {2, 12, 2, 16};
  std::vector<std::uint64_t> value = {2, 12, 2, 16};  // empty: no such dataset
  bool integer_query = false;
  bool absent = false;
  bool extras = false;       // also documents, cu_seqlens, mask, bias and sinks
  std::int64_t nan_at = -1;  // element of the queries
  bool garbage = false;      // bytes that are no HDF5
  double truncate_to = 1.0;  // part of the file that is left

  void set_heads(std::uint64_t q_heads, std::uint64_t kv_heads);
  void write(const std::string& path) const;
};

}  // namespace annulus::testing
