#pragma once

#include "kernels/sm90/copy_async.cuh"
#include "kernels/sm90/decode_finish.cuh"
#include "kernels/sm90/decode_softmax.cuh"

/// The consuming warpgroups: 64 rows of S = QKᵀ, softmax and O += PV, a block of keys at a time,
/// one after the other. Where a block comes faster than that, two take turns, each with an O and
/// statistics of its own, and add theirs up at the end of a unit.
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
#pragma unroll 4
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
  mask_columns(s, windows);
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
        thread_(static_cast<int>(threadIdx.x) % kWarpgroupThreads),
        side_(warp_of_block() / 4 - 1),
        headroom_(fminf(kHeadroom / params.exp_scale, 1e30F)),
        ring_{params.stages} {}

  __device__ void run(WorkWalker walker) {
    DecodeUnit unit;
    while (walker.next(unit)) {
      if (side_ == kLastSide) {
        load_rows<Layout, Element, Tile::kHeadDim>(params_, unit, shared_.q, thread_,
                                                   kWarpgroupThreads);
      }
      const int local_row = thread_ / 32 * 16 + thread_ % 32 / 4;
      const TokenRange ranges[2] = {row_range(params_, unit, local_row),
                                    row_range(params_, unit, local_row + 8)};
      shared_.run.find_pieces(unit);
      copy_async_wait<0>();
      fence_async_shared();
      named_barrier_sync(kAllBarrier, kThreads);
      Output o;
#pragma unroll
      for (float& value : o) value = 0.0F;
      RowStatistics rows;
      for (int block = unit.first_block; block < unit.last_block; ++block) {
        if (ring_.index % Tile::kConsumers == side_) {
          add_block(unit, unit.load_begin + block * Tile::kBlock, ranges, o, rows);
        }
        ring_.advance();
      }
      if constexpr (Tile::kConsumers > 1) hand_over(unit, o, rows);
      if (side_ == 0) finish(unit, local_row, o, rows);
      // The next unit's Q may come, with two warpgroups beside the first one's end of this unit.
      if constexpr (Tile::kConsumers == 1) named_barrier_sync(kAllBarrier, kThreads);
    }
  }

 private:
  static constexpr int kThreads = kWarpgroupThreads * Tile::kConsumers;
  static constexpr int kSideBarrier = 1;  // and 2
  static constexpr int kAllBarrier = 3;
  static constexpr int kReadBarrier = 4;  // what was handed over has been read
  static constexpr int kLastSide = Tile::kConsumers - 1;

  using Output = float[Tile::kValueDim / 2];

  __device__ void add_block(const DecodeUnit& unit, int token, const TokenRange (&ranges)[2],
                            Output& o, RowStatistics& rows) {
    float s[Tile::kBlock / 2];
    std::uint32_t p[Tile::kBlock / 4];
    await(&shared_.k_full[ring_.index]);
    wgmma_fence();
    issue_scores(s);
    wgmma_wait<0>();
    pin_registers(s);
    release(&shared_.k_empty[ring_.index]);
    mask_block<Tile::kBlock>(params_, token, ranges, s);
    float factor[2];
    if (exact_softmax_step(s, rows, params_.exp_scale, headroom_, factor)) scale_rows(o, factor);
    pack_probabilities<Element>(s, p);

    await(&shared_.v_full[ring_.index]);
    const int first = unit.key_begin - token;
    const int last = unit.key_end - token;
    if (first > 0 || last < Tile::kBlock) {
      clear_unseen<Layout, Tile::kBlock, Tile::kValueDim>(shared_.v[ring_.index], first, last,
                                                          thread_, kWarpgroupThreads);
      fence_async_shared();
      named_barrier_sync(kSideBarrier + side_, kWarpgroupThreads);
    }
    wgmma_fence();
    issue_values(o, p);
    wgmma_wait<0>();
    pin_registers(o);
    pin_registers(p);
    release(&shared_.v_empty[ring_.index]);
  }

  /// What threads have copied is yet to be made visible to the tensor cores.
  __device__ void await(std::uint64_t* full) {
    mbarrier_wait(full, ring_.parity);
    if (params_.box_tokens == 0) fence_async_shared();
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

  __device__ void issue_values(Output& o, const std::uint32_t (&p)[Tile::kBlock / 4]) {
    const std::uint64_t v = Layout::n_major(shared_.v[ring_.index], Tile::kBlock);
#pragma unroll
    for (int step = 0; step < Tile::kBlock / 16; ++step) {
      WgmmaShape<Element, Tile::kValueDim>::registers(o, &p[4 * step],
                                                      v + Layout::n_major_step(step), true);
    }
    wgmma_commit();
  }

  __device__ void release(std::uint64_t* barrier) {
    __syncwarp();
    if (thread_ % 32 == 0) mbarrier_arrive(barrier);
  }

  /// The second warpgroup's O and statistics are added to the first one's, through the memory of Q
  /// and so by halves. Warps without rows have nothing to give.
  __device__ void hand_over(const DecodeUnit& unit, Output& o, RowStatistics& rows) {
    constexpr int kHalf = Tile::kValueDim / 4;
    const bool has_rows = thread_ / 32 * 16 < unit.rows;
    auto* const fours = reinterpret_cast<float4*>(shared_.q) + thread_;
    if (side_ == 1) shared_.statistics[thread_] = rows;
    float own[2], other[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      named_barrier_sync(kAllBarrier, kThreads);  // what lies there has been read
      if (side_ == 1 && has_rows) {
#pragma unroll
        for (int i = 0; i < kHalf; i += 4) {
          const float* from = &o[half * kHalf + i];
          fours[i / 4 * kWarpgroupThreads] = make_float4(from[0], from[1], from[2], from[3]);
        }
      }
      named_barrier_sync(kAllBarrier, kThreads);
      if (side_ == 1 || !has_rows) continue;
      if (half == 0) merge_statistics(shared_.statistics[thread_], rows, own, other);
#pragma unroll
      for (int i = 0; i < kHalf; i += 4) {
        const float4 given = fours[i / 4 * kWarpgroupThreads];
        float* to = &o[half * kHalf + i];
        to[0] = to[0] * own[0] + given.x * other[0];
        to[1] = to[1] * own[0] + given.y * other[0];
        to[2] = to[2] * own[1] + given.z * other[1];
        to[3] = to[3] * own[1] + given.w * other[1];
      }
    }
    if (side_ == 0) {
      named_barrier_arrive(kReadBarrier, kThreads);
    } else {
      named_barrier_sync(kReadBarrier, kThreads);
    }
  }

  /// What both sides' sums are to be multiplied by, beside the merged statistics.
  __device__ void merge_statistics(const RowStatistics& given, RowStatistics& rows, float (&own)[2],
                                   float (&other)[2]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float max = fmaxf(rows.max[row], given.max[row]);
      const float base = max == -INFINITY ? 0.0F : max;
      own[row] = exp2_approx((rows.max[row] - base) * params_.exp_scale);
      other[row] = exp2_approx((given.max[row] - base) * params_.exp_scale);
      rows.max[row] = max;
      rows.sum[row] = rows.sum[row] * own[row] + given.sum[row] * other[row];
    }
  }

  __device__ void finish(const DecodeUnit& unit, int local_row, Output& o,
                         const RowStatistics& rows) {
    const bool whole = unit.pieces == 1;
    const std::int64_t slot =
        whole ? 0 : partial_slot(params_, unit, lane_, group_ - unit.first_group);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (thread_ / 32 * 16 + 8 * row >= unit.rows) continue;  // none of this warp's
      const int at = local_row + 8 * row;
      const float max = rows.max[row] * params_.exp_scale;
      const float sum = quad_sum(rows.sum[row]);
      if (whole) {
        write_row<Element>(params_, unit, o, row, at, max, sum, 0);
      } else if (at < unit.rows) {
        write_partial<Tile::kValueDim>(params_, slot, o, row, at, max, sum, 0);
      }
    }
    if (whole) return;
    merge_pieces<Element, Tile::kValueDim>(params_, unit, lane_, group_ - unit.first_group,
                                           &shared_.is_last, kSideBarrier, thread_,
                                           kWarpgroupThreads);
  }

  const DecodeParams& params_;
  DecodeShared<Tile>& shared_;
  const int lane_;
  const int group_ = divide(static_cast<int>(blockIdx.x), params_.lanes);
  const int thread_;
  const int side_;
  const float headroom_;  // in raw scores
  StageRing ring_;
};

}  // namespace annulus::kernels::sm90
