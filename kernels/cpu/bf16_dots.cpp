#include "kernels/cpu/bf16_dots.hpp"

#include <atomic>

namespace annulus::kernels::cpu {
namespace {

// Intel's processors do one such instruction in the time of four multiply-adds, so that products of
// widened elements are twice as fast there.
bool has_fast_dots() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

std::atomic<bool> allowed{true};

}  // namespace

bool has_bf16_dots() {
  static const bool available = has_fast_dots();
  return available && allowed.load(std::memory_order_relaxed);
}

void allow_bf16_dots(bool allow) { allowed.store(allow, std::memory_order_relaxed); }

}  // namespace annulus::kernels::cpu
