#include "kernels/cpu/amx.hpp"

#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace annulus::kernels::cpu {
namespace {

#if defined(__x86_64__) && defined(__linux__)
bool asked_for_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBf16 = 1U << 22U;
  constexpr unsigned kTiles = 1U << 24U;
  if ((edx & kBf16) == 0 || (edx & kTiles) == 0) return false;
  // Linux enlarges the saved state of a thread only for processes that ask for it.
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool asked_for_amx() { return false; }
#endif

std::atomic<bool> allowed{true};

}  // namespace

bool has_amx() {
  static const bool available = asked_for_amx();
  return available && allowed.load(std::memory_order_relaxed);
}

void allow_amx(bool allow) { allowed.store(allow, std::memory_order_relaxed); }

}  // namespace annulus::kernels::cpu
