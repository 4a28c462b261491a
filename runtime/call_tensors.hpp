#pragma once

#include <chrono>
#include <cstdint>
#include <ranges>

#include "kernels/types.hpp"
#include "runtime/statement.hpp"
#include "sharding/partition_manager.hpp"

/// What the calls of attention over rows and of attention over a cache share.
namespace annulus {

/// The same memory as [batch, seq, heads, dim]; statistics and sinks (one or two dimensions) as
/// they are.
ConstTensorView in_bthd(const ConstTensorView& view, DimOrder order);

/// A view to hand to code that only reads through tensors.
TensorView readable(const ConstTensorView& view);

/// FNV-1a of the values' bytes.
template <std::ranges::contiguous_range Values>
std::uint64_t digest_of(const Values& values) {
  return digest({reinterpret_cast<const char*>(std::ranges::data(values)),
                 std::ranges::size(values) * sizeof(std::ranges::range_value_t<Values>)});
}

inline double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace annulus
