#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/decode_attention.hpp"
#include "runtime/operation_metadata.hpp"
#include "runtime/tensor.hpp"
#include "sharding/cache_pages.hpp"
#include "sharding/tensor_layout.hpp"

namespace annulus {

/// The mesh axes that split batch, sequence and heads in decode mode.
struct CacheAxes {
  AxisTuple batch;
  AxisTuple sequence;
  AxisTuple head;
};

/// Those of the metadata's partition that its mesh has.
CacheAxes cache_axes(const OperationMetadata& metadata);

/// The KV heads of each part along the head axes: a share, or with more parts than heads one head
/// each. Throws usage where neither count divides the other.
std::vector<Runs> cache_heads(std::int64_t kv_heads, int parts);

struct KeyValueCacheOptions {
  std::int64_t sequences = 1;
  std::int64_t kv_heads = 1;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  /// Keys are [latent | rope] of one KV head, and their first value_dim columns the values.
  bool latent = false;
  DType dtype = DType::bf16;
  std::int64_t page_size = 16;  // 1 to 256 tokens
  std::int64_t pages = 0;       // of every rank
  std::int64_t block = 0;       // tokens dealt to a rank at a time; 0: page_size
  /// Not 0: a contiguous cache [sequences, tokens], one page a sequence; the three above do not
  /// matter.
  std::int64_t contiguous_tokens = 0;
};

/// One rank's part of a cache of keys and values that is spread over a mesh: sequences along the
/// batch axes, KV heads along the head axes, tokens dealt along the sequence axes. What changes it
/// (append, truncate, free) is called by all ranks alike and needs no communication.
class KeyValueCache {
 public:
  /// Memory is uninitialised. On the metadata's device. Throws usage for options out of range.
  KeyValueCache(const OperationMetadata& metadata, const KeyValueCacheOptions& options);

  const KeyValueCacheOptions& options() const { return options_; }
  const CachePages& pages() const { return pages_; }
  const CacheAxes& axes() const { return axes_; }
  const Mesh& mesh() const { return mesh_; }
  Device device() const { return key_.device(); }
  std::span<const std::int64_t> lengths() const { return pages_.lengths(); }
  /// First token of each sequence that is no padding.
  std::span<const std::int64_t> starts() const { return starts_; }

  /// As CachePages; the new places hold nothing until write().
  void append(std::span<const std::int64_t> rows) { pages_.append(rows); }
  void truncate(std::int64_t sequence, std::int64_t length);
  void free(std::int64_t sequence) { truncate(sequence, 0); }
  void set_start(std::int64_t sequence, std::int64_t start);

  /// Writes those of the last tokens of each sequence that lie on this rank. `query_begin` is of
  /// this rank's sequences; new_k is [tokens, its kv_heads, head_dim], new_v likewise, absent
  /// where values are part of the keys. Views on the cache's device.
  void write(const ConstTensorView& query_begin, const ConstTensorView& new_k,
             const ConstTensorView& new_v);

  /// The cache's part of a problem: k, v, page_table, lengths, starts, deal. Valid until the cache
  /// changes.
  DecodeProblem problem() const;
  /// [pages, page_size, kv_heads of this rank, dim].
  TensorView key() { return key_.view(); }
  TensorView value();

 private:
  ConstTensorView integers(std::span<const std::int32_t> values, const Shape& shape,
                           Tensor& on_device) const;

  KeyValueCacheOptions options_;
  Mesh mesh_;
  CacheAxes axes_;
  CachePages pages_;
  std::vector<std::int64_t> starts_;
  std::vector<std::int32_t> local_starts_;
  Tensor key_;
  Tensor value_;
  // Copies for kernels on a device, made anew for each problem.
  mutable Tensor table_;
  mutable Tensor lengths_;
  mutable Tensor device_starts_;
};

}  // namespace annulus
