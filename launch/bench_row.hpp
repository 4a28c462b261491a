#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>

namespace annulus::launch {

/// One measurement of `annulus bench`; zero and empty fields do not apply. `ceiling` is what the
/// machine reached in the same run without annulus, in the same unit, and `peer` what another
/// library did.
struct BenchRow {
  std::string name;
  std::string direction;  // forward, backward, read, write
  std::string dtype;
  std::string mask;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t seq_q = 0;
  std::int64_t seq_kv = 0;
  std::int64_t head_dim = 0;
  int ranks = 1;
  double seconds = 0.0;
  double rate = 0.0;
  std::string unit;
  double ceiling = 0.0;
  double peer = 0.0;
};

nlohmann::json to_json(const BenchRow& row);

/// Prints rows as a table, or as the JSON array that --json promises.
void print_rows(std::span<const BenchRow> rows, bool json);

}  // namespace annulus::launch
