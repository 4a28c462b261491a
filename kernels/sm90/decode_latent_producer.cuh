#pragma once

#include "kernels/sm90/decode_latent_tile.cuh"
#include "kernels/sm90/decode_producer.cuh"

/// The producing side of latent decode: one ring of keys.
namespace annulus::kernels::sm90 {

/// One warp feeds the copy engine; each lane copies boxes of its own, the last of a row of boxes
/// being rotary.
template <typename Tile>
class LatentBoxProducer {
 public:
  __device__ LatentBoxProducer(const DecodeParams& params, LatentShared<Tile>& shared, int half)
      : params_(params),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % 32),
        half_(half),
        box_rows_(Tile::kBlock / params.box_tokens) {}

  __device__ void run(WorkWalker walker) {
    DecodeUnit unit;
    while (walker.next(unit)) {
      int token = unit.load_begin + unit.first_block * Tile::kBlock;
      find_pages(unit, token);
      for (int block = unit.first_block; block < unit.last_block; ++block) {
        mbarrier_wait(&shared_.empty[ring_.index], ring_.parity ^ 1);
        load(unit, token);
        ring_.advance();
        token += Tile::kBlock;
        find_pages(unit, token);
      }
    }
  }

 private:
  static constexpr int kBoxes = Tile::kBoxes + 1;
  static constexpr int kBoxesPerLane = (Tile::kBlock / 8 * kBoxes + 31) / 32;

  __device__ int token_of(int i, int token) const {
    return token + (lane_ + 32 * i) / kBoxes * params_.box_tokens;
  }

  __device__ bool has_box(int i, int token, const DecodeUnit& unit) const {
    return lane_ + 32 * i < box_rows_ * kBoxes && token_of(i, token) < unit.key_end;
  }

  __device__ void find_pages(const DecodeUnit& unit, int token) {
    const std::int32_t* table =
        params_.page_table + std::int64_t{unit.sequence} * params_.max_pages;
#pragma unroll
    for (int i = 0; i < kBoxesPerLane; ++i) {
      if (has_box(i, token, unit)) pages_[i] = table[token_of(i, token) / params_.page_size];
    }
  }

  __device__ void load(const DecodeUnit& unit, int token) {
    std::uint64_t* const full = &shared_.full[ring_.index];
    auto& stage = shared_.k[ring_.index];
    const int wanted = (unit.key_end - token + params_.box_tokens - 1) / params_.box_tokens;
    const int rows = max(0, min(wanted, box_rows_)) * params_.box_tokens;
    if (lane_ == 0) {
      mbarrier_arrive_expect(
          full, static_cast<std::uint32_t>(rows * (Tile::kColumns + Tile::kRotary) * 2));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBoxesPerLane; ++i) {
      if (!has_box(i, token, unit)) continue;
      const int box = (lane_ + 32 * i) % kBoxes;
      const int row = (lane_ + 32 * i) / kBoxes * params_.box_tokens;
      const int page_row = token_of(i, token) % params_.page_size;
      const int head = unit.part / params_.parts_per_kv_head;
      const auto policy = static_cast<CachePolicy>(params_.policy);
      if (box < Tile::kBoxes) {
        constexpr int kWidth = Tile::Layout::kColumns;
        tma_load(stage.latent + box * kWidth * Tile::kBlock + row * kWidth, &params_.k, full,
                 policy, half_ * Tile::kColumns + box * kWidth, page_row, head, pages_[i]);
      } else {
        tma_load(stage.rotary + row * Tile::kRotary, &params_.v, full, policy,
                 Tile::kAllColumns + half_ * Tile::kRotary, page_row, head, pages_[i]);
      }
    }
  }

  const DecodeParams& params_;
  LatentShared<Tile>& shared_;
  const int lane_, half_, box_rows_;
  int pages_[kBoxesPerLane] = {};
  Ring<Tile::kStages> ring_;
};

/// A warpgroup gathers token by token.
template <typename Tile>
class LatentTokenProducer {
 public:
  __device__ LatentTokenProducer(const DecodeParams& params, LatentShared<Tile>& shared, int half)
      : params_(params),
        shared_(shared),
        gather_(params, shared.places),
        latent_(params.k_data + half * Tile::kColumns * 2),
        rotary_(params.k_data + (Tile::kAllColumns + half * Tile::kRotary) * 2) {}

  __device__ void run(WorkWalker walker) {
    DecodeUnit unit;
    while (walker.next(unit)) {
      int token = unit.load_begin + unit.first_block * Tile::kBlock;
      for (int block = unit.first_block; block < unit.last_block; ++block) {
        gather_.find_places(unit, token);
        mbarrier_wait(&shared_.empty[ring_.index], ring_.parity ^ 1);
        auto& stage = shared_.k[ring_.index];
        gather_.template copy<typename Tile::Layout, Tile::kColumns>(
            stage.latent, latent_, params_.k_strides, unit, token);
        gather_.template copy<typename Tile::RotaryLayout, Tile::kRotary>(
            stage.rotary, rotary_, params_.k_strides, unit, token);
        copy_async_commit();
        ring_.advance();
        if (++issued_ > kPending) {
          copy_async_wait<kPending>();
          fence_async_shared();
          announce();
        }
        token += Tile::kBlock;
      }
    }
    copy_async_wait<0>();
    fence_async_shared();
    while (announced_ < issued_) announce();
  }

 private:
  static constexpr int kPending = Tile::kStages - 1;

  __device__ void announce() { mbarrier_arrive(&shared_.full[announced_++ % Tile::kStages]); }

  const DecodeParams& params_;
  LatentShared<Tile>& shared_;
  TokenGather<Tile> gather_;
  const char* const latent_;
  const char* const rotary_;
  std::uint32_t issued_ = 0, announced_ = 0;
  Ring<Tile::kStages> ring_;
};

}  // namespace annulus::kernels::sm90
