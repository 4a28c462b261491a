#pragma once

#include <cstdint>
#include <optional>

#include "kernels/mask.hpp"
#include "runtime/attention_inputs.hpp"
#include "runtime/operation_metadata.hpp"
#include "sharding/head_layout.hpp"
#include "sharding/sequence_layout.hpp"

namespace annulus {

/// Whether a rank works on its own keys and others' in turn, or holds the keys of the whole
/// sequence.
enum class KeyRows : std::uint8_t { dealt, whole };

/// How one attention lies on the mesh: batch rows along the batch axes, query heads with the KV
/// heads they need along the head axes, rows along the sequence axes. A value computed from global
/// facts alone, hence the same on all ranks.
struct AttentionSetup {
  AttentionShape shape;
  MaskSlices mask;  // of all batch rows, in global positions
  AxisTuple batch_axes;
  AxisTuple sequence_axes;
  AxisTuple head_axes;
  SequenceLayout q_rows;
  SequenceLayout kv_rows;
  HeadLayout heads;
  AttentionLayouts layouts;
  KeyRows key_rows = KeyRows::dealt;

  const Mesh& mesh() const { return layouts.query.mesh(); }
  int head_part(int rank) const { return mesh().group_index(rank, head_axes); }
  int sequence_part(int rank) const { return mesh().group_index(rank, sequence_axes); }
  /// Global batch rows of `rank`.
  Span batch(int rank) const;
};

/// Layouts in which query and key already lie, in bthd; used where the operation can work on them,
/// unless another one saves more computing than it costs to exchange the rows.
struct GivenLayouts {
  const TensorLayout* query = nullptr;
  const TensorLayout* key = nullptr;
  /// Whether balance depends on how rows are dealt: not where every rank sees all of them.
  bool rows_share_work = false;
};

/// Throws usage where the partition cannot serve an attention, bad_data where the mask does not fit
/// the lengths.
AttentionSetup make_setup(const OperationMetadata& metadata, const AttentionShape& shape,
                          const AttentionOptions& options, bool causal, KeyRows key_rows,
                          const GivenLayouts& given = {});

/// The slices of batch rows [batch.begin, batch.end).
MaskSlices mask_of(const MaskSlices& mask, Span batch);

/// Whether every rank holds the same elements in both, in the same order.
bool same_shards(const TensorLayout& a, const TensorLayout& b);

/// The layout of an input in bthd, from the one it has in `order`.
TensorLayout bthd_layout(const TensorLayout& layout, DimOrder order);

/// The distribution of query rows and heads, for results: [batch, seq, heads, width] and
/// [batch, heads, seq].
TensorLayout output_layout(const TensorLayout& query, std::int64_t width);
TensorLayout row_layout(const TensorLayout& query);

}  // namespace annulus
