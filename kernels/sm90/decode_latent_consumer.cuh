#pragma once

#include "kernels/sm90/cluster.cuh"
#include "kernels/sm90/decode_consumer.cuh"
#include "kernels/sm90/decode_latent_tile.cuh"

/// A consuming warpgroup of latent decode: 64 rows, half the columns. The two of a block take turns
/// at the tensor cores by themselves: one waits for its neighbour's scores while the other
/// multiplies.
namespace annulus::kernels::sm90 {

template <typename Tile>
class LatentConsumer {
 public:
  using Element = typename Tile::Element;
  using Layout = typename Tile::Layout;
  using RotaryLayout = typename Tile::RotaryLayout;

  __device__ LatentConsumer(const DecodeParams& params, LatentShared<Tile>& shared, int lane)
      : params_(params),
        shared_(shared),
        lane_(lane),
        thread_(static_cast<int>(threadIdx.x) % kThreads),
        warpgroup_(static_cast<int>(threadIdx.x) / kThreads - 1),
        headroom_(fminf(kHeadroom / params.exp_scale, 1e30F)) {}

  __device__ void run(WorkWalker walker) {
    if (thread_ == 0) expect_scores();
    while (start_unit(walker)) {
      const DecodeUnit& unit = shared_.units[warpgroup_];  // registers are scarce
      if (first_row() < unit.rows) {
        attend(unit);
      } else {
        pass(unit);
      }
    }
  }

 private:
  static constexpr int kThreads = 128;
  static constexpr int kBothBarrier = 4;  // 3 is the gathering producer's
  static constexpr std::uint32_t kScoreBytes = 128 * Tile::kBlock / 2 * sizeof(float);

  __device__ int barrier() const { return 1 + warpgroup_; }
  __device__ int first_row() const { return warpgroup_ * kWarpgroupRows; }
  __device__ int local_row() const { return first_row() + thread_ / 32 * 16 + thread_ % 32 / 4; }

  /// Everybody has finished with the unit before when its note is overwritten.
  __device__ bool start_unit(WorkWalker& walker) {
    DecodeUnit unit;
    if (!walker.next(unit)) return false;
    named_barrier_sync(barrier(), kThreads);
    if (thread_ == 0) shared_.units[warpgroup_] = unit;
    load_queries(unit);
    fence_async_shared();
    named_barrier_sync(barrier(), kThreads);
    return true;
  }

  __device__ void load_queries(const DecodeUnit& unit) {
    constexpr int kLatentChunks = Tile::kColumns / 8;
    constexpr int kChunks = kLatentChunks + Tile::kRotary / 8;
    auto& q = shared_.q[warpgroup_];
    const int rows = min(unit.rows - first_row(), kWarpgroupRows);
    for (int i = thread_; i < rows * kChunks; i += kThreads) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      const DecodeRow at(params_, unit, first_row() + row);
      const auto* from = static_cast<const Element*>(params_.q) + at.offset(params_.q_strides);
      const bool rotary = chunk >= kLatentChunks;
      const int place = rotary ? chunk - kLatentChunks : chunk;
      from += (rotary ? Tile::kAllColumns + half() * Tile::kRotary : half() * Tile::kColumns) +
              place * 8;
      char* const to = rotary ? reinterpret_cast<char*>(q.rotary) +
                                    swizzled_offset<RotaryLayout>(row, place, kWarpgroupRows)
                              : reinterpret_cast<char*>(q.latent) +
                                    swizzled_offset<Layout>(row, place, kWarpgroupRows);
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    }
  }

  /// A warpgroup without rows gives the keys back unread.
  __device__ void pass(const DecodeUnit& unit) {
    for (int block = unit.first_block; block < unit.last_block; ++block) {
      mbarrier_wait(&shared_.full[ring_.index], ring_.parity);
      release_keys();
    }
  }

  __device__ void attend(const DecodeUnit& unit) {
    const TokenRange ranges[2] = {row_range(params_, unit, local_row()),
                                  row_range(params_, unit, local_row() + 8)};
    float o[Tile::kColumns / 2];
    RowStatistics rows;
    for (int block = unit.first_block; block < unit.last_block; ++block) {
      const bool accumulate = block != unit.first_block;
      const int token = unit.load_begin + block * Tile::kBlock;
      float s[Tile::kBlock / 2];
      std::uint32_t p[Tile::kBlock / 4];
      mbarrier_wait(&shared_.full[ring_.index], ring_.parity);
      wgmma_fence();
      issue_scores(s);
      wgmma_wait<0>();
      pin_registers(s);
      exchange(s);
      mask_block<Tile::kBlock>(params_, token, ranges, s);
      float factor[2];
      const bool renewed = softmax_step(s, rows, params_.exp_scale, headroom_, factor);
      if (renewed && accumulate) scale_rows(o, factor);
      pack_probabilities<Element>(s, p);
      clear(unit, token);
      wgmma_fence();
      issue_values(o, p, accumulate);
      wgmma_wait<0>();
      pin_registers(o);
      pin_registers(p);
      release_keys();
    }
    finish(unit, o, rows);
  }

  __device__ void issue_scores(float (&s)[Tile::kBlock / 2]) {
    const auto& q_rows = shared_.q[warpgroup_];
    const auto& k_rows = shared_.k[ring_.index];
    const std::uint64_t q = Layout::k_major(q_rows.latent);
    const std::uint64_t k = Layout::k_major(k_rows.latent);
    const std::uint64_t q_rotary = RotaryLayout::k_major(q_rows.rotary);
    const std::uint64_t k_rotary = RotaryLayout::k_major(k_rows.rotary);
#pragma unroll
    for (int step = 0; step < Tile::kColumns / 16; ++step) {
      WgmmaShape<Element, Tile::kBlock>::shared(s, q + Layout::k_major_step(step, kWarpgroupRows),
                                                k + Layout::k_major_step(step, Tile::kBlock),
                                                step != 0);
    }
#pragma unroll
    for (int step = 0; step < Tile::kRotary / 16; ++step) {
      WgmmaShape<Element, Tile::kBlock>::shared(
          s, q_rotary + RotaryLayout::k_major_step(step, kWarpgroupRows),
          k_rotary + RotaryLayout::k_major_step(step, Tile::kBlock), 1);
    }
    wgmma_commit();
  }

  __device__ void issue_values(float (&o)[Tile::kColumns / 2],
                               const std::uint32_t (&p)[Tile::kBlock / 4], bool accumulate) {
    const std::uint64_t v = Layout::n_major(shared_.k[ring_.index].latent, Tile::kBlock);
#pragma unroll
    for (int step = 0; step < Tile::kBlock / 16; ++step) {
      WgmmaShape<Element, Tile::kColumns>::registers(
          o, &p[4 * step], v + Layout::n_major_step(step), step != 0 || accumulate);
    }
    wgmma_commit();
  }

  /// One arrival and the bytes of the neighbour's next scores.
  __device__ void expect_scores() {
    mbarrier_arrive_expect(&shared_.scores_full[warpgroup_], kScoreBytes);
  }

  /// s ← s + the neighbour's. Both add the same two numbers.
  __device__ void exchange(float (&s)[Tile::kBlock / 2]) {
    const int neighbour = half() ^ 1;
    mbarrier_wait(&shared_.scores_empty[warpgroup_], scores_parity_ ^ 1);
    const std::uint32_t there = cluster_address(&shared_.scores[warpgroup_][0][thread_], neighbour);
    const std::uint32_t full = cluster_address(&shared_.scores_full[warpgroup_], neighbour);
#pragma unroll
    for (int i = 0; i < Tile::kBlock / 8; ++i) {
      store_cluster(there + i * static_cast<std::uint32_t>(kThreads * sizeof(float4)),
                    make_float4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]), full);
    }
    mbarrier_wait(&shared_.scores_full[warpgroup_], scores_parity_);
    if (thread_ == 0) expect_scores();
#pragma unroll
    for (int i = 0; i < Tile::kBlock / 8; ++i) {
      const float4 other = shared_.scores[warpgroup_][i][thread_];
      s[4 * i] += other.x;
      s[4 * i + 1] += other.y;
      s[4 * i + 2] += other.z;
      s[4 * i + 3] += other.w;
    }
    __syncwarp();
    if (thread_ % 32 == 0) {
      mbarrier_arrive_cluster(cluster_address(&shared_.scores_empty[warpgroup_], neighbour));
    }
    __syncwarp();
    scores_parity_ ^= 1;
  }

  /// Both warpgroups may clear the same rows.
  __device__ void clear(const DecodeUnit& unit, int token) {
    const int first = unit.key_begin - token;
    const int last = unit.key_end - token;
    if (first <= 0 && last >= Tile::kBlock) return;
    clear_unseen<Layout, Tile::kBlock, Tile::kColumns>(shared_.k[ring_.index].latent, first, last,
                                                       thread_, kThreads);
    fence_async_shared();
    named_barrier_sync(barrier(), kThreads);
  }

  __device__ void release_keys() {
    __syncwarp();
    if (thread_ % 32 == 0) mbarrier_arrive(&shared_.empty[ring_.index]);
    ring_.advance();
  }

  __device__ void finish(const DecodeUnit& unit, float (&o)[Tile::kColumns / 2],
                         const RowStatistics& rows) {
    const bool whole = unit.pieces == 1;
    const std::int64_t slot =
        whole ? 0 : partial_slot(params_, unit, lane_, group_ - unit.first_group);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = local_row() + 8 * row;
      const float max = rows.max[row] * params_.exp_scale;
      const float sum = quad_sum(rows.sum[row]);
      if (whole) {
        write_row<Element>(params_, unit, o, row, at, max, sum, half() * Tile::kColumns);
      } else if (at < unit.rows) {
        write_partial<Tile::kColumns>(params_, slot, o, row, at, max, sum);
      }
    }
    if (whole) return;
    const bool both = unit.rows > kWarpgroupRows;
    const int threads = both ? 2 * kThreads : kThreads;
    const int thread = warpgroup_ * kThreads + thread_;
    if (arrive_last(params_, unit, lane_, &shared_.is_last[both], kBothBarrier, threads,
                    thread == 0)) {
      merge_pieces<Element, Tile::kColumns>(params_, unit, lane_, half() * Tile::kColumns, thread,
                                            threads);
    }
  }

  __device__ int half() const { return lane_ % 2; }

  const DecodeParams& params_;
  LatentShared<Tile>& shared_;
  const int lane_;
  const int group_ = static_cast<int>(blockIdx.x) / params_.lanes;
  const int thread_, warpgroup_;
  const float headroom_;
  std::uint32_t scores_parity_ = 0;
  Ring<Tile::kStages> ring_;
};

}  // namespace annulus::kernels::sm90
