#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace annulus::launch {

/// What a run took, over all ranks.
struct Report {
  std::string operation;
  std::string mesh;
  std::string backend;  // where it was computed
  int ranks = 1;
  double seconds = 0.0;                        // of the slowest rank
  double compute_seconds = 0.0;                // mean over the ranks
  double exposed_communication_seconds = 0.0;  // mean over the ranks
  std::int64_t bytes_sent = 0;                 // sum over the ranks
  std::int64_t bytes_in_place = 0;             // of other ranks, read where they lie; sum
  double imbalance = 1.0;                      // largest share of the kept pairs over the mean
  double tflops = 0.0;                         // kept products and sums only
};

/// ring over sp=4 on cpu: 12.3 ms, 0.041 TFLOP/s, compute 11.9 ms, exposed communication 0.2 ms, …
std::string report_line(const Report& report);

nlohmann::json to_json(const Report& report);
/// Throws bad_data for a text that is no report.
Report report_from_text(const std::string& text);

/// A number with a unit that suits it: "12.3 ms", "1.5 MB".
std::string format_seconds(double seconds);
std::string format_bytes(std::int64_t bytes);

}  // namespace annulus::launch
