#include "sharding/stage_recorder.hpp"

#include <chrono>

namespace annulus {

std::string_view name(StageRecord::Kind kind) {
  switch (kind) {
    case StageRecord::Kind::compute:
      return "compute";
    case StageRecord::Kind::wait:
      return "wait";
    case StageRecord::Kind::reduction:
      return "reduction";
    case StageRecord::Kind::share:
      return "share";
    case StageRecord::Kind::exchange:
      return "exchange";
    case StageRecord::Kind::transfer:
      break;
  }
  return "transfer";
}

std::int64_t record_clock_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::vector<StageRecord> StageRecorder::records() const {
  std::vector<StageRecord> records;
  for (const Span& span : spans_) {
    records.push_back(span.record);
    records.back().begin_ns = span.begin.ns();
    records.back().end_ns = span.end.ns();
  }
  return records;
}

}  // namespace annulus
