#pragma once

#include <cstdint>
#include <memory>

namespace annulus::kernels {

/// A thread's working memory, kept between calls: tiles are carved from one piece, on huge pages
/// where the system has them (with small ones a third of the time went to missed translations).
class Scratch {
 public:
  static Scratch& of_this_thread();

  /// Forgets everything handed out and makes room for `floats`; false when there is no memory.
  bool reserve(std::int64_t floats);

  /// Aligned to a cache line and to any vector; the contents are stale.
  float* take(std::int64_t floats) {
    float* piece = data_.get() + used_;
    used_ += room_for(floats);
    return piece;
  }

  static std::int64_t room_for(std::int64_t floats) { return (floats + 31) / 32 * 32; }

 private:
  struct Free {
    void operator()(float* data) const;
  };

  std::unique_ptr<float[], Free> data_;
  std::int64_t size_ = 0;
  std::int64_t used_ = 0;
};

}  // namespace annulus::kernels
