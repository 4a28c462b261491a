#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"
#include "kernels/mask.hpp"
#include "launch/options.hpp"
#include "runtime/checkpoint.hpp"
#include "sharding/communicator.hpp"

namespace annulus::launch {

/// A part of a field in host memory.
class FieldPart {
 public:
  /// Rounds what is stored to `rounded` and holds it as `held`. Collective over `alone`.
  FieldPart(Communicator& alone, const Checkpoint& checkpoint, CheckpointField field,
            const Selection& selection, DType rounded, DType held = DType::f64);
  ConstTensorView view() const { return {buffer_.data(), held_, shape_}; }

 private:
  Shape shape_;
  DType held_;
  Buffer buffer_;
};

/// Some query rows and keys of one batch row and query head: rising ranges that do not touch.
struct AttentionCut {
  std::int64_t batch = 0;
  std::int64_t q_head = 0;
  std::vector<Span> queries;
  std::vector<Span> keys;
};

std::vector<Span> single_rows(const std::vector<std::int64_t>& rows);

/// A cut as a problem of one head over local indices, its tensors as the computation saw them:
/// rounded to its dtype, then in double.
class CutAttention {
 public:
  /// Reads what the cut needs. Collective over `alone`, which is for ranks that work on the same
  /// cut: usually of one rank.
  CutAttention(Communicator& alone, const Checkpoint& checkpoint, const RunOptions& options,
               const MaskSlices& mask, const AttentionCut& cut);
  CutAttention(const CutAttention&) = delete;
  CutAttention& operator=(const CutAttention&) = delete;

  const AttentionProblem& problem() const { return problem_; }

 private:
  std::vector<Slice> slices_;
  std::vector<PositionRun> q_positions_;
  std::vector<PositionRun> k_positions_;
  std::optional<FieldPart> q_;
  std::optional<FieldPart> k_;
  std::optional<FieldPart> v_;
  std::optional<FieldPart> bias_;
  std::optional<FieldPart> sinks_;
  std::optional<FieldPart> mask_;
  AttentionProblem problem_;
};

}  // namespace annulus::launch
