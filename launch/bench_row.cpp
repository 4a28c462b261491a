#include "launch/bench_row.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "launch/report.hpp"

namespace annulus::launch {
namespace {

nlohmann::json number_or_null(double value) {
  return value > 0.0 ? nlohmann::json(value) : nlohmann::json();
}

double ratio(double rate, double of) { return of > 0.0 ? rate / of : 0.0; }

std::string shape_of(const BenchRow& row) {
  if (row.seq_q == 0) return "";
  std::string text = fmt::format("{}x{}x{}x{}", row.batch, row.seq_q, row.heads, row.head_dim);
  if (row.kv_heads > 0 && (row.kv_heads != row.heads || row.seq_kv != row.seq_q)) {
    text += fmt::format(" on {}x{}", row.seq_kv, row.kv_heads);
  }
  return text;
}

std::string with_ratio(double rate, double of) {
  return of > 0.0 ? fmt::format("{:.3g} ({:.2f})", of, ratio(rate, of)) : "-";
}

}  // namespace

nlohmann::json to_json(const BenchRow& row) {
  return {{"name", row.name},
          {"direction", row.direction},
          {"dtype", row.dtype},
          {"mask", row.mask},
          {"batch", row.batch},
          {"heads", row.heads},
          {"kv_heads", row.kv_heads},
          {"seq_q", row.seq_q},
          {"seq_kv", row.seq_kv},
          {"head_dim", row.head_dim},
          {"ranks", row.ranks},
          {"seconds", row.seconds},
          {"rate", row.rate},
          {"unit", row.unit},
          {"ceiling", number_or_null(row.ceiling)},
          {"of_ceiling", number_or_null(ratio(row.rate, row.ceiling))},
          {"peer", number_or_null(row.peer)},
          {"of_peer", number_or_null(ratio(row.rate, row.peer))}};
}

void print_rows(std::span<const BenchRow> rows, bool json) {
  if (json) {
    nlohmann::json all = nlohmann::json::array();
    for (const BenchRow& row : rows) all.push_back(to_json(row));
    fmt::print("{}\n", all.dump(2));
    return;
  }
  fmt::print("{:<24} {:<9} {:<5} {:<10} {:<22} {:>5} {:>10} {:>14} {:>16} {:>16}\n", "name",
             "direction", "dtype", "mask", "shape", "ranks", "time", "rate", "ceiling (of it)",
             "peer (of it)");
  for (const BenchRow& row : rows) {
    fmt::print("{:<24} {:<9} {:<5} {:<10} {:<22} {:>5} {:>10} {:>14} {:>16} {:>16}\n", row.name,
               row.direction, row.dtype, row.mask, shape_of(row), row.ranks,
               format_seconds(row.seconds), fmt::format("{:.3g} {}", row.rate, row.unit),
               with_ratio(row.rate, row.ceiling), with_ratio(row.rate, row.peer));
  }
}

}  // namespace annulus::launch
