#pragma once

#include "kernels/sm90/decode_latent_tile.cuh"
#include "kernels/sm90/decode_producer.cuh"

/// The producing side of latent decode: pairs of blocks, each by halves of its columns.
namespace annulus::kernels::sm90 {

/// One warp a half feeds the copy engine; each lane copies boxes of its own.
template <typename Tile, int kSide>
class LatentBoxProducer {
 public:
  __device__ LatentBoxProducer(const DecodeParams& params, LatentShared<Tile>& shared)
      : params_(params), shared_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run(WorkWalker walker) {
    DecodeUnit unit;
    std::uint32_t parity = 0;
    while (walker.next(unit)) {
      end_with_last_block<Tile>(unit);
      int token = unit.load_begin + unit.first_block * Tile::kBlock;
      find_pages(unit, token);
      for (int block = unit.first_block; block < unit.last_block; block += 2) {
#pragma unroll
        for (int of = 0; of < 2; ++of) {
          mbarrier_wait(&shared_.empty[of][kSide], parity ^ 1);
          load(unit, token, of);
          token += Tile::kBlock;
          find_pages(unit, token);
        }
        parity ^= 1;
      }
    }
  }

 private:
  static constexpr int kFirstBox = kSide * Tile::kLeftBoxes;
  static constexpr int kBoxes = kSide == 0 ? Tile::kLeftBoxes : Tile::kBoxes - Tile::kLeftBoxes;
  static constexpr int kBoxesPerLane = (Tile::kBlock / 8 * kBoxes + 31) / 32;

  __device__ int token_of(int i, int token) const {
    return token + (lane_ + 32 * i) / kBoxes * params_.box_tokens;
  }

  __device__ bool has_box(int i, int token, const DecodeUnit& unit) const {
    return lane_ + 32 * i < params_.boxes * kBoxes && token_of(i, token) < unit.key_end;
  }

  __device__ void find_pages(const DecodeUnit& unit, int token) {
    const std::int32_t* table =
        params_.page_table + std::int64_t{unit.sequence} * params_.max_pages;
#pragma unroll
    for (int i = 0; i < kBoxesPerLane; ++i) {
      if (!has_box(i, token, unit)) continue;
      const int page = divide(token_of(i, token), params_.page_size);
      pages_[i] = table[page];
      rows_[i] = token_of(i, token) - page * params_.page_size.value;
    }
  }

  /// The second block of a pair may lie behind the end: nothing comes then, and all is cleared.
  __device__ void load(const DecodeUnit& unit, int token, int of) {
    const int rows = loaded_rows(params_, unit, token, Tile::kBlock);
    if (lane_ < kBoxes) {
      mbarrier_arrive_expect(&shared_.full[of][kFirstBox + lane_],
                             static_cast<std::uint32_t>(rows * Tile::Layout::kColumns * 2));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBoxesPerLane; ++i) {
      if (!has_box(i, token, unit)) continue;
      const int box = kFirstBox + (lane_ + 32 * i) % kBoxes;
      const int row = (lane_ + 32 * i) / kBoxes * params_.box_tokens;
      tma_load(shared_.k[of] + box * Tile::kBoxElements + row * Tile::Layout::kColumns, &params_.k,
               &shared_.full[of][box], static_cast<CachePolicy>(params_.policy),
               box * Tile::Layout::kColumns, rows_[i], unit.kv_head, pages_[i]);
    }
  }

  const DecodeParams& params_;
  LatentShared<Tile>& shared_;
  const int lane_;
  int pages_[kBoxesPerLane] = {}, rows_[kBoxesPerLane] = {};
};

/// Gathers a block's tokens one by one, the 128 threads of a warpgroup together. TokenGather, which
/// keeps places in registers, does not fit the few that are left here.
template <typename Tile>
class LatentGather {
 public:
  __device__ LatentGather(const DecodeParams& params, int2 (&buffers)[2][Tile::kBlock])
      : params_(params), buffers_(buffers), thread_(static_cast<int>(threadIdx.x) % kThreads) {}

  /// The two buffers let a thread go on while others still read the block before's.
  __device__ void find_places(const DecodeUnit& unit, int token) {
    places_ = buffers_[turn_ ^= 1];
    const std::int32_t* table =
        params_.page_table + std::int64_t{unit.sequence} * params_.max_pages;
    if (thread_ < Tile::kBlock) {
      const int at = token + thread_;
      const int index = divide(at, params_.page_size);
      int2 place = make_int2(-1, at - index * params_.page_size.value);
      if (at >= unit.key_begin && at < unit.key_end) {
        const int page = table[index];
        if (page >= 0 && page < params_.pages) place.x = page;
      }
      places_[thread_] = place;
    }
    named_barrier_sync(kBarrier, kThreads);
  }

  /// Columns of the tokens, which begin at `data`; tokens that nobody sees arrive as zeros.
  template <typename Layout, int kColumns>
  __device__ void copy(void* stage, const char* data, const PageStrides& strides,
                       const DecodeUnit& unit, int token) {
    constexpr int kChunks = kColumns / 8;  // of 16 bytes in a row
    if (token >= unit.key_end) return;
    const char* head = data + unit.kv_head * strides.head;
#pragma unroll 4
    for (int i = thread_; i < Tile::kBlock * kChunks; i += kThreads) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      const int2 place = places_[row];
      const char* from = head + max(place.x, 0) * strides.page + place.y * strides.token;
      copy_async(static_cast<char*>(stage) + swizzled_offset<Layout>(row, chunk, Tile::kBlock),
                 from + chunk * 16, place.x >= 0);
    }
  }

 private:
  static constexpr int kThreads = 128;
  static constexpr int kBarrier = 3;

  const DecodeParams& params_;
  int2 (&buffers_)[2][Tile::kBlock];
  const int thread_;
  int2* places_ = nullptr;
  int turn_ = 0;
};

/// A warpgroup gathers token by token.
template <typename Tile>
class LatentTokenProducer {
 public:
  __device__ LatentTokenProducer(const DecodeParams& params, LatentShared<Tile>& shared)
      : params_(params), shared_(shared), gather_(params, shared.places) {}

  __device__ void run(WorkWalker walker) {
    DecodeUnit unit;
    std::uint32_t parity = 0;
    while (walker.next(unit)) {
      end_with_last_block<Tile>(unit);
      int token = unit.load_begin + unit.first_block * Tile::kBlock;
      for (int block = unit.first_block; block < unit.last_block; block += 2) {
        for (int of = 0; of < 2; ++of) {
          gather_.find_places(unit, token);
          mbarrier_wait(&shared_.empty[of][0], parity ^ 1);
          mbarrier_wait(&shared_.empty[of][1], parity ^ 1);
          gather_.template copy<typename Tile::Layout, Tile::kHeadDim>(
              shared_.k[of], params_.k_data, params_.k_strides, unit, token);
          copy_async_commit();
          if (of == 1) {
            copy_async_wait<1>();
            announce(0);
          }
          token += Tile::kBlock;
        }
        copy_async_wait<0>();
        announce(1);
        parity ^= 1;
      }
    }
  }

 private:
  __device__ void announce(int of) {
    fence_async_shared();
#pragma unroll
    for (int box = 0; box < Tile::kBoxes; ++box) mbarrier_arrive(&shared_.full[of][box]);
  }

  const DecodeParams& params_;
  LatentShared<Tile>& shared_;
  LatentGather<Tile> gather_;
};

}  // namespace annulus::kernels::sm90
