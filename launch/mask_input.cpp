#include "launch/mask_input.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/error.hpp"

namespace annulus::launch {
namespace {

// Every row of ids [batch, seq] becomes segments.
std::vector<std::vector<Segment>> segments_of_rows(const std::vector<std::int64_t>& ids,
                                                   std::int64_t batch, std::int64_t seq) {
  std::vector<std::vector<Segment>> segments;
  std::vector<std::int32_t> row(static_cast<std::size_t>(seq));
  for (std::int64_t b = 0; b < batch; ++b) {
    std::transform(ids.begin() + b * seq, ids.begin() + (b + 1) * seq, row.begin(),
                   [](std::int64_t id) { return static_cast<std::int32_t>(id); });
    segments.push_back(segments_of(row));
  }
  return segments;
}

void require_equal_lengths(const RunOptions& options, const Checkpoint& checkpoint,
                           CheckpointField field) {
  const std::int64_t seq_q = checkpoint.shape(CheckpointField::query)[1];
  const std::int64_t seq_kv = checkpoint.shape(CheckpointField::key)[1];
  require(seq_q == seq_kv, ExitCode::bad_data,
          "{}: {} \"{}\" describes one sequence, but seq_q is {} and seq_kv {}", options.operation,
          name(field), options.input.dataset(field), seq_q, seq_kv);
}

}  // namespace

AttentionMask read_mask(Communicator& communicator, const Checkpoint& checkpoint,
                        const RunOptions& options, bool causal) {
  AttentionMask mask;
  mask.causal = causal;
  mask.window_left = options.window[0];
  mask.window_right = options.window[1];
  const bool documents = checkpoint.has(CheckpointField::documents);
  const bool offsets = checkpoint.has(CheckpointField::cu_seqlens);
  require(!(documents && offsets), ExitCode::usage,
          "run: --documents and --cu-seqlens say the same thing; give one of them");
  const Shape& query = checkpoint.shape(CheckpointField::query);
  if (documents) {
    require_equal_lengths(options, checkpoint, CheckpointField::documents);
    mask.q_segments = segments_of_rows(
        checkpoint.read_integers(communicator, CheckpointField::documents), query[0], query[1]);
  }
  if (offsets) {
    require_equal_lengths(options, checkpoint, CheckpointField::cu_seqlens);
    mask.q_segments = {segments_of_offsets(
        checkpoint.read_integers(communicator, CheckpointField::cu_seqlens), query[1])};
  }
  mask.kv_segments = mask.q_segments;
  return mask;
}

std::string describe_mask(const RunOptions& options, bool causal) {
  std::string text = causal ? "causal" : "";
  const auto add = [&text](const std::string& part) { text += (text.empty() ? "" : ", ") + part; };
  if (options.window[0] >= 0 || options.window[1] >= 0) {
    add(fmt::format("window {},{}", options.window[0], options.window[1]));
  }
  for (const CheckpointField field : {CheckpointField::documents, CheckpointField::cu_seqlens,
                                      CheckpointField::mask, CheckpointField::bias}) {
    const std::string& dataset = options.input.dataset(field);
    if (!dataset.empty()) add(fmt::format("{} \"{}\"", name(field), dataset));
  }
  return text.empty() ? "full" : text;
}

}  // namespace annulus::launch
