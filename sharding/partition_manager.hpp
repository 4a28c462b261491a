#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>

#include "kernels/types.hpp"
#include "sharding/partition_axis.hpp"
#include "sharding/partition_spec.hpp"

namespace annulus {

/// Order of the dimensions of queries, keys and values; thd packs the tokens of all sequences.
enum class DimOrder { bthd, bhtd, thd };

std::string_view name(DimOrder order);

/// decode when the queries hold one token, else train. Reads the sequence dimension of `order`:
/// one head is not one token.
Mode get_mode(const Shape& query, DimOrder order);

/// Decoding turns causal off: the one query sees the whole cache.
bool causal_in(Mode mode, bool causal);

/// Specs of everything an attention operation takes and gives.
struct AttentionShardings {
  PartitionSpec query;
  PartitionSpec key;
  PartitionSpec value;
  PartitionSpec output;
  PartitionSpec bias;  // [batch, heads, seq_q, seq_kv]; without batch in thd
  PartitionSpec mask;
  PartitionSpec query3d;      // [batch, heads, head_dim], one token
  PartitionSpec segment_ids;  // [batch, seq_q]; [tokens] in thd
  PartitionSpec kv_segment_ids;
  PartitionSpec sinks1d;  // [heads]
  PartitionSpec sinks2d;  // [1 or kv_heads, heads]

  const PartitionSpec& sinks(int rank) const { return rank == 2 ? sinks2d : sinks1d; }
};

/// Turns semantic axes into specs: a PartitionAxis and what a user registered beside it.
class PartitionManager {
 public:
  explicit PartitionManager(PartitionAxis axis = {}) : axis_(std::move(axis)) {}

  /// Throws usage when the name is taken or is no identifier.
  void register_axis(std::string name, AxisRule rule);

  /// Throws usage, listing the names, for an unknown semantic axis; "_" is no axis.
  const AxisTuple& axes_of(std::string_view semantic, Mode mode) const;
  PartitionSpec resolve(std::span<const std::string_view> semantics, Mode mode) const;
  PartitionSpec resolve(std::initializer_list<std::string_view> semantics, Mode mode) const {
    return resolve(std::span(semantics.begin(), semantics.size()), mode);
  }

  /// In thd the packed tokens lie along the sequence axis alone: a batch axis would cut through
  /// sequences that have to see each other.
  AttentionShardings get_shardings(Mode mode, DimOrder order) const;

  const PartitionAxis& axis() const { return axis_; }

 private:
  PartitionAxis axis_;
  std::map<std::string, AxisRule, std::less<>> registered_;
};

}  // namespace annulus
