#include "kernels/cpu/bf16_dots.hpp"

#include <unistd.h>

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

// 48 KB hold two tokens' lines and what is on its way beside O and Q of 32 heads of 128 columns; in
// 32 KB (Zen 4) the loop took twice as long. 0 is an unknown size.
DotDecode decode_that_fits() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes > 0 && bytes < 48 << 10) return DotDecode::heads;
#endif
  return DotDecode::pairs;
}

std::atomic<bool> allowed{true};
std::atomic<std::optional<DotDecode>> chosen{};

}  // namespace

bool has_bf16_dots() {
  static const bool available = has_fast_dots();
  return available && allowed.load(std::memory_order_relaxed);
}

void allow_bf16_dots(bool allow) { allowed.store(allow, std::memory_order_relaxed); }

DotDecode dot_decode() {
  static const DotDecode fits = decode_that_fits();
  return chosen.load(std::memory_order_relaxed).value_or(fits);
}

void choose_dot_decode(std::optional<DotDecode> choice) {
  chosen.store(choice, std::memory_order_relaxed);
}

}  // namespace annulus::kernels::cpu
