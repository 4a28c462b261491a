#pragma once

#include "kernels/sm90/decode_params.hpp"

/// How the work of a decode launch is dealt to thread blocks, from lengths that only the device
/// knows. All blocks of keys of all tiles form one list; each group of thread blocks takes an equal
/// run of it, so that a tile's keys may be split over several groups.
namespace annulus::kernels::sm90 {

__device__ inline std::int32_t divide(std::int32_t n, const Divisor& by) {
  return static_cast<std::int32_t>(std::uint64_t{static_cast<std::uint32_t>(n)} * by.factor >>
                                   by.shift);
}

/// This thread block's place in its group.
__device__ inline std::int32_t lane_of_block(const DecodeParams& p) {
  const int block = static_cast<int>(blockIdx.x);
  return block - divide(block, p.lanes) * p.lanes.value;
}

/// Tokens of this rank, by local number.
struct TokenRange {
  std::int32_t begin, end;
};

/// CacheDeal::tokens().
__device__ inline std::int32_t local_tokens(const DecodeParams& p, std::int32_t length) {
  if (p.deal_ranks == 1) return length;
  const std::int32_t rounds = divide(length, p.deal_round);
  const std::int32_t rest = length - rounds * p.deal_round.value - p.deal_rank * p.deal_block;
  return rounds * p.deal_block + (rest < 0 ? 0 : (rest < p.deal_block ? rest : p.deal_block));
}

/// One sequence of the batch.
struct DecodeSequence {
  std::int32_t query_begin, queries, length, start;

  DecodeSequence() = default;
  __device__ DecodeSequence(const DecodeParams& p, int s)
      : query_begin(p.query_begin[s]),
        queries(p.query_begin[s + 1] - query_begin),
        length(p.lengths[s]),
        start(p.starts == nullptr ? 0 : p.starts[s]) {}

  __device__ int rows(const DecodeParams& p) const { return queries * p.pack.value; }
  __device__ int tiles(const DecodeParams& p) const {
    return (rows(p) + kTileRows - 1) / kTileRows;
  }
  /// What the queries [first, last] see between them.
  __device__ TokenRange visible(const DecodeParams& p, int first, int last) const {
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
    const std::int32_t capacity = p.max_pages * p.page_size.value;
    const TokenRange range{local_tokens(p, begin), local_tokens(p, end)};
    return {range.begin, range.end < capacity ? range.end : capacity};
  }
};

/// The keys that a tile's loads go through. A tile without keys has one block of none, which writes
/// its rows' zeros.
struct TileKeys {
  std::int32_t begin, end, load_begin, blocks;

  __device__ TileKeys(const DecodeParams& p, const DecodeSequence& sequence, int tile, int block) {
    const int last_row = min(sequence.rows(p), (tile + 1) * kTileRows) - 1;
    const TokenRange range =
        sequence.visible(p, divide(tile * kTileRows, p.pack), divide(last_row, p.pack));
    begin = range.begin;
    end = range.end > range.begin ? range.end : range.begin;
    load_begin = begin & -p.alignment;
    blocks = end > begin ? (end - load_begin + block - 1) / block : 1;
  }
};

/// Block numbers below it times a group's number are 32-bit, whose division is much shorter.
inline constexpr std::int64_t kShortList = 1 << 20;

/// First block of a group's run, where runs are equal.
__device__ inline std::int64_t run_begin(std::int64_t total, std::int32_t groups,
                                         std::int32_t group) {
  if (total < kShortList) return static_cast<std::uint32_t>(group * total) / groups;
  return group * total / groups;
}

/// Whose run holds a block.
__device__ inline std::int32_t group_of(std::int64_t total, std::int32_t groups,
                                        std::int64_t block) {
  const std::int64_t at = (block + 1) * groups - 1;
  if (total < kShortList) {
    return static_cast<std::uint32_t>(at) / static_cast<std::uint32_t>(total);
  }
  return static_cast<std::int32_t>(at / total);
}

/// A tile of rows and the part of its keys that one thread block goes through.
struct DecodeUnit {
  std::int32_t sequence, part, kv_head, query_begin, first_row, rows;
  std::int32_t key_begin, key_end, load_begin;
  std::int32_t first_block, last_block, blocks;
  std::int64_t begin;                // of all its blocks in the list
  std::int32_t pieces, first_group;  // that the unit is split over
};

/// A group's run of the list, and where it starts: up to `end`, and no more than `units`.
struct WorkRun {
  std::int64_t begin, end;  // blocks of keys
  std::int64_t unit_begin;  // of the unit that holds `begin`
  std::int64_t total;
  std::int32_t units, groups, group;
  std::int32_t sequence, tile, part_round;

  __device__ void find_pieces(DecodeUnit& unit) const {
    unit.pieces = 1;
    unit.first_group = group;
    if (unit.last_block - unit.first_block == unit.blocks) return;
    unit.first_group = group_of(total, groups, unit.begin);
    unit.pieces = group_of(total, groups, unit.begin + unit.blocks - 1) - unit.first_group + 1;
  }
};

/// What some sequences put on the list. A unit is a tile of one part.
struct WorkSum {
  std::int64_t blocks = 0;
  std::int32_t units = 0, largest = 0;  // blocks of the largest unit

  __device__ void add(const WorkSum& other) {
    blocks += other.blocks;
    units += other.units;
    largest = other.largest > largest ? other.largest : largest;
  }
};

__device__ inline WorkSum sequence_work(const DecodeParams& p, int s, int block) {
  const DecodeSequence sequence(p, s);
  const int tiles = sequence.tiles(p);
  WorkSum sum;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int blocks = TileKeys(p, sequence, tile, block).blocks;
    sum.add({std::int64_t{blocks} * p.rounds, p.rounds, blocks});
  }
  return sum;
}

/// How the list is cut. Splitting a unit costs partial results that are written and merged, so that
/// whole units are dealt where that lengthens the longest run by no more than a sixteenth.
struct WorkCut {
  std::int32_t groups;
  std::int32_t units_each;  // 0: runs of equal length, units split

  __device__ WorkCut(const DecodeParams& p, const WorkSum& total) : groups(0), units_each(0) {
    if (total.units == 0) return;
    const std::int32_t most_groups = p.groups.value;
    const std::int32_t each = divide(total.units + most_groups - 1, p.groups);
    if (std::int64_t{each} * total.largest * most_groups * 16 <= total.blocks * 17) {
      units_each = each;
      groups = each == 1 ? total.units : (total.units + each - 1) / each;
    } else {
      groups = static_cast<std::int32_t>(total.blocks < most_groups ? total.blocks : most_groups);
      // Units of one length are cut alike, if that leaves few groups out: none then has two pieces.
      if (std::int64_t{total.largest} * total.units != total.blocks) return;
      const std::int32_t alike = most_groups / total.units * total.units;
      if (alike < groups && alike * 17 >= groups * 16) groups = alike;
    }
  }
};

/// A place in the list: the unit that holds it.
struct WorkPlace {
  std::int32_t sequence, tile, part_round;
  std::int64_t unit_begin;
};

/// Searches from sequence s to `last`, before which the list holds `before`, for block number
/// `target`, or for unit number `target`.
__device__ inline WorkPlace find_place(const DecodeParams& p, int s, int last, WorkSum before,
                                       std::int64_t target, bool by_unit, int block) {
#pragma unroll 1
  for (; s < last; ++s) {
    const WorkSum sum = sequence_work(p, s, block);
    if (target < (by_unit ? before.units + sum.units : before.blocks + sum.blocks)) break;
    before.add(sum);
  }
  const DecodeSequence sequence_rows(p, s);
#pragma unroll 1
  for (int tile = 0;; ++tile) {
    const std::int32_t keys = TileKeys(p, sequence_rows, tile, block).blocks;
    const WorkSum sum{std::int64_t{keys} * p.rounds, p.rounds, keys};
    const std::int64_t rest = target - (by_unit ? before.units : before.blocks);
    if (rest < (by_unit ? sum.units : sum.blocks)) {
      const auto round =
          static_cast<std::int32_t>(by_unit ? rest : (p.rounds > 1 ? rest / keys : 0));
      return {s, tile, round, before.blocks + std::int64_t{round} * keys};
    }
    before.add(sum);
  }
}

/// The units of a run, in order, but for their pieces. Producer and consumers walk alike.
class WorkWalker {
 public:
  __device__ WorkWalker(const DecodeParams& params, const WorkRun& run, int lane, int block)
      : params_(params),
        run_(run),
        position_(run.begin),
        unit_begin_(run.unit_begin),
        units_left_(run.units),
        sequence_(run.sequence),
        tile_(run.tile),
        part_round_(run.part_round),
        lane_(lane),
        block_(block) {}

  __device__ bool next(DecodeUnit& unit) {
    if (position_ >= run_.end || units_left_-- == 0) return false;
    DecodeSequence sequence;
#pragma unroll 1
    for (;; ++sequence_, tile_ = 0) {
      sequence = DecodeSequence(params_, sequence_);
      if (tile_ < sequence.tiles(params_)) break;
    }
    const TileKeys keys(params_, sequence, tile_, block_);
    const std::int64_t unit_end = unit_begin_ + keys.blocks;
    const std::int64_t end = unit_end < run_.end ? unit_end : run_.end;
    unit.sequence = sequence_;
    unit.part = part_round_ * params_.lanes.value + lane_;
    unit.kv_head = divide(unit.part, params_.parts_per_kv_head);
    unit.query_begin = sequence.query_begin;
    unit.first_row = tile_ * kTileRows;
    unit.rows = min(kTileRows, sequence.rows(params_) - unit.first_row);
    unit.key_begin = keys.begin;
    unit.key_end = keys.end;
    unit.load_begin = keys.load_begin;
    unit.first_block = static_cast<std::int32_t>(position_ - unit_begin_);
    unit.last_block = static_cast<std::int32_t>(end - unit_begin_);
    unit.blocks = keys.blocks;
    unit.begin = unit_begin_;
    position_ = end;
    if (end == unit_end) {
      unit_begin_ = unit_end;
      if (++part_round_ == params_.rounds) {
        part_round_ = 0;
        ++tile_;
      }
    }
    return true;
  }

 private:
  const DecodeParams& params_;
  const WorkRun& run_;
  std::int64_t position_, unit_begin_;
  std::int32_t units_left_, sequence_, tile_, part_round_, lane_, block_;
};

/// The part of the list before this thread's sequences, and all of it, where only the first warps
/// have any.
template <int kThreads>
__device__ void scan_work(const WorkSum& own, WorkSum (&warp_sums)[kThreads / 32], int busy_warps,
                          WorkSum& before, WorkSum& total) {
  const int thread = static_cast<int>(threadIdx.x);
  WorkSum sum{own.blocks, own.units, __reduce_max_sync(0xffffffffU, own.largest)};
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const std::int64_t blocks = __shfl_up_sync(0xffffffffU, sum.blocks, distance);
    const std::int32_t units = __shfl_up_sync(0xffffffffU, sum.units, distance);
    if (thread % 32 >= distance) sum.add({blocks, units, 0});
  }
  if (thread % 32 == 31) warp_sums[thread / 32] = sum;
  __syncthreads();
  before.blocks = sum.blocks - own.blocks;
  before.units = sum.units - own.units;
#pragma unroll 1
  for (int warp = 0; warp < busy_warps; ++warp) {
    if (warp < thread / 32) before.add(warp_sums[warp]);
    total.add(warp_sums[warp]);
  }
}

/// Adds up all sequences and finds this thread block's run; every thread takes part.
template <int kThreads>
__device__ void deal_work(const DecodeParams& p, int block, WorkSum (&warp_sums)[kThreads / 32],
                          WorkRun& run) {
  const int thread = static_cast<int>(threadIdx.x);
  const int each = (p.sequences + kThreads - 1) / kThreads;
  const int first = min(thread * each, p.sequences);
  const int last = min(first + each, p.sequences);
  WorkSum own, before, total;
#pragma unroll 1
  for (int s = first; s < last; ++s) own.add(sequence_work(p, s, block));
  const int busy_warps = each == 1 ? (p.sequences + 31) / 32 : kThreads / 32;
  scan_work<kThreads>(own, warp_sums, busy_warps, before, total);

  const WorkCut cut(p, total);
  const int group = divide(static_cast<int>(blockIdx.x), p.lanes);
  const bool by_unit = cut.units_each > 0;
  const bool idle = group >= cut.groups;
  if (thread == kThreads - 1) {
    run.total = total.blocks;
    run.groups = cut.groups;
    run.group = group;
    run.units = idle ? 0 : (by_unit ? cut.units_each : total.units);
    run.end = by_unit ? total.blocks : run_begin(total.blocks, max(cut.groups, 1), group + 1);
  }
  const auto holds = [&](std::int64_t target) {
    return by_unit ? before.units <= target && target < before.units + own.units
                   : before.blocks <= target && target < before.blocks + own.blocks;
  };
  const std::int64_t target = by_unit ? std::int64_t{group} * cut.units_each
                                      : run_begin(total.blocks, max(cut.groups, 1), group);
  if (!idle && holds(target)) {
    const bool one_unit = last - first == 1 && own.units == 1;
    const WorkPlace place = one_unit
                                ? WorkPlace{first, 0, 0, before.blocks}
                                : find_place(p, first, last - 1, before, target, by_unit, block);
    run.begin = by_unit ? place.unit_begin : target;
    run.unit_begin = place.unit_begin;
    run.sequence = place.sequence;
    run.tile = place.tile;
    run.part_round = place.part_round;
  }
  __syncthreads();
}

}  // namespace annulus::kernels::sm90
