// Host copies against one element at a time: random shapes, strides and dtypes, poisoned outputs.

#include "kernels/host_copy.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/element.hpp"

namespace annulus {
namespace {

constexpr std::array kDTypes = {DType::f32, DType::f16, DType::bf16, DType::f64,
                                DType::u8,  DType::i32, DType::i64};

/// A view of random rank, extents and order of dimensions, with gaps, over memory of its own.
struct Strided {
  std::vector<std::uint8_t> memory;
  TensorView view;

  Strided(DType dtype, const Shape& shape, std::mt19937_64& random) {
    std::vector<int> order(static_cast<std::size_t>(shape.rank()));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    Shape strides = shape;
    std::int64_t stride = random() % 3 == 0 ? 2 : 1;
    for (const int dim : order) {
      strides[dim] = stride;
      stride *= shape[dim] + static_cast<std::int64_t>(random() % 3 == 0 ? random() % 3 : 0);
    }
    memory.assign(static_cast<std::size_t>(std::max<std::int64_t>(stride, 1) * size_bytes(dtype)),
                  0xA5);
    view = TensorView(memory.data(), dtype, shape, strides);
  }
};

/// Calls visit(offset in a, offset in b) for every element.
template <typename Visit>
void for_each_element(const TensorView& a, const TensorView& b, const Visit& visit) {
  for (std::int64_t i = 0; i < a.shape.elements(); ++i) {
    std::int64_t rest = i, in_a = 0, in_b = 0;
    for (int dim = a.rank() - 1; dim >= 0; --dim) {
      in_a += rest % a.shape[dim] * a.strides[dim];
      in_b += rest % a.shape[dim] * b.strides[dim];
      rest /= a.shape[dim];
    }
    visit(in_a, in_b);
  }
}

Shape random_shape(std::mt19937_64& random) {
  std::vector<std::int64_t> dims(random() % 6);
  for (std::int64_t& dim : dims) {
    dim = static_cast<std::int64_t>(random() % 8 == 0 ? 19 : random() % 4);
  }
  return Shape(dims);
}

/// `whole`: numbers that every dtype holds.
void fill(Strided& tensor, bool whole, std::mt19937_64& random) {
  for_each_element(tensor.view, tensor.view, [&](std::int64_t at, std::int64_t) {
    const double value = whole ? static_cast<double>(random() % 100)
                               : std::ldexp(static_cast<double>(random() % 8001) - 4000.0,
                                            static_cast<int>(random() % 40) - 30);
    store_element(tensor.view.data, tensor.view.dtype, at, value);
  });
}

TEST(HostCopy, EqualsOneElementAtATime) {
  const std::uint64_t seed = std::random_device{}();
  std::mt19937_64 random(seed);
  for (int trial = 0; trial < 2000; ++trial) {
    const Shape shape = random_shape(random);
    Strided from(kDTypes[random() % kDTypes.size()], shape, random);
    Strided to(kDTypes[random() % kDTypes.size()], shape, random);
    SCOPED_TRACE(fmt::format("seed {} trial {}: {} {} {} -> {} {}", seed, trial,
                             name(from.view.dtype), shape.to_string(),
                             from.view.strides.to_string(), name(to.view.dtype),
                             to.view.strides.to_string()));
    fill(from, !is_floating(from.view.dtype) || !is_floating(to.view.dtype), random);
    Strided expected = to;
    expected.view.data = expected.memory.data();
    for_each_element(from.view, to.view, [&](std::int64_t a, std::int64_t b) {
      store_element(expected.view.data, to.view.dtype, b,
                    load_element(from.view.data, from.view.dtype, a));
    });
    copy(from.view, to.view);
    ASSERT_EQ(to.memory, expected.memory);
  }
}

TEST(HostCopy, EqualDtypesKeepEveryBit) {
  std::mt19937_64 random(std::random_device{}());
  for (const DType dtype : kDTypes) {
    Strided from(dtype, {7, 5, 9}, random), to(dtype, {7, 5, 9}, random);
    for (std::uint8_t& byte : from.memory) byte = static_cast<std::uint8_t>(random());
    copy(from.view, to.view);
    const auto bytes = static_cast<std::size_t>(size_bytes(dtype));
    for_each_element(from.view, to.view, [&](std::int64_t a, std::int64_t b) {
      ASSERT_EQ(std::memcmp(from.memory.data() + static_cast<std::size_t>(a) * bytes,
                            to.memory.data() + static_cast<std::size_t>(b) * bytes, bytes),
                0);
    });
  }
}

// Long rows take the vector path: every pattern must come out as the scalar conversion says.
TEST(HostCopy, EveryHalfConvertsAsTheScalarDoes) {
  std::vector<std::uint16_t> halves(65536), back(65536);
  std::iota(halves.begin(), halves.end(), std::uint16_t{0});
  std::vector<float> wide(65536);
  for (const DType dtype : {DType::f16, DType::bf16}) {
    const Shape shape{65536};
    copy(ConstTensorView(halves.data(), dtype, shape), TensorView(wide.data(), DType::f32, shape));
    copy(ConstTensorView(wide.data(), DType::f32, shape), TensorView(back.data(), dtype, shape));
    for (std::size_t i = 0; i < halves.size(); ++i) {
      const float expected =
          dtype == DType::f16 ? f16_to_float(halves[i]) : bf16_to_float(halves[i]);
      ASSERT_EQ(std::memcmp(&wide[i], &expected, sizeof expected), 0) << i;
      ASSERT_EQ(back[i], dtype == DType::f16 ? float_to_f16(expected) : float_to_bf16(expected));
    }
  }
}

TEST(HostCopy, RandomFloatsNarrowAsTheScalarDoes) {
  std::mt19937_64 random(std::random_device{}());
  std::vector<float> wide(100'000);
  for (float& value : wide) value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
  std::vector<std::uint16_t> narrow(wide.size());
  const Shape shape{static_cast<std::int64_t>(wide.size())};
  for (const DType dtype : {DType::f16, DType::bf16}) {
    copy(ConstTensorView(wide.data(), DType::f32, shape), TensorView(narrow.data(), dtype, shape));
    for (std::size_t i = 0; i < wide.size(); ++i) {
      ASSERT_EQ(narrow[i], dtype == DType::f16 ? float_to_f16(wide[i]) : float_to_bf16(wide[i]));
    }
  }
}

TEST(HostCopy, AccumulatesAnyStrides) {
  std::mt19937_64 random(std::random_device{}());
  for (int trial = 0; trial < 300; ++trial) {
    const Shape shape = random_shape(random);
    Strided from(DType::f32, shape, random), into(DType::f32, shape, random);
    fill(from, false, random);
    fill(into, false, random);
    Strided expected = into;
    auto* sums = reinterpret_cast<float*>(expected.memory.data());
    for_each_element(from.view, into.view, [&](std::int64_t a, std::int64_t b) {
      sums[b] += static_cast<const float*>(from.view.data)[a];
    });
    accumulate(from.view, into.view);
    ASSERT_EQ(into.memory, expected.memory);
  }
}

}  // namespace
}  // namespace annulus
