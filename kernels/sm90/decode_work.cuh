#pragma once

#include "kernels/sm90/decode_params.hpp"

/// How the work of a decode launch is dealt to thread blocks, from lengths that only the device
/// knows. All blocks of keys of all tiles form one list; each group of thread blocks takes an equal
/// run of it, so that a tile's keys may be split over several groups.
namespace annulus::kernels::sm90 {

inline constexpr int kDecodeRows = 64;  // of a tile

/// Tokens of this rank, by local number.
struct TokenRange {
  std::int32_t begin, end;
};

/// CacheDeal::tokens().
__host__ __device__ inline std::int32_t local_tokens(const DecodeParams& p, std::int32_t length) {
  if (p.deal_ranks == 1) return length;
  const std::int32_t round = p.deal_block * p.deal_ranks;
  const std::int32_t rest = length % round - p.deal_rank * p.deal_block;
  return length / round * p.deal_block +
         (rest < 0 ? 0 : (rest < p.deal_block ? rest : p.deal_block));
}

/// One sequence of the batch.
struct DecodeSequence {
  std::int32_t query_begin, queries, length, start;

  __host__ __device__ DecodeSequence(const DecodeParams& p, int s)
      : query_begin(p.query_begin[s]),
        queries(p.query_begin[s + 1] - query_begin),
        length(p.lengths[s]),
        start(p.starts == nullptr ? 0 : p.starts[s]) {}

  __host__ __device__ int rows(const DecodeParams& p) const { return queries * p.pack; }
  __host__ __device__ int tiles(const DecodeParams& p) const {
    return (rows(p) + kDecodeRows - 1) / kDecodeRows;
  }
  /// What the queries [first, last] see between them.
  __host__ __device__ TokenRange visible(const DecodeParams& p, int first, int last) const {
    const std::int32_t offset = length - queries;
    std::int32_t begin = start;
    std::int32_t end = length;
    if (p.window_left >= 0 && offset + first - p.window_left > begin) {
      begin = offset + first - p.window_left;
    }
    if (p.causal && offset + last + 1 < end) end = offset + last + 1;
    if (p.window_right >= 0 && offset + last + 1 + p.window_right < end) {
      end = offset + last + 1 + p.window_right;
    }
    if (end <= begin) return {0, 0};
    const std::int32_t capacity = p.max_pages * p.page_size;
    const TokenRange range{local_tokens(p, begin), local_tokens(p, end)};
    return {range.begin, range.end < capacity ? range.end : capacity};
  }
};

/// The keys that a tile's loads go through. A tile without keys has one block of none, which writes
/// its rows' zeros.
struct TileKeys {
  std::int32_t begin, end, load_begin, blocks;

  __host__ __device__ TileKeys(const DecodeParams& p, const DecodeSequence& sequence, int tile,
                               int block) {
    const int last_row = min(sequence.rows(p), (tile + 1) * kDecodeRows) - 1;
    const TokenRange range = sequence.visible(p, tile * kDecodeRows / p.pack, last_row / p.pack);
    begin = range.begin;
    end = range.end > range.begin ? range.end : range.begin;
    load_begin = begin / p.alignment * p.alignment;
    blocks = end > begin ? (end - load_begin + block - 1) / block : 1;
  }
};

/// A group's run of the list, and where it starts.
struct WorkRun {
  std::int64_t begin, end;  // blocks of keys
  std::int64_t unit_begin;  // of the unit that holds `begin`
  std::int64_t total;
  std::int32_t groups, group;
  std::int32_t sequence, tile, pack_round;
};

/// First block of a group's run.
__host__ __device__ inline std::int64_t run_begin(std::int64_t total, std::int32_t groups,
                                                  std::int32_t group) {
  return group * total / groups;
}

/// Whose run holds a block.
__host__ __device__ inline std::int32_t group_of(std::int64_t total, std::int32_t groups,
                                                 std::int64_t block) {
  return static_cast<std::int32_t>(((block + 1) * groups - 1) / total);
}

__host__ __device__ inline std::int64_t sequence_blocks(const DecodeParams& p, int s, int block) {
  const DecodeSequence sequence(p, s);
  const int tiles = sequence.tiles(p);
  std::int64_t blocks = 0;
  for (int tile = 0; tile < tiles; ++tile) blocks += TileKeys(p, sequence, tile, block).blocks;
  return blocks * (p.packs / p.lanes);
}

/// Finds the unit that holds run.begin, searching from sequence s, whose first block is `before`.
__host__ __device__ inline void seek(const DecodeParams& p, int s, std::int64_t before, int block,
                                     WorkRun& run) {
  for (;; ++s) {
    const std::int64_t blocks = sequence_blocks(p, s, block);
    if (run.begin < before + blocks) break;
    before += blocks;
  }
  const DecodeSequence sequence(p, s);
  for (int tile = 0;; ++tile) {
    const int keys = TileKeys(p, sequence, tile, block).blocks;
    const std::int64_t blocks = std::int64_t{keys} * (p.packs / p.lanes);
    if (run.begin < before + blocks) {
      run.sequence = s;
      run.tile = tile;
      run.pack_round = static_cast<std::int32_t>((run.begin - before) / keys);
      run.unit_begin = before + std::int64_t{run.pack_round} * keys;
      return;
    }
    before += blocks;
  }
}

/// A tile of rows and the part of its keys that one thread block goes through.
struct DecodeUnit {
  std::int32_t sequence, pack, query_begin, first_row, rows;
  std::int32_t key_begin, key_end, load_begin;
  std::int32_t first_block, last_block;
  std::int32_t pieces, first_group;  // that the unit is split over
};

/// The units of a run, in order. Producer and consumers walk alike.
class WorkWalker {
 public:
  __host__ __device__ WorkWalker(const DecodeParams& params, const WorkRun& run, int lane,
                                 int block)
      : params_(params),
        run_(run),
        position_(run.begin),
        unit_begin_(run.unit_begin),
        sequence_(run.sequence),
        tile_(run.tile),
        pack_round_(run.pack_round),
        lane_(lane),
        block_(block) {}

  __host__ __device__ bool next(DecodeUnit& unit) {
    if (position_ >= run_.end) return false;
    DecodeSequence sequence(params_, sequence_);
    while (tile_ >= sequence.tiles(params_)) {
      tile_ = 0;
      sequence = DecodeSequence(params_, ++sequence_);
    }
    const TileKeys keys(params_, sequence, tile_, block_);
    const std::int64_t unit_end = unit_begin_ + keys.blocks;
    const std::int64_t end = unit_end < run_.end ? unit_end : run_.end;
    unit.sequence = sequence_;
    unit.pack = pack_round_ * params_.lanes + lane_;
    unit.query_begin = sequence.query_begin;
    unit.first_row = tile_ * kDecodeRows;
    unit.rows = min(kDecodeRows, sequence.rows(params_) - unit.first_row);
    unit.key_begin = keys.begin;
    unit.key_end = keys.end;
    unit.load_begin = keys.load_begin;
    unit.first_block = static_cast<std::int32_t>(position_ - unit_begin_);
    unit.last_block = static_cast<std::int32_t>(end - unit_begin_);
    unit.pieces = 1;
    unit.first_group = run_.group;
    if (unit.last_block - unit.first_block != keys.blocks) {
      unit.first_group = group_of(run_.total, run_.groups, unit_begin_);
      unit.pieces = group_of(run_.total, run_.groups, unit_end - 1) - unit.first_group + 1;
    }
    position_ = end;
    if (end == unit_end) {
      unit_begin_ = unit_end;
      if (++pack_round_ == params_.packs / params_.lanes) {
        pack_round_ = 0;
        ++tile_;
      }
    }
    return true;
  }

 private:
  const DecodeParams& params_;
  const WorkRun& run_;
  std::int64_t position_, unit_begin_;
  std::int32_t sequence_, tile_, pack_round_, lane_, block_;
};

#ifdef __CUDACC__
/// Adds up all sequences and finds this thread block's run; every thread takes part.
template <int kThreads>
__device__ void deal_work(const DecodeParams& p, int block,
                          std::int64_t (&warp_sums)[kThreads / 32], WorkRun& run) {
  const int thread = static_cast<int>(threadIdx.x);
  const int each = (p.sequences + kThreads - 1) / kThreads;
  const int first = min(thread * each, p.sequences);
  const int last = min(first + each, p.sequences);
  std::int64_t own = 0;
  for (int s = first; s < last; ++s) own += sequence_blocks(p, s, block);
  std::int64_t sum = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const std::int64_t other = __shfl_up_sync(0xffffffffU, sum, distance);
    if (thread % 32 >= distance) sum += other;
  }
  if (thread % 32 == 31) warp_sums[thread / 32] = sum;
  __syncthreads();
  std::int64_t before = sum - own;
  std::int64_t total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (warp < thread / 32) before += warp_sums[warp];
    total += warp_sums[warp];
  }
  const int most = static_cast<int>(gridDim.x) / p.lanes;
  const int groups = total < most ? static_cast<int>(total) : most;
  const int group = static_cast<int>(blockIdx.x) / p.lanes;
  const std::int64_t begin = group < groups ? run_begin(total, groups, group) : 0;
  if (group < groups ? before <= begin && begin < before + own : thread == 0) {
    run = WorkRun{};
    run.total = total;
    run.groups = groups;
    run.group = group;
    if (group < groups) {
      run.begin = begin;
      run.end = run_begin(total, groups, group + 1);
      seek(p, first, before, block, run);
    }
  }
  __syncthreads();
}
#endif

}  // namespace annulus::kernels::sm90
