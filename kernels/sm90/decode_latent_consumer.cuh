#pragma once

#include <new>

#include "kernels/sm90/decode_consumer.cuh"
#include "kernels/sm90/decode_latent_tile.cuh"

/// The two consuming warpgroups of latent decode: left and right columns of O, first and second
/// block of each pair. What one writes for the other (probabilities and maxima) is not overwritten
/// before the other has read it: the writer's next scores wait for keys that come where the reader
/// has multiplied the old ones.
namespace annulus::kernels::sm90 {

template <typename Tile>
class LatentConsumer {
 public:
  using Element = typename Tile::Element;
  using Layout = typename Tile::Layout;

  __device__ LatentConsumer(const DecodeParams& params, LatentShared<Tile>& shared, int lane)
      : params_(params),
        shared_(shared),
        lane_(lane),
        thread_(static_cast<int>(threadIdx.x) % kThreads),
        side_(static_cast<int>(threadIdx.x) / kThreads - 1),
        headroom_(fminf(kHeadroom / params.exp_scale, 1e30F)) {}

  /// One thread walks, in shared memory: registers are scarce.
  __device__ void run(const WorkWalker& walker) {
    if (thread_of_both() == 0) new (&shared_.walker.at) WorkWalker(walker);
    while (start_unit()) {
      const DecodeUnit& unit = shared_.unit;
      float o[Tile::kHalf / 2];
      RowStatistics rows;
      TokenRange ranges[2] = {row_range(params_, unit, local_row()),
                              row_range(params_, unit, local_row() + 8)};
      for (TokenRange& range : ranges) range.end = min(range.end, unit.key_end);
      if (side_ == 0) {
        attend_left(unit, ranges, o, rows);
      } else {
        attend_right(unit, ranges, o, rows);
      }
      finish(unit, o, rows);
    }
  }

 private:
  static constexpr int kThreads = 128;
  static constexpr int kBothBarrier = 1;
  static constexpr int kReadyBarrier = 4;  // and 5: a pair's first, second P; 3 is the gatherer's
  static constexpr int kSideBarrier = 6;   // and 7

  using Scores = float[Tile::kBlock / 2];
  using Probabilities = std::uint32_t[Tile::kBlock / 4];
  using Output = float[Tile::kHalf / 2];

  __device__ int local_row() const { return thread_ / 32 * 16 + thread_ % 32 / 4; }
  __device__ int thread_of_both() const { return side_ * kThreads + thread_; }

  /// Everybody has finished with the unit before when its note and Q are overwritten.
  __device__ bool start_unit() {
    named_barrier_sync(kBothBarrier, 2 * kThreads);
    if (thread_of_both() == 0) {
      shared_.more = shared_.walker.at.next(shared_.unit) ? 1 : 0;
      if (shared_.more != 0) {
        shared_.run.find_pieces(shared_.unit);
        end_with_last_block<Tile>(shared_.unit);
      }
    }
    named_barrier_sync(kBothBarrier, 2 * kThreads);
    if (shared_.more == 0) return false;
    load_rows<Layout, Element, Tile::kValueDim>(params_, shared_.unit, shared_.q, thread_of_both(),
                                                2 * kThreads);
    load_rotary_queries(shared_.unit);
    copy_async_wait<0>();
    fence_async_shared();
    named_barrier_sync(kBothBarrier, 2 * kThreads);
    return true;
  }

  __device__ const Element* query(const DecodeUnit& unit, int row) const {
    const DecodeRow at(params_, unit, row);
    return static_cast<const Element*>(params_.q) + at.offset(params_.q_strides);
  }

  /// Straight into fragments of wgmma's A operand.
  __device__ void load_rotary_queries(const DecodeUnit& unit) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = local_row() + 8 * row;
      const bool valid = at < unit.rows;
      const Element* from = query(unit, valid ? at : 0) + Tile::kValueDim + thread_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const auto pair = *reinterpret_cast<const std::uint32_t*>(from + i * 8);
        rotary_[i / 2 * 4 + i % 2 * 2 + row] = valid ? pair : 0;
      }
    }
  }

  __device__ void attend_left(const DecodeUnit& unit, const TokenRange (&ranges)[2], Output& o,
                              RowStatistics& rows) {
    Scores s;
    Probabilities p;
    int token = unit.load_begin + unit.first_block * Tile::kBlock;
    for (int block = unit.first_block; block < unit.last_block; block += 2) {
      const bool accumulate = block != unit.first_block;
      score<0>(s);
      const bool renewed = turn_into_probabilities<0>(token, ranges, s, p, rows);
      if (renewed && accumulate) scale_rows(o, factor_);
      clear<0>(unit, token);
      wgmma_fence();
      add_own_values<0>(o, p, accumulate);
      wgmma_wait<0>();
      pin_registers(o);
      pin_registers(p);
      release(0);

      named_barrier_sync(kReadyBarrier + 1, 2 * kThreads);
      if (adopt_maxima(1, rows)) scale_rows(o, factor_);
      clear<1>(unit, token + Tile::kBlock);
      wgmma_fence();
      add_given_values<1>(o, true);
      wgmma_wait<0>();
      pin_registers(o);
      release(1);
      parity_ ^= 1;
      token += 2 * Tile::kBlock;
    }
  }

  __device__ void attend_right(const DecodeUnit& unit, const TokenRange (&ranges)[2], Output& o,
                               RowStatistics& rows) {
    Scores s;
    Probabilities p;
    int token = unit.load_begin + unit.first_block * Tile::kBlock;
    for (int block = unit.first_block; block < unit.last_block; block += 2) {
      const bool accumulate = block != unit.first_block;
      score<1>(s);
      named_barrier_sync(kReadyBarrier, 2 * kThreads);
      if (adopt_maxima(0, rows) && accumulate) scale_rows(o, factor_);
      clear<0>(unit, token);
      wgmma_fence();
      add_given_values<0>(o, accumulate);
      // The tensor cores multiply meanwhile.
      const bool renewed = turn_into_probabilities<1>(token + Tile::kBlock, ranges, s, p, rows);
      wgmma_wait<0>();
      pin_registers(o);
      release(0);

      if (renewed) scale_rows(o, factor_);
      clear<1>(unit, token + Tile::kBlock);
      wgmma_fence();
      add_own_values<1>(o, p, true);
      wgmma_wait<0>();
      pin_registers(o);
      pin_registers(p);
      release(1);
      parity_ ^= 1;
      token += 2 * Tile::kBlock;
    }
  }

  /// s ← QKᵀ of a pair's block, box by box as they come: those first whose memory the warpgroup
  /// that scores this block gave back itself.
  template <int kOf>
  __device__ void score(Scores& s) {
    std::uint64_t q = Layout::k_major(shared_.q);
    const std::uint64_t k = Layout::k_major(shared_.k[kOf]);
    // Else the descriptor of every step is kept over the blocks, for which there are no registers.
    asm volatile("" : "+l"(q));
#pragma unroll
    for (int i = 0; i < Tile::kBoxes; ++i) {
      const int box = (i + kOf * Tile::kLeftBoxes) % Tile::kBoxes;
      mbarrier_wait(&shared_.full[kOf][box], parity_);
      wgmma_fence();
#pragma unroll
      for (int step = 4 * box; step < 4 * box + 4; ++step) {
        const std::uint64_t keys = k + Layout::k_major_step(step, Tile::kBlock);
        if (box == Tile::kBoxes - 1) {
          WgmmaShape<Element, Tile::kBlock>::registers_k_major(s, &rotary_[step % 4 * 4], keys,
                                                               i != 0 || step % 4 != 0);
        } else {
          WgmmaShape<Element, Tile::kBlock>::shared(
              s, q + Layout::k_major_step(step, kWarpgroupRows), keys, i != 0 || step % 4 != 0);
        }
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin_registers(s);
    pin_registers(rotary_);
  }

  /// Softmax of a pair's block, whose P and maxima the other warpgroup is told. Returns whether
  /// what was added up before is to be multiplied by factor_.
  template <int kOf>
  __device__ bool turn_into_probabilities(int token, const TokenRange (&ranges)[2], Scores& s,
                                          Probabilities& p, RowStatistics& rows) {
    mask_block<Tile::kBlock>(params_, token, ranges, s);
    const bool renewed = exact_softmax_step(s, rows, params_.exp_scale, headroom_, factor_);
    pack_probabilities<Element>(s, p);
    if (thread_ % 4 == 0) {
      shared_.max[kOf][local_row()] = rows.max[0];
      shared_.max[kOf][local_row() + 8] = rows.max[1];
    }
    char* const to = reinterpret_cast<char*>(shared_.p[kOf]) + thread_ % 4 * 4;
#pragma unroll
    for (int i = 0; i < Tile::kBlock / 4; ++i) {
      *reinterpret_cast<std::uint32_t*>(
          to + swizzled_offset<Layout>(local_row() + i % 2 * 8, i / 2, kWarpgroupRows)) = p[i];
    }
    fence_async_shared();
    named_barrier_arrive(kReadyBarrier + kOf, 2 * kThreads);
    return renewed;
  }

  /// Takes over the maxima of the other's block. Returns whether factor_ is to be applied.
  __device__ bool adopt_maxima(int block, RowStatistics& rows) {
    const float now[2] = {shared_.max[block][local_row()], shared_.max[block][local_row() + 8]};
    const bool grown = now[0] != rows.max[0] || now[1] != rows.max[1];
    if (!__any_sync(0xffffffffU, grown)) return false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float base = now[row] == -INFINITY ? 0.0F : now[row];
      factor_[row] = exp2_approx((rows.max[row] - base) * params_.exp_scale);
      rows.max[row] = now[row];
      rows.sum[row] *= factor_[row];
    }
    return true;
  }

  __device__ std::uint64_t values(int block) const {
    return Layout::n_major(shared_.k[block] + side_ * Tile::kLeftBoxes * Tile::kBoxElements,
                           Tile::kBlock);
  }

  template <int kOf>
  __device__ void add_own_values(Output& o, const Probabilities& p, bool accumulate) {
    const std::uint64_t v = values(kOf);
#pragma unroll
    for (int step = 0; step < Tile::kBlock / 16; ++step) {
      WgmmaShape<Element, Tile::kHalf>::registers(o, &p[4 * step], v + Layout::n_major_step(step),
                                                  step != 0 || accumulate);
    }
    wgmma_commit();
  }

  template <int kOf>
  __device__ void add_given_values(Output& o, bool accumulate) {
    const std::uint64_t v = values(kOf);
    const std::uint64_t p = Layout::k_major(shared_.p[kOf]);
#pragma unroll
    for (int step = 0; step < Tile::kBlock / 16; ++step) {
      WgmmaShape<Element, Tile::kHalf>::stored(o, p + Layout::k_major_step(step, kWarpgroupRows),
                                               v + Layout::n_major_step(step),
                                               step != 0 || accumulate);
    }
    wgmma_commit();
  }

  /// In this warpgroup's columns of V, once nobody is left to score with them.
  template <int kOf>
  __device__ void clear(const DecodeUnit& unit, int token) {
    const int first = unit.key_begin - token;
    const int last = unit.key_end - token;
    if (first <= 0 && last >= Tile::kBlock) return;
    clear_unseen<Layout, Tile::kBlock, Tile::kHalf>(
        shared_.k[kOf] + side_ * Tile::kLeftBoxes * Tile::kBoxElements, first, last, thread_,
        kThreads);
    fence_async_shared();
    named_barrier_sync(kSideBarrier + side_, kThreads);
  }

  /// Of a block's columns, those that this warpgroup was the last to need.
  __device__ void release(int block) {
    __syncwarp();
    if (thread_ % 32 == 0) mbarrier_arrive(&shared_.empty[block][side_]);
  }

  __device__ void finish(const DecodeUnit& unit, Output& o, const RowStatistics& rows) {
    const bool whole = unit.pieces == 1;
    const std::int64_t slot =
        whole ? 0 : partial_slot(params_, unit, lane_, group_ - unit.first_group);
    const float own[2] = {quad_sum(rows.sum[0]), quad_sum(rows.sum[1])};
    if (thread_ % 4 == 0) {
      shared_.sum[side_][local_row()] = own[0];
      shared_.sum[side_][local_row() + 8] = own[1];
    }
    named_barrier_sync(kBothBarrier, 2 * kThreads);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = local_row() + 8 * row;
      const float max = rows.max[row] * params_.exp_scale;
      const float sum = shared_.sum[0][at] + shared_.sum[1][at];
      if (whole) {
        write_row<Element>(params_, unit, o, row, at, max, sum, side_ * Tile::kHalf);
      } else if (at < unit.rows) {
        write_partial<Tile::kValueDim>(params_, slot, o, row, at, max, sum, side_ * Tile::kHalf);
      }
    }
    if (whole) return;
    // Beside the merge in sets the assembler lays the loops out worse: 1.3% of whole batches.
    merge_pieces<Element, Tile::kValueDim, false>(params_, unit, lane_, group_ - unit.first_group,
                                                  &shared_.is_last, kBothBarrier, thread_of_both(),
                                                  2 * kThreads);
  }

  const DecodeParams& params_;
  LatentShared<Tile>& shared_;
  const int lane_;
  const int group_ = divide(static_cast<int>(blockIdx.x), params_.lanes);
  const int thread_, side_;
  const float headroom_;  // in raw scores
  float factor_[2];
  std::uint32_t rotary_[16];  // the queries' rotary columns
  std::uint32_t parity_ = 0;  // of the pair's keys
};

}  // namespace annulus::kernels::sm90
