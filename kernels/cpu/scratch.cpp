#include "kernels/cpu/scratch.hpp"

#include <sys/mman.h>

#include <cstdlib>

namespace annulus::kernels {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

}  // namespace

void Scratch::Free::operator()(float* data) const { std::free(data); }

Scratch& Scratch::of_this_thread() {
  thread_local Scratch scratch;
  return scratch;
}

bool Scratch::reserve(std::int64_t floats) {
  used_ = 0;
  if (floats <= size_) return true;
  const std::size_t wanted = static_cast<std::size_t>(floats) * sizeof(float);
  const std::size_t bytes = (wanted + kHugePage - 1) / kHugePage * kHugePage;
  data_.reset();
  size_ = 0;
  data_.reset(static_cast<float*>(std::aligned_alloc(kHugePage, bytes)));
  if (!data_) return false;
#ifdef MADV_HUGEPAGE
  (void)madvise(data_.get(), bytes, MADV_HUGEPAGE);  // a wish: without it small pages serve
#endif
  size_ = static_cast<std::int64_t>(bytes / sizeof(float));
  return true;
}

}  // namespace annulus::kernels
