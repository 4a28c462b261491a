#pragma once

#include "kernels/sm90/forward_work.hpp"

namespace annulus::kernels::sm90 {

enum class BlockOrder : std::uint8_t {
  /// So that the last to finish are short; but what shares its slices, as a document's blocks do,
  /// stays together, because it reads the same queries.
  most_queries_first,
  first_keys_first,  // the order of deterministic additions
};

/// The blocks of keys of a backward launch in the order given: entries whose q_begin counts keys,
/// and their slices, clipped to the run of keys between two slice bounds that the block lies in.
/// All keys of a block thus belong to the same slices, and each key to one block. Keys that no
/// slice covers have no block. Pure host arithmetic.
ForwardWork plan_backward(const SliceList& mask, std::int64_t batch, std::int32_t block_keys,
                          BlockOrder order);

/// Blocks of `queries` queries that the blocks of keys meet, in all.
std::int64_t blocks_of_queries(const ForwardWork& work, std::int32_t block_keys,
                               std::int32_t queries);

/// The most of them that one block of keys meets.
std::int64_t most_blocks_of_queries(const ForwardWork& work, std::int32_t block_keys,
                                    std::int32_t queries);

/// How the last blocks of keys of a launch are cut by their queries, so that its thread blocks end
/// together, where `units` units go through each and all passes are the same; else not at all.
/// The last `last_units` of the units come after the others.
TailCut cut_last_keys(const ForwardWork& work, std::int32_t units, std::int32_t last_units,
                      std::int32_t block_keys, std::int32_t queries, std::int32_t processors);

/// Puts in the place of the entries after cut.whole their pieces by whole blocks of `queries`
/// queries, the first pieces of all first, because they read the same queries.
void cut_entries(ForwardWork& work, const TailCut& cut, std::int32_t block_keys,
                 std::int32_t queries);

/// Blocks of queries of a pass where all are the same: each block of keys has one slice and meets
/// as many; else 0.
std::int64_t equal_blocks(const ForwardWork& work, std::int32_t block_keys, std::int32_t queries);

inline constexpr std::int64_t kLongPassRows = 20 * 1024;
inline constexpr std::int64_t kFewKeysTogether = 512;
/// Of Q, dO and dQ of 96 columns, in a row from which on passes drift apart.
inline constexpr std::int64_t kDriftBytes = 768;

/// How many keys of a head should go through its queries at the same time, in passes of `pass_rows`
/// rows. Blocks of keys that keep together find Q, dO and dQ in L2, and many add to dQ at a lower
/// rate; but the longer a pass, and the more `row_bytes` of Q, dO and dQ it touches, the further
/// few of them drift apart. Measured on an H200, D = 128.
std::int64_t keys_together(std::int64_t pass_rows, std::int64_t row_bytes);

/// Whether each of the `seq_kv` keys of each of `batch` rows lies in a block, and the blocks' ends,
/// but for the last, at multiples of `box` keys from their beginnings.
bool covers_all_keys(const ForwardWork& work, std::int64_t batch, std::int64_t seq_kv,
                     std::int32_t block_keys, std::int32_t box);

}  // namespace annulus::kernels::sm90
