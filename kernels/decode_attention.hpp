#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "kernels/attention.hpp"
#include "kernels/types.hpp"

namespace annulus {

/// How the tokens of every sequence are dealt to the ranks that share a cache: blocks of `block`
/// tokens in turn, the first to rank 0, so that the ranks' shares grow evenly. A rank numbers its
/// own tokens of a sequence 0, 1, … in the order of their positions.
struct CacheDeal {
  std::int64_t block = 1;
  std::int64_t ranks = 1;
  std::int64_t rank = 0;

  /// Position in the sequence of this rank's token.
  std::int64_t position(std::int64_t local) const {
    return (local / block * ranks + rank) * block + local % block;
  }
  /// How many of the positions [0, length) are this rank's; also the local number of the first
  /// token of this rank that stands at `length` or later.
  std::int64_t tokens(std::int64_t length) const {
    const std::int64_t round = block * ranks;
    const std::int64_t rest = length % round - rank * block;
    return length / round * block + (rest < 0 ? 0 : (rest < block ? rest : block));
  }
  bool holds(std::int64_t position) const { return position / block % ranks == rank; }
  friend bool operator==(const CacheDeal&, const CacheDeal&) = default;
};

/// Attention of a rank's part of a paged cache for rows of queries that are prefill chunks and
/// decode steps in one batch.
///
/// Sequence s owns the query rows [query_begin[s], query_begin[s+1]), its last tokens: row i of n
/// stands at position p = lengths[s] − n + i. It sees the keys at positions k with
///   starts[s] <= k < lengths[s],  k <= p where causal,  p − window_left <= k <= p + window_right.
/// This rank's token number t of sequence s lies in page page_table[s, t / page_size], at row
/// t % page_size. A contiguous cache [batch, seq, kv_heads, dim] is one page a sequence:
/// page_size = seq, page_table[s] = {s}. Multi-head latent attention in absorbed form has one KV
/// head [latent | rope] whose first columns are the values: v is k's memory, with fewer columns.
///
/// f32, f16, bf16, all of q, k, v alike; head_dim contiguous, other strides free. The i32 tensors
/// are contiguous and lie on q's device, where the kernel reads them: lengths may grow between the
/// launches of a CUDA graph. Entries of the page table whose pages hold no visible key are not
/// looked at, nor are rows of pages that hold none (they may hold NaN).
struct DecodeProblem {
  ConstTensorView q;            // [tokens, q_heads, head_dim]
  ConstTensorView query_begin;  // i32 [sequences + 1], from 0, never falling
  ConstTensorView k;            // [pages, page_size, kv_heads, head_dim]
  ConstTensorView v;            // [pages, page_size, kv_heads, value_dim]
  ConstTensorView page_table;   // i32 [sequences, max_pages]
  ConstTensorView lengths;      // i32 [sequences], tokens on all ranks, the query rows' included
  ConstTensorView starts;       // i32 [sequences], left padding; absent: 0
  CacheDeal deal;
  float scale = 1.0F;
  float soft_cap = 0.0F;  // 0: none
  bool causal = true;
  std::int64_t window_left = -1;  // -1: unbounded, here and below
  std::int64_t window_right = -1;
  ConstTensorView sinks;  // f32 [q_heads], logits; absent: none. Of several ranks one has them.
  /// Most query rows of a sequence, for choosing a kernel where query_begin is on a device; 1 says
  /// that this is a decode step. 0: not known.
  std::int64_t max_rows = 0;

  std::int64_t tokens() const { return q.shape[0]; }
  std::int64_t q_heads() const { return q.shape[1]; }
  std::int64_t head_dim() const { return q.shape[2]; }
  std::int64_t sequences() const { return lengths.shape[0]; }
  std::int64_t page_size() const { return k.shape[1]; }
  std::int64_t kv_heads() const { return k.shape[2]; }
  std::int64_t value_dim() const { return v.shape[3]; }
  std::int64_t group_size() const { return q_heads() / kv_heads(); }
  std::int64_t max_pages() const { return page_table.shape[1]; }
  /// Whether the values are the first columns of the keys, to be read once.
  bool latent() const { return k.data == v.data; }
};

/// The positions that a query at position `p` of a sequence may see; they need not be this rank's.
Span visible_keys(const DecodeProblem& problem, std::int64_t p, std::int64_t start,
                  std::int64_t length);

/// Throws bad_data or usage for what is inconsistent in shapes, dtypes and heads, and on the CPU
/// in the i32 tensors too: offsets, lengths, and pages of visible keys.
void validate(const DecodeProblem& problem);

/// One call. With `o` it finishes: O in o's dtype and, when present, log_sum_exp; a row without
/// keys gives O = 0, LSE = −inf. Else it leaves a state that other ranks' states are merged with.
/// Rows of q that no sequence owns are left as they are.
struct DecodeCall {
  DecodeProblem problem;
  AttentionState state;    // f32 accumulator [1, tokens, q_heads, value_dim], max and sum
                           // [1, q_heads, tokens]
  TensorView o;            // [tokens, q_heads, value_dim]
  TensorView log_sum_exp;  // f32 [q_heads, tokens], any strides
  Stream stream;
};

/// Writes new keys and values of each sequence, positions [length − rows, length), to those places
/// of the cache that are this rank's. The other fields are those of DecodeProblem.
struct CacheAppend {
  ConstTensorView new_k;        // [tokens, kv_heads, head_dim]
  ConstTensorView new_v;        // [tokens, kv_heads, value_dim]; absent where v is part of k
  ConstTensorView query_begin;  // i32 [sequences + 1]
  TensorView k;
  TensorView v;
  ConstTensorView page_table;
  ConstTensorView lengths;  // after the new tokens
  CacheDeal deal;
  Stream stream;
};

/// One implementation. `unsupported` returns why it cannot serve a problem, or nothing.
struct DecodeBackend {
  std::string_view name;
  Device device;
  std::string (*unsupported)(const DecodeProblem& problem);
  void (*forward)(const DecodeCall& call);
};

/// All backends in order of preference: sm90, cpu, reference.
std::span<const DecodeBackend> decode_backends();

/// The first backend on q's device (or the named one) that supports the problem; throws usage with
/// every backend's reason when none does.
const DecodeBackend& select_backend(const DecodeProblem& problem, std::string_view name = {});

void decode_forward(const DecodeCall& call, std::string_view backend = {});

/// Throws bad_data, on the CPU also for offsets, lengths and pages that do not fit the cache.
void append_to_cache(const CacheAppend& call);

}  // namespace annulus
