#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "kernels/mask.hpp"
#include "kernels/types.hpp"
#include "runtime/distributed_tensor.hpp"
#include "sharding/partition_manager.hpp"
#include "sharding/tensor_layout.hpp"

namespace annulus {

class KeyValueCache;

/// What decode operations take besides: a cache, and whose tokens the query rows are.
struct CacheInputs {
  /// Keys and values so far; null for autoregressive_decodeattn over key and value themselves.
  std::shared_ptr<KeyValueCache> cache = nullptr;
  /// Of thd queries, the rows [query_begin[s], query_begin[s+1]) are the last tokens of sequence s
  /// (EasyDeL's query_start_loc); sequences beyond its end have none. Absent in bthd, where every
  /// batch row is a sequence.
  std::span<const std::int64_t> query_begin = {};
  /// Without a cache: the tokens [starts[b], indexes[b]) of each batch row count; absent: all.
  std::span<const std::int64_t> starts = {};
  std::span<const std::int64_t> indexes = {};
  /// Of multi-head latent attention: [.., q_heads, rope] and [.., 1, rope]; query and key are the
  /// latent parts.
  const DistributedTensor* query_rope = nullptr;
  const DistributedTensor* key_rope = nullptr;
};

/// The tensors of one attention, in any layout over the mesh; dimensions in bthd. The optional ones
/// are null when absent.
struct AttentionInputs {
  const DistributedTensor& query;            // [batch, seq_q, q_heads, head_dim]
  const DistributedTensor& key;              // [batch, seq_kv, kv_heads, head_dim]
  const DistributedTensor& value;            // [batch, seq_kv, kv_heads, value_dim]
  const DistributedTensor* bias = nullptr;   // [batch|1, q_heads|kv_heads|1, seq_q, seq_kv]
  const DistributedTensor* mask = nullptr;   // u8, the same shapes; 1 keeps
  const DistributedTensor* sinks = nullptr;  // [q_heads] or [1, q_heads]
  CacheInputs decode = {};
};

/// How the rows of the sequence are dealt to the ranks of a sequence group.
enum class SequenceDeal : std::uint8_t { contiguous, zigzag, balanced };

/// What to compute. What is not given comes from the metadata or the operation.
struct AttentionOptions {
  /// None: the operation's own default. Off in mode decode.
  std::optional<bool> causal = std::nullopt;
  /// The rest of the mask, over all batch rows; its `causal` is not looked at.
  AttentionMask mask = {};
  std::optional<float> scale = std::nullopt;
  float soft_cap = 0.0F;
  std::optional<float> dropout = std::nullopt;
  std::uint64_t seed = 0;
  /// Order of the dimensions of query, key and value. Results are bthd, of thd too (batch 1).
  DimOrder order = DimOrder::bthd;
  /// None: as query and key lie, where the operation can work on that, else contiguous.
  std::optional<SequenceDeal> deal = std::nullopt;
  /// None: the runtime dtype.
  std::optional<DType> output_dtype = std::nullopt;
  bool attention_weights = false;
  bool log_sum_exp = true;
  /// The same bits for any number of ranks.
  bool reproducible = false;
};

/// Global extents of one attention.
struct AttentionShape {
  std::int64_t batch = 1;
  std::int64_t seq_q = 0;
  std::int64_t seq_kv = 0;
  std::int64_t q_heads = 1;
  std::int64_t kv_heads = 1;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  /// Empty when absent.
  Shape bias = {};
  Shape mask = {};
  Shape sinks = {};
  friend bool operator==(const AttentionShape&, const AttentionShape&) = default;
};

/// Throws, naming the tensor and what it is, unless it lies over `mesh` (usage) and its elements
/// are floating-point numbers, or u8 where `flags` (bad_data). An absent tensor passes.
void check_tensor(const DistributedTensor* tensor, std::string_view what, const Mesh& mesh,
                  bool flags = false);
/// Throws usage unless results are asked for in f32, f16, bf16 or no dtype in particular.
void check_output_dtype(const AttentionOptions& options);
/// check_tensor() of all inputs; a dense mask is of flags.
void check_tensors(const AttentionInputs& inputs, const Mesh& mesh);

/// The extents of a tensor as [batch, seq, heads, dim]. Throws usage when it is absent, bad_data
/// when it has not the dimensions of `order`.
Shape bthd_shape(const DistributedTensor& tensor, DimOrder order, std::string_view what);

/// Reads and checks the shapes of the inputs. Throws bad_data naming the tensor, what is expected
/// and what was found.
AttentionShape shape_of(const AttentionInputs& inputs, DimOrder order);

/// Where an operation wants its inputs and leaves its results, all in bthd: inputs that lie so are
/// used in place.
struct AttentionLayouts {
  TensorLayout query;
  TensorLayout key;
  TensorLayout value;
  TensorLayout output;       // [batch, seq_q, q_heads, value_dim]
  TensorLayout log_sum_exp;  // [batch, q_heads, seq_q]
  TensorLayout weights;      // [batch, q_heads, seq_q, seq_kv]
  std::optional<TensorLayout> bias;
  std::optional<TensorLayout> mask;
  std::optional<TensorLayout> sinks;
};

}  // namespace annulus
