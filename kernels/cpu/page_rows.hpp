#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/decode_attention.hpp"

namespace annulus::kernels {

/// Where the 16-bit rows of a sequence's tokens lie in the pages of a cache.
class PageRows {
 public:
  PageRows(const DecodeProblem& problem, std::int64_t sequence)
      : problem_(problem),
        table_(static_cast<const std::int32_t*>(problem.page_table.data) +
               sequence * problem.max_pages()) {}

  /// Of the keys or the values, `view`.
  const std::uint16_t* row(const ConstTensorView& view, std::int64_t token,
                           std::int64_t kv_head) const {
    return static_cast<const std::uint16_t*>(view.data) +
           table_[token / problem_.page_size()] * view.strides[0] +
           token % problem_.page_size() * view.strides[1] + kv_head * view.strides[2];
  }

  const DecodeProblem& problem() const { return problem_; }

 private:
  const DecodeProblem& problem_;
  const std::int32_t* table_;
};

/// Brings the keys and values of some tokens to L2, a few lines at a time while others are computed
/// on: token by token, its key before its value.
class PagePrefetch {
 public:
  explicit PagePrefetch(const PageRows& rows) : rows_(rows) {}

  /// What is asked for from now on; what was left of before is forgotten.
  void start(Span tokens, std::int64_t kv_head) {
    tokens_ = tokens;
    kv_head_ = kv_head;
    values_ = false;
    start_row();
  }

  /// The next `kLines` lines, or as many as are left of their row.
  template <int kLines>
  void lines() {
    if (bytes_ <= 0) return;
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(at_ + 64 * line, 0, 2);
    at_ += 64 * kLines;
    bytes_ -= 64 * kLines;
    if (bytes_ <= 0) end_row();
  }

  /// One of `times` calls that ask for `lines` lines together: in bursts some would be dropped for
  /// want of a line buffer.
  void share(std::int64_t lines_in_all, std::int64_t times) {
    for (due_ += lines_in_all; due_ >= times; due_ -= times) lines<1>();
  }

 private:
  void start_row() {
    const ConstTensorView& view = values_ ? rows_.problem().v : rows_.problem().k;
    bytes_ = tokens_.empty() ? 0 : 2 * view.shape[3];
    if (bytes_ > 0) at_ = reinterpret_cast<const char*>(rows_.row(view, tokens_.begin, kv_head_));
  }

  void end_row() {
    const bool latent = rows_.problem().latent();
    if (latent || values_) ++tokens_.begin;
    values_ = !latent && !values_;
    start_row();
  }

  const PageRows& rows_;
  Span tokens_;
  std::int64_t kv_head_ = 0;
  bool values_ = false;
  const char* at_ = nullptr;
  std::int64_t bytes_ = 0;  // left of the row
  std::int64_t due_ = 0;
};

}  // namespace annulus::kernels
