#pragma once

#include "kernels/sm90/copy_async.cuh"
#include "kernels/sm90/decode_tile.cuh"
#include "kernels/sm90/tma.cuh"

/// The producing side: walks the run and keeps the rings of keys and values full.
namespace annulus::kernels::sm90 {

/// Rows that the copy engine brings of a block: whole boxes, as far as there are keys.
__device__ inline int loaded_rows(const DecodeParams& p, const DecodeUnit& unit, int token,
                                  int block) {
  const int wanted = (unit.key_end - token + p.box_tokens - 1) & -p.box_tokens;
  return max(0, min(wanted, block));
}

/// One warp feeds the copy engine with keys, another one with values; each lane copies boxes of its
/// own.
template <typename Tile>
class BoxProducer {
 public:
  using Element = typename Tile::Element;
  using Stage = Element[Tile::kBlock * Tile::kHeadDim];

  __device__ BoxProducer(const DecodeParams& params, const CUtensorMap& map, Stage* stages,
                         std::uint64_t* full, std::uint64_t* empty)
      : params_(params),
        map_(map),
        stages_(stages),
        full_(full),
        empty_(empty),
        lane_(static_cast<int>(threadIdx.x) % 32),
        ring_{params.stages} {}

  __device__ void run(WorkWalker walker) {
    DecodeUnit unit;
    while (walker.next(unit)) {
      int token = unit.load_begin + unit.first_block * Tile::kBlock;
      Places places, later;
      find_pages(unit, token, places);
      find_pages(unit, token + Tile::kBlock, later);
      for (int block = unit.first_block; block < unit.last_block; ++block) {
        mbarrier_wait(&empty_[ring_.index], ring_.parity ^ 1);
        load(unit, token, places);
        ring_.advance();
        token += Tile::kBlock;
        places = later;
        find_pages(unit, token + Tile::kBlock, later);  // its latency passes with this block
      }
    }
  }

 private:
  static constexpr int kMostBoxes = Tile::kBlock / 8 * Tile::kBoxes;
  static constexpr int kBoxesPerLane = (kMostBoxes + 31) / 32;

  /// Where this lane's boxes of a block lie.
  struct Places {
    int page[kBoxesPerLane], row[kBoxesPerLane];
  };

  __device__ int token_of(int i, int token) const {
    return token + (lane_ + 32 * i) / Tile::kBoxes * params_.box_tokens;
  }

  __device__ bool has_box(int i, int token, const DecodeUnit& unit) const {
    return lane_ + 32 * i < params_.boxes * Tile::kBoxes && token_of(i, token) < unit.key_end;
  }

  __device__ void find_pages(const DecodeUnit& unit, int token, Places& places) {
    const std::int32_t* table =
        params_.page_table + std::int64_t{unit.sequence} * params_.max_pages;
#pragma unroll
    for (int i = 0; i < kBoxesPerLane; ++i) {
      if (!has_box(i, token, unit)) continue;
      const int page = divide(token_of(i, token), params_.page_size);
      places.page[i] = table[page];
      places.row[i] = token_of(i, token) - page * params_.page_size.value;
    }
  }

  __device__ void load(const DecodeUnit& unit, int token, const Places& places) {
    std::uint64_t* const full = &full_[ring_.index];
    if (lane_ == 0) {
      const int rows = loaded_rows(params_, unit, token, Tile::kBlock);
      mbarrier_arrive_expect(full, static_cast<std::uint32_t>(rows) * Tile::kHeadDim * 2);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBoxesPerLane; ++i) {
      if (!has_box(i, token, unit)) continue;
      const int box = lane_ + 32 * i;
      const int row = box / Tile::kBoxes * params_.box_tokens;
      const int column = box % Tile::kBoxes * Tile::Layout::kColumns;
      tma_load(stages_[ring_.index] + column * Tile::kBlock + row * Tile::Layout::kColumns, &map_,
               full, static_cast<CachePolicy>(params_.policy), column, places.row[i], unit.kv_head,
               places.page[i]);
    }
  }

  const DecodeParams& params_;
  const CUtensorMap& map_;
  Stage* const stages_;
  std::uint64_t *const full_, *const empty_;
  const int lane_;
  StageRing ring_;
};

/// Gathers a block's tokens one by one from pages that hold no whole group of eight rows. The four
/// warps of a warpgroup take a quarter of the block each and go on without waiting for each other.
template <typename Tile>
class TokenGather {
 public:
  __device__ explicit TokenGather(const DecodeParams& params)
      : params_(params),
        lane_(static_cast<int>(threadIdx.x) % 32),
        first_row_(static_cast<int>(threadIdx.x) / 32 * kRows) {}

  /// Looks up where the tokens of the block at `token` lie.
  __device__ void find_places(const DecodeUnit& unit, int token) {
    page_ = -1;
    const int at = token + first_row_ + lane_;
    if (lane_ >= kRows || at < unit.key_begin || at >= unit.key_end) return;
    const int index = divide(at, params_.page_size);
    page_ = params_.page_table[std::int64_t{unit.sequence} * params_.max_pages + index];
    row_ = at - index * params_.page_size.value;
  }

  /// Columns of the tokens, which begin at `data`; tokens that nobody sees arrive as zeros.
  template <typename Layout, int kColumns>
  __device__ void copy(void* stage, const char* data, const PageStrides& strides,
                       const DecodeUnit& unit) const {
    constexpr int kChunks = kColumns / 8;  // of 16 bytes in a row
    static_assert(kRows * kChunks % 32 == 0, "all lanes take part in every shuffle");
    const bool there = page_ >= 0 && page_ < params_.pages;
    const std::int64_t own = there ? page_ * strides.page + row_ * strides.token : -1;
    const char* const head = data + unit.kv_head * strides.head;
#pragma unroll 4
    for (int i = lane_; i < kRows * kChunks; i += 32) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      const std::int64_t offset = __shfl_sync(0xffffffffU, own, row);
      copy_async(static_cast<char*>(stage) +
                     swizzled_offset<Layout>(first_row_ + row, chunk, Tile::kBlock),
                 head + max(offset, std::int64_t{0}) + chunk * 16, offset >= 0);
    }
  }

 private:
  static constexpr int kRows = Tile::kBlock / 4;  // a warp's; its first lanes have one each
  static_assert(kRows <= 32);

  const DecodeParams& params_;
  const int lane_;
  const int first_row_;
  std::int32_t page_ = -1, row_ = 0;
};

/// Keys and values through the gather, in turn.
template <typename Tile>
class TokenProducer {
 public:
  __device__ TokenProducer(const DecodeParams& params, DecodeShared<Tile>& shared)
      : params_(params), shared_(shared), next_(params) {}

  __device__ void run(WorkWalker walker) {
    DecodeUnit unit;
    while (walker.next(unit)) {
      int token = unit.load_begin + unit.first_block * Tile::kBlock;
      next_.find_places(unit, token);
      for (int block = unit.first_block; block < unit.last_block; ++block) {
        const TokenGather<Tile> gather = next_;
        token += Tile::kBlock;
        next_.find_places(unit, token);  // its latency passes with this block
        mbarrier_wait(&shared_.k_empty[ring_.index], ring_.parity ^ 1);
        copy(gather, shared_.k[ring_.index], &shared_.k_full[ring_.index], params_.k_data,
             params_.k_strides, unit);
        mbarrier_wait(&shared_.v_empty[ring_.index], ring_.parity ^ 1);
        copy(gather, shared_.v[ring_.index], &shared_.v_full[ring_.index], params_.v_data,
             params_.v_strides, unit);
        ring_.advance();
      }
    }
    copy_async_wait<0>();
  }

 private:
  static __device__ void copy(const TokenGather<Tile>& gather, void* stage, std::uint64_t* full,
                              const char* data, const PageStrides& strides,
                              const DecodeUnit& unit) {
    gather.template copy<typename Tile::Layout, Tile::kHeadDim>(stage, data, strides, unit);
    copy_async_arrive(full);
  }

  const DecodeParams& params_;
  DecodeShared<Tile>& shared_;
  TokenGather<Tile> next_;
  Ring<Tile::kStages> ring_;
};

}  // namespace annulus::kernels::sm90
