// Products of a tile of queries with a run of keys by vectors, of which the edges of a mask leave
// out those that see none of eight keys.
#if defined(ANNULUS_CPU_RUN_PRODUCTS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef ANNULUS_CPU_RUN_PRODUCTS_INL
#undef ANNULUS_CPU_RUN_PRODUCTS_INL
#else
#define ANNULUS_CPU_RUN_PRODUCTS_INL
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "hwy/highway.h"
#include "kernels/cpu/gemm_tile-inl.hpp"
#include "kernels/cpu/key_runs.hpp"
#include "kernels/cpu/pack-inl.hpp"
#include "kernels/cpu/query_tile-inl.hpp"
#include "kernels/cpu/softmax_tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace annulus::kernels::HWY_NAMESPACE {

/// Whole panels of eight keys around a run, and which vectors of the tile each needs.
class RunPanels {
 public:
  /// `first_key` of the run in its tile of keys.
  RunPanels(const QueryTile& tile, const KeyRun& run, std::int64_t first_key)
      : before_(first_key % 8),
        all_(round_up(before_ + run.keys.size(), 8)),
        vectors_(tile.vectors) {
    if (!run.full && run.slices.size() == 1) edges_.emplace(run, tile.rows, tile.vectors);
    for (std::int64_t key = 0; key < all_; key += 8) {
      const Span seen =
          edges_ ? edges_->vectors_of({key - before_, key - before_ + 8}) : Span{0, vectors_};
      if (count_ > 0 && same(runs_[count_ - 1], seen)) {
        runs_[count_ - 1].steps += 8;
      } else {
        runs_[count_++] = {8, seen.begin, seen.size()};
      }
    }
  }

  std::int64_t before() const { return before_; }  // keys of the panels before the run
  std::int64_t all() const { return all_; }        // keys of the panels
  const RunEdges* edges() const { return edges_ ? &*edges_ : nullptr; }

  /// s[key, lane] = K·Qᵀ from the first key of the panels on, for vectors that see some of a panel;
  /// `k` in panels [keys / 8, steps, 8].
  template <Elements kElements>
  void multiply_queries(std::int64_t steps, const float* k, const float* q, float* s,
                        RowPrefetch* prefetch) const {
    for (const StepRun& run : runs()) {
      const std::int64_t lane = run.first_vector * kLanes;
      gemm<Update::overwrite, Layout::panels, kElements>({run.steps, run.vectors, steps},
                                                         {k, 8 * steps}, q + lane, kTileLanes,
                                                         s + lane, kTileLanes, nullptr, prefetch);
      k += run.steps * steps;
      s += run.steps * kTileLanes;
    }
  }

  /// o ← o·rescale + Vᵀ·p from the first key of the panels on; `v` in panels of its columns,
  /// `panel_stride` floats each, of steps of `keys_of_step` keys.
  template <Elements kElements>
  void add_values(std::int64_t value_dim, const float* v, std::int64_t panel_stride, const float* p,
                  float* o, const float* rescale, RowPrefetch* prefetch) const {
    constexpr std::int64_t kKeys = kElements == Elements::bf16_pairs ? 2 : 1;
    if (count_ == 1 && runs_[0].vectors == vectors_) {
      return gemm<Update::rescale, Layout::panels, kElements>({value_dim, vectors_, all_ / kKeys},
                                                              {v, panel_stride}, p, kTileLanes, o,
                                                              kTileLanes, rescale, prefetch);
    }
    std::array<StepRun, kKeyTile / 8> steps = runs_;
    for (std::size_t i = 0; i < count_; ++i) steps[i].steps /= kKeys;
    gemm_runs<Layout::panels, kElements>(value_dim, vectors_, std::span(steps).first(count_),
                                         {v, panel_stride}, p, kTileLanes, o, kTileLanes, rescale,
                                         prefetch);
  }

  /// s ← value for the keys of the panels before and after a run of `keys`.
  void fill_outside(std::int64_t keys, float value, float* s) const {
    std::fill_n(s, before_ * kTileLanes, value);
    std::fill(s + (before_ + keys) * kTileLanes, s + all_ * kTileLanes, value);
  }

 private:
  static bool same(const StepRun& run, Span vectors) {
    return run.first_vector == vectors.begin && run.vectors == vectors.size();
  }

  std::span<const StepRun> runs() const { return std::span(runs_).first(count_); }

  std::int64_t before_;
  std::int64_t all_;
  std::int64_t vectors_;
  std::optional<RunEdges> edges_;
  std::array<StepRun, kKeyTile / 8> runs_;
  std::size_t count_ = 0;
};

}  // namespace annulus::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // ANNULUS_CPU_RUN_PRODUCTS_INL
