// From raw products q·k of a tile to logits: soft cap, bias and masks, shared by both directions.
#if defined(ANNULUS_CPU_LOGITS_TILE_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_LOGITS_TILE_INL
#undef ANNULUS_CPU_LOGITS_TILE_INL
#else
#define ANNULUS_CPU_LOGITS_TILE_INL
#endif

#include <cmath>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/dropout_tile-inl.hpp"
#include "kernels/cpu/pair_tile-inl.hpp"
#include "kernels/cpu/softmax_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Tiles [keys, lanes] that only some problems need.
struct PairBuffers {
  float* rows = nullptr;    // [lanes, keys] before a transposition
  float* addend = nullptr;  // bias
  float* kept = nullptr;    // 1 or 0
  float* factor = nullptr;  // dropout
  float* capped = nullptr;  // cap·tanh(·), for its slope in the backward
};

struct LogitsTile {
  const AttentionProblem& problem;
  std::int64_t batch = 0;
  const TileRows& rows;
  std::int64_t vectors = 0;
  const KeyRun& run;
  const RunEdges* edges = nullptr;  // of the run, where its products leave out what no lane sees
};

/// What a value of the tile times this is a logit; the sign of the scale sits in packed Q.
inline float logit_factor(const AttentionProblem& problem) {
  const bool scaled = problem.soft_cap > 0.0F || problem.bias || problem.scale == 0.0F;
  return scaled ? 1.0F : std::fabs(problem.scale);
}

/// Turns products into values that logit_factor scales to logits, −inf where a mask drops them.
inline void products_to_logits(const LogitsTile& tile, const PairBuffers& buffers, float* s) {
  const AttentionProblem& problem = tile.problem;
  const std::int64_t keys = tile.run.keys.size();
  float scale = std::fabs(problem.scale);
  if (problem.soft_cap > 0.0F) {
    cap_tile(keys, tile.vectors, scale, problem.soft_cap, s);
    scale = 1.0F;
    if (buffers.capped != nullptr) std::copy_n(s, keys * kTileLanes, buffers.capped);
  }
  if (problem.bias) {
    load_pair_tile(problem.bias, tile.batch, tile.rows, tile.run.keys, buffers.rows,
                   buffers.addend);
    scale_and_add_tile(keys, tile.vectors, scale, buffers.addend, s);
  } else if (scale == 0.0F) {  // before the masks, whose −inf times 0 is no number
    for (std::int64_t i = 0; i < keys * kTileLanes; ++i) s[i] *= 0.0F;
  }
  if (problem.dense_mask) {
    load_pair_tile(problem.dense_mask, tile.batch, tile.rows, tile.run.keys, buffers.rows,
                   buffers.kept);
    drop_tile(keys, tile.vectors, buffers.kept, s);
  }
  if (tile.edges != nullptr) {
    drop_outside(*tile.edges, keys, tile.vectors, s);
  } else if (!tile.run.full) {
    fill_kept(tile.run, tile.rows, tile.vectors, buffers.kept);
    drop_tile(keys, tile.vectors, buffers.kept, s);
  }
}

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_LOGITS_TILE_INL
