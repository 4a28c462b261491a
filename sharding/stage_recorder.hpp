#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace annulus {

/// What a rank did, or had under way, from when to when on its steady clock.
struct StageRecord {
  enum class Kind : std::uint8_t {
    compute,    // kernels
    wait,       // for rows to arrive
    reduction,  // partial gradients of others are added
    share,      // rows are put where peers read them
    exchange,   // heads or rows change hands
    transfer,   // rows under way
  };

  Kind kind = Kind::compute;
  int stage = -1;          // -1: none
  int peer = -1;           // -1: several ranks, or none
  std::int64_t bytes = 0;  // that arrive here
  std::int64_t begin_ns = 0;
  std::int64_t end_ns = 0;
};

std::string_view name(StageRecord::Kind kind);

/// Nanoseconds of the steady clock that records are on.
std::int64_t record_clock_ns();

/// Collects what one rank did.
class StageRecorder {
 public:
  void add(const StageRecord& record) { records_.push_back(record); }
  const std::vector<StageRecord>& records() const { return records_; }

 private:
  std::vector<StageRecord> records_;
};

/// Records the time of its life; nothing without a recorder.
class RecordedSpan {
 public:
  RecordedSpan(StageRecorder* recorder, StageRecord::Kind kind, int stage = -1, int peer = -1,
               std::int64_t bytes = 0)
      : recorder_(recorder) {
    if (recorder_ != nullptr) record_ = {kind, stage, peer, bytes, record_clock_ns(), 0};
  }
  ~RecordedSpan() {
    if (recorder_ == nullptr) return;
    record_.end_ns = record_clock_ns();
    recorder_->add(record_);
  }
  RecordedSpan(const RecordedSpan&) = delete;
  RecordedSpan& operator=(const RecordedSpan&) = delete;

 private:
  StageRecorder* recorder_;
  StageRecord record_;
};

}  // namespace annulus
