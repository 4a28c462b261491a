#pragma once

#include <cstdint>
#include <exception>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/cuda_support.hpp"
#include "kernels/types.hpp"

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

/// Now on the host, or when a device's stream has done all that it holds now.
class StageMoment {
 public:
  StageMoment() : ns_(record_clock_ns()) {}
  explicit StageMoment(Stream stream) : mark_(stream) {}
  /// Waits for the stream.
  std::int64_t ns() const { return mark_ ? mark_->wait_ns() : ns_; }

 private:
  std::int64_t ns_ = 0;
  std::optional<kernels::cuda::StreamMark> mark_;
};

/// Collects what one rank did. Hosts run ahead of their devices, so that what is done on a device
/// is recorded by the moments of its stream.
class StageRecorder {
 public:
  /// Where what is done from now on is done.
  struct Clock {
    Device device = Device::cpu;
    Stream stream;
  };
  /// The clock before.
  Clock follow(Clock clock) { return std::exchange(clock_, clock); }
  StageMoment now() const {
    return clock_.device == Device::cuda ? StageMoment(clock_.stream) : StageMoment();
  }
  /// The record's own times are not looked at.
  void add(const StageRecord& record, StageMoment begin, StageMoment end) {
    spans_.push_back({record, std::move(begin), std::move(end)});
  }
  /// Waits for the device.
  std::vector<StageRecord> records() const;

 private:
  struct Span {
    StageRecord record;
    StageMoment begin;
    StageMoment end;
  };
  Clock clock_;
  std::vector<Span> spans_;
};

/// Records the time of its life; nothing without a recorder.
class RecordedSpan {
 public:
  RecordedSpan(StageRecorder* recorder, StageRecord::Kind kind, int stage = -1, int peer = -1,
               std::int64_t bytes = 0)
      : recorder_(recorder) {
    if (recorder_ == nullptr) return;
    record_ = {kind, stage, peer, bytes, 0, 0};
    begin_ = recorder_->now();
  }
  ~RecordedSpan() {
    if (recorder_ == nullptr) return;
    try {
      recorder_->add(record_, std::move(begin_), recorder_->now());
    } catch (const std::exception&) {
      // The device's failure is told by the work itself; this span is not.
    }
  }
  RecordedSpan(const RecordedSpan&) = delete;
  RecordedSpan& operator=(const RecordedSpan&) = delete;

 private:
  StageRecorder* recorder_;
  StageRecord record_;
  StageMoment begin_;
};

}  // namespace annulus
