// The program's own operator new: one that fails says how much was wanted and how much there is,
// which std::bad_alloc does not.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>

#include "kernels/host_memory.hpp"

namespace annulus::launch {
namespace {

class AllocationFailure : public std::bad_alloc {
 public:
  explicit AllocationFailure(std::size_t bytes) noexcept {
    fmt::format_to_n(text_.data(), text_.size() - 1,
                     "memory: {} bytes wanted on the host, {} available", bytes,
                     available_host_bytes());
  }
  const char* what() const noexcept override { return text_.data(); }

 private:
  std::array<char, 96> text_{};
};

void* allocate(std::size_t bytes) {
  void* memory = std::malloc(std::max<std::size_t>(bytes, 1));
  if (memory == nullptr) throw AllocationFailure(bytes);
  return memory;
}

void* allocate(std::size_t bytes, std::align_val_t alignment) {
  const auto unit = static_cast<std::size_t>(alignment);
  void* memory =
      std::aligned_alloc(unit, (std::max<std::size_t>(bytes, 1) + unit - 1) / unit * unit);
  if (memory == nullptr) throw AllocationFailure(bytes);
  return memory;
}

}  // namespace
}  // namespace annulus::launch

void* operator new(std::size_t bytes) { return annulus::launch::allocate(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return annulus::launch::allocate(bytes, alignment);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
