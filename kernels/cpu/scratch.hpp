#pragma once

#include <cstdint>

#include "hwy/aligned_allocator.h"

namespace annulus::kernels {

/// A thread's working memory, kept between calls: tiles are carved from one aligned piece.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

  /// Forgets everything handed out and makes room for `floats`.
  void reserve(std::int64_t floats) {
    used_ = 0;
    if (floats <= size_) return;
    data_ = hwy::AllocateAligned<float>(static_cast<std::size_t>(floats));
    size_ = data_ ? floats : 0;
  }

  bool has_room(std::int64_t floats) const { return size_ >= floats; }

  /// Aligned to a cache line and to any vector; the contents are stale.
  float* take(std::int64_t floats) {
    float* piece = data_.get() + used_;
    used_ += room_for(floats);
    return piece;
  }

  static std::int64_t room_for(std::int64_t floats) { return (floats + 31) / 32 * 32; }

 private:
  hwy::AlignedFreeUniquePtr<float[]> data_;
  std::int64_t size_ = 0;
  std::int64_t used_ = 0;
};

}  // namespace annulus::kernels
