#include "launch/report.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "kernels/error.hpp"

namespace annulus::launch {

std::string format_seconds(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.0f} us", seconds * 1e6);
  if (seconds < 1.0) return fmt::format("{:.1f} ms", seconds * 1e3);
  return fmt::format("{:.2f} s", seconds);
}

std::string format_bytes(std::int64_t bytes) {
  const auto number = static_cast<double>(bytes);
  if (number < 1e3) return fmt::format("{} B", bytes);
  if (number < 1e6) return fmt::format("{:.1f} kB", number / 1e3);
  if (number < 1e9) return fmt::format("{:.1f} MB", number / 1e6);
  return fmt::format("{:.2f} GB", number / 1e9);
}

std::string report_line(const Report& report) {
  return fmt::format(
      "{} over {} on {}: {}, {:.3g} TFLOP/s, compute {}, exposed communication {}, sent {}, read "
      "in "
      "place {}, imbalance {:.2f}",
      report.operation, report.mesh, report.backend, format_seconds(report.seconds), report.tflops,
      format_seconds(report.compute_seconds), format_seconds(report.exposed_communication_seconds),
      format_bytes(report.bytes_sent), format_bytes(report.bytes_in_place), report.imbalance);
}

nlohmann::json to_json(const Report& report) {
  return {{"operation", report.operation},
          {"mesh", report.mesh},
          {"backend", report.backend},
          {"ranks", report.ranks},
          {"seconds", report.seconds},
          {"compute_seconds", report.compute_seconds},
          {"exposed_communication_seconds", report.exposed_communication_seconds},
          {"bytes_sent", report.bytes_sent},
          {"bytes_in_place", report.bytes_in_place},
          {"imbalance", report.imbalance},
          {"tflops", report.tflops}};
}

Report report_from_text(const std::string& text) {
  try {
    const nlohmann::json json = nlohmann::json::parse(text);
    return {json.at("operation"),       json.at("mesh"),
            json.value("backend", ""),  // older outputs do not say it
            json.at("ranks"),           json.at("seconds"),
            json.at("compute_seconds"), json.at("exposed_communication_seconds"),
            json.at("bytes_sent"),      json.value("bytes_in_place", std::int64_t{0}),
            json.at("imbalance"),       json.at("tflops")};
  } catch (const nlohmann::json::exception& error) {
    throw Error(ExitCode::bad_data, fmt::format("not the report of a run: {}", error.what()));
  }
}

}  // namespace annulus::launch
