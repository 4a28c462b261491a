#pragma once

#include "kernels/sm90/copy_async.cuh"
#include "kernels/sm90/decode_finish.cuh"

/// The consuming warpgroup: 64 rows of S = QKᵀ, softmax and O += PV, a block of keys at a time. On
/// an H200 it is busy for 2,600 of the 3,350 clocks in which 128 keys arrive: nothing here
/// overlaps.
namespace annulus::kernels::sm90 {

/// The tokens that one of a thread's rows sees. Rows that do not exist see what the tile sees.
__device__ inline TokenRange row_range(const DecodeParams& p, const DecodeUnit& unit,
                                       int local_row) {
  if (local_row >= unit.rows) return {unit.key_begin, unit.key_end};
  const int query = divide(unit.first_row + local_row, p.pack);
  return DecodeSequence(p, unit.sequence).visible(p, query, query);
}

/// Copies kColumns of the unit's rows of Q into shared memory.
template <typename Layout, typename Element, int kColumns>
__device__ inline void load_rows(const DecodeParams& p, const DecodeUnit& unit, Element* q,
                                 int thread, int threads) {
  constexpr int kChunks = kColumns / 8;
  for (int i = thread; i < unit.rows * kChunks; i += threads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const DecodeRow at(p, unit, row);
    const auto* from = static_cast<const Element*>(p.q) + at.offset(p.q_strides) + chunk * 8;
    copy_async(reinterpret_cast<char*>(q) + swizzled_offset<Layout>(row, chunk, kWarpgroupRows),
               from);
  }
  copy_async_commit();
}

/// Values of tokens that no row sees may be NaN, which 0·NaN would let in. `kColumns` of the
/// tile's columns are cleared by `threads` threads.
template <typename Layout, int kBlock, int kColumns>
__device__ inline void clear_unseen(void* values, int first, int last, int thread, int threads) {
  constexpr int kChunks = kColumns / 8;
  for (int i = thread; i < kBlock * kChunks; i += threads) {
    const int row = i / kChunks;
    if (row >= first && row < last) continue;
    *reinterpret_cast<uint4*>(static_cast<char*>(values) +
                              swizzled_offset<Layout>(row, i % kChunks, kBlock)) =
        make_uint4(0, 0, 0, 0);
  }
}

/// Soft cap, and the keys that a row does not see.
template <int kBlock>
__device__ inline void mask_block(const DecodeParams& p, int token, const TokenRange (&ranges)[2],
                                  float (&s)[kBlock / 2]) {
  if (p.capped) {
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) s[i] = tanh_exp(s[i] * p.score_scale);
  }
  const int begin = max(ranges[0].begin, ranges[1].begin);
  const int end = min(ranges[0].end, ranges[1].end);
  if (token >= begin && token + kBlock <= end) return;
  RowWindow windows[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    windows[row] = {ranges[row].begin - token,
                    static_cast<unsigned>(max(ranges[row].end - ranges[row].begin, 0))};
  }
  mask_scores(s, windows);
}

template <typename Tile>
class DecodeConsumer {
 public:
  using Element = typename Tile::Element;
  using Layout = typename Tile::Layout;

  __device__ DecodeConsumer(const DecodeParams& params, DecodeShared<Tile>& shared, int lane)
      : params_(params),
        shared_(shared),
        lane_(lane),
        thread_(static_cast<int>(threadIdx.x) % kThreads),
        headroom_(fminf(kHeadroom / params.exp_scale, 1e30F)) {}

  __device__ void run(WorkWalker walker) {
    DecodeUnit unit;
    while (walker.next(unit)) {
      shared_.run.find_pieces(unit);
      load_rows<Layout, Element, Tile::kHeadDim>(params_, unit, shared_.q, thread_, kThreads);
      const int local_row = thread_ / 32 * 16 + thread_ % 32 / 4;
      const TokenRange ranges[2] = {row_range(params_, unit, local_row),
                                    row_range(params_, unit, local_row + 8)};
      copy_async_wait<0>();
      fence_async_shared();
      named_barrier_sync(kBarrier, kThreads);
      float o[Tile::kValueDim / 2];
      RowStatistics rows;
      for (int block = unit.first_block; block < unit.last_block; ++block) {
        add_block(unit, unit.load_begin + block * Tile::kBlock, ranges, o, rows,
                  block != unit.first_block);
      }
      finish(unit, local_row, o, rows);
    }
  }

 private:
  static constexpr int kThreads = 128;
  static constexpr int kBarrier = 1;

  __device__ void add_block(const DecodeUnit& unit, int token, const TokenRange (&ranges)[2],
                            float (&o)[Tile::kValueDim / 2], RowStatistics& rows, bool accumulate) {
    float s[Tile::kBlock / 2];
    std::uint32_t p[Tile::kBlock / 4];
    mbarrier_wait(&shared_.k_full[ring_.index], ring_.parity);
    wgmma_fence();
    issue_scores(s);
    wgmma_wait<0>();
    pin_registers(s);
    release(&shared_.k_empty[ring_.index]);
    mask_block<Tile::kBlock>(params_, token, ranges, s);
    float factor[2];
    const bool renewed = softmax_step(s, rows, params_.exp_scale, headroom_, factor);
    if (renewed && accumulate) scale_rows(o, factor);
    pack_probabilities<Element>(s, p);

    mbarrier_wait(&shared_.v_full[ring_.index], ring_.parity);
    const int first = unit.key_begin - token;
    const int last = unit.key_end - token;
    if (first > 0 || last < Tile::kBlock) {
      clear_unseen<Layout, Tile::kBlock, Tile::kValueDim>(shared_.v[ring_.index], first, last,
                                                          thread_, kThreads);
      fence_async_shared();
      named_barrier_sync(kBarrier, kThreads);
    }
    wgmma_fence();
    issue_values(o, p, accumulate);
    wgmma_wait<0>();
    pin_registers(o);
    pin_registers(p);
    release(&shared_.v_empty[ring_.index]);
    ring_.advance();
  }

  __device__ void issue_scores(float (&s)[Tile::kBlock / 2]) {
    const std::uint64_t q = Layout::k_major(shared_.q);
    const std::uint64_t k = Layout::k_major(shared_.k[ring_.index]);
#pragma unroll
    for (int step = 0; step < Tile::kHeadDim / 16; ++step) {
      WgmmaShape<Element, Tile::kBlock>::shared(s, q + Layout::k_major_step(step, kWarpgroupRows),
                                                k + Layout::k_major_step(step, Tile::kBlock),
                                                step != 0);
    }
    wgmma_commit();
  }

  __device__ void issue_values(float (&o)[Tile::kValueDim / 2],
                               const std::uint32_t (&p)[Tile::kBlock / 4], bool accumulate) {
    const std::uint64_t v = Layout::n_major(shared_.v[ring_.index], Tile::kBlock);
#pragma unroll
    for (int step = 0; step < Tile::kBlock / 16; ++step) {
      WgmmaShape<Element, Tile::kValueDim>::registers(
          o, &p[4 * step], v + Layout::n_major_step(step), step != 0 || accumulate);
    }
    wgmma_commit();
  }

  __device__ void release(std::uint64_t* barrier) {
    __syncwarp();
    if (thread_ % 32 == 0) mbarrier_arrive(barrier);
  }

  __device__ void finish(const DecodeUnit& unit, int local_row, float (&o)[Tile::kValueDim / 2],
                         const RowStatistics& rows) {
    const bool whole = unit.pieces == 1;
    const std::int64_t slot =
        whole ? 0 : partial_slot(params_, unit, lane_, group_ - unit.first_group);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = local_row + 8 * row;
      const float max = rows.max[row] * params_.exp_scale;
      const float sum = quad_sum(rows.sum[row]);
      if (whole) {
        write_row<Element>(params_, unit, o, row, at, max, sum, 0);
      } else if (at < unit.rows) {
        write_partial<Tile::kValueDim>(params_, slot, o, row, at, max, sum, 0);
      }
    }
    if (whole) {
      named_barrier_sync(kBarrier, kThreads);  // Q is read; the next unit's may come
    } else if (arrive_last(params_, unit, lane_, &shared_.is_last, kBarrier, kThreads,
                           thread_ == 0)) {
      merge_pieces<Element, Tile::kValueDim>(params_, unit, lane_, thread_, kThreads);
    }
  }

  const DecodeParams& params_;
  DecodeShared<Tile>& shared_;
  const int lane_;
  const int group_ = static_cast<int>(blockIdx.x) / params_.lanes;
  const int thread_;
  const float headroom_;  // in raw scores
  Ring<Tile::kStages> ring_;
};

}  // namespace annulus::kernels::sm90
