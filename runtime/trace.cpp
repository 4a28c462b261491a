#include "runtime/trace.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "runtime/agreement.hpp"
#include "runtime/text_file.hpp"

namespace annulus {
namespace {

std::unique_ptr<StageRecorder>& process_recorder() {
  static std::unique_ptr<StageRecorder> recorder;
  return recorder;
}

template <typename T>
void send(Communicator& ranks, int peer, const std::vector<T>& values) {
  const Send message{peer, values.data(), static_cast<std::int64_t>(values.size() * sizeof(T))};
  ranks.exchange({&message, 1}, {})->wait();
}

template <typename T>
void receive(Communicator& ranks, int peer, std::vector<T>& values) {
  const Receive message{peer, values.data(), static_cast<std::int64_t>(values.size() * sizeof(T))};
  ranks.exchange({}, {&message, 1})->wait();
}

// Rows of the picture: stages take turns in the rows of transfers, since two of them overlap.
int row_of(const StageRecord& record) {
  if (record.kind == StageRecord::Kind::compute) return 0;
  if (record.kind != StageRecord::Kind::transfer) return 1;
  return 2 + std::max(record.stage, 0) % 2;
}

nlohmann::json named(const char* what, int rank, int row, const std::string& text) {
  return {{"name", what}, {"ph", "M"}, {"pid", rank}, {"tid", row}, {"args", {{"name", text}}}};
}

nlohmann::json event_of(const StageRecord& record, int rank, std::int64_t origin_ns) {
  std::string text(name(record.kind));
  if (record.stage >= 0) text += fmt::format(" {}", record.stage);
  nlohmann::json values = nlohmann::json::object();
  if (record.stage >= 0) values["stage"] = record.stage;
  if (record.peer >= 0) values["peer"] = record.peer;
  if (record.bytes > 0) values["bytes"] = record.bytes;
  // The format counts in microseconds.
  return {{"name", text},
          {"cat", name(record.kind)},
          {"ph", "X"},
          {"pid", rank},
          {"tid", row_of(record)},
          {"ts", static_cast<double>(record.begin_ns - origin_ns) * 1e-3},
          {"dur", static_cast<double>(record.end_ns - record.begin_ns) * 1e-3},
          {"args", std::move(values)}};
}

nlohmann::json trace_of(const std::vector<std::vector<StageRecord>>& records) {
  std::int64_t origin = std::numeric_limits<std::int64_t>::max();
  for (const auto& of_rank : records) {
    for (const StageRecord& record : of_rank) origin = std::min(origin, record.begin_ns);
  }
  nlohmann::json events = nlohmann::json::array();
  for (std::size_t r = 0; r < records.size(); ++r) {
    const int rank = static_cast<int>(r);
    events.push_back(named("process_name", rank, 0, fmt::format("rank {}", rank)));
    events.push_back(named("thread_name", rank, 0, "compute"));
    events.push_back(named("thread_name", rank, 1, "communication"));
    for (const int row : {2, 3}) {
      events.push_back(named("thread_name", rank, row, "transfers"));
    }
    for (const StageRecord& record : records[r]) events.push_back(event_of(record, rank, origin));
  }
  return {{"displayTimeUnit", "ms"}, {"traceEvents", std::move(events)}};
}

// The records of every rank, on the first rank only.
std::vector<std::vector<StageRecord>> gathered(Communicator& ranks, std::vector<StageRecord> mine) {
  const auto count = static_cast<std::int64_t>(mine.size());
  std::vector<std::int64_t> counts(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&count, 1)), std::as_writable_bytes(std::span(counts)));
  std::vector<std::vector<StageRecord>> all;
  if (ranks.rank() != 0) {
    send(ranks, 0, mine);
    return all;
  }
  all.push_back(std::move(mine));
  for (int peer = 1; peer < ranks.size(); ++peer) {
    all.emplace_back(static_cast<std::size_t>(counts[static_cast<std::size_t>(peer)]));
    receive(ranks, peer, all.back());
  }
  return all;
}

}  // namespace

StageRecorder* trace_recorder() { return process_recorder().get(); }

void start_trace() { process_recorder() = std::make_unique<StageRecorder>(); }

// The answer is taken to be made half way between question and arrival.
std::int64_t clock_offset_ns(Communicator& ranks, const std::function<std::int64_t()>& clock) {
  constexpr int kRounds = 16;
  std::int64_t offset = 0;
  for (int peer = 1; peer < ranks.size(); ++peer) {
    if (ranks.rank() != 0 && ranks.rank() != peer) continue;
    std::int64_t fastest = std::numeric_limits<std::int64_t>::max();
    for (int round = 0; round < kRounds; ++round) {
      std::vector<std::int64_t> time(1);
      if (ranks.rank() == 0) {
        receive(ranks, peer, time);
        time.front() = clock();
        send(ranks, peer, time);
        continue;
      }
      const std::int64_t asked = clock();
      send(ranks, 0, time);
      receive(ranks, 0, time);
      const std::int64_t answered = clock();
      if (answered - asked >= fastest) continue;
      fastest = answered - asked;
      offset = time.front() - (asked + (answered - asked) / 2);
    }
  }
  return offset;
}

void write_trace(Communicator& ranks, const std::string& path) {
  std::vector<StageRecord> mine;
  if (trace_recorder() != nullptr) mine = trace_recorder()->records();
  process_recorder().reset();
  const std::int64_t offset = clock_offset_ns(ranks);
  for (StageRecord& record : mine) {
    record.begin_ns += offset;
    record.end_ns += offset;
  }
  const std::vector<std::vector<StageRecord>> all = gathered(ranks, std::move(mine));
  agree(ranks, [&] {
    if (ranks.rank() == 0) write_text("trace", path, trace_of(all).dump() + '\n');
  });
}

}  // namespace annulus
