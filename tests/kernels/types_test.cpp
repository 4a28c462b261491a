#include "kernels/types.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/error.hpp"

namespace annulus {
namespace {

TEST(Shape, ElementsAreCheckedIn64Bits) {
  EXPECT_EQ((Shape{2, 3, 4}).elements(), 24);
  EXPECT_EQ((Shape{0, 1LL << 40, 1LL << 30}).elements(), 0);
  EXPECT_THROW((void)(Shape{1LL << 40, 1LL << 24}).elements(), Error);
  EXPECT_EQ((Shape{2, 8, 3, 64}).to_string(), "[2, 8, 3, 64]");
}

TEST(DType, NamesParseBack) {
  for (const DType dtype :
       {DType::f32, DType::f16, DType::bf16, DType::f64, DType::u8, DType::i32, DType::i64}) {
    EXPECT_EQ(parse_dtype(name(dtype)), dtype);
  }
  EXPECT_FALSE(parse_dtype("float32").has_value());
}

TEST(TensorView, SlicesAndTransposesTheSameMemory) {
  std::vector<float> data(24);
  std::iota(data.begin(), data.end(), 0.0F);
  const TensorView view(data.data(), DType::f32, Shape{2, 3, 4});
  const TensorView part = view.slice(1, {1, 3}).slice(0, {1, 2});
  EXPECT_EQ(part.shape, (Shape{1, 2, 4}));
  EXPECT_EQ(*static_cast<float*>(part.data), 16.0F);
  EXPECT_TRUE(part.is_contiguous());  // an extent of 1 has no stride to respect
  const TensorView turned = view.transposed(0, 2);
  EXPECT_EQ(turned.shape, (Shape{4, 3, 2}));
  EXPECT_FALSE(turned.is_contiguous());
  EXPECT_THROW((void)view.slice(1, {2, 4}), Error);
}

TEST(Copy, MovesStridesAndConvertsDTypes) {
  std::vector<float> data(24);
  std::iota(data.begin(), data.end(), -7.0F);
  const ConstTensorView from(data.data(), DType::f32, Shape{2, 3, 4});
  std::vector<double> turned(24, -999.0);
  copy(from.transposed(0, 1), TensorView(turned.data(), DType::f64, Shape{3, 2, 4}));
  for (std::size_t a = 0; a < 2; ++a) {
    for (std::size_t b = 0; b < 3; ++b) {
      for (std::size_t c = 0; c < 4; ++c) {
        EXPECT_EQ(turned[(b * 2 + a) * 4 + c], static_cast<double>(data[(a * 3 + b) * 4 + c]));
      }
    }
  }
  EXPECT_THROW(copy(from, TensorView(turned.data(), DType::f64, Shape{3, 2, 4})), Error);
}

TEST(Buffer, MovesItsMemory) {
  Buffer first(Device::cpu, 100);
  void* data = first.data();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 64, 0U);
  Buffer second = std::move(first);
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(Buffer(Device::cpu, 0).data(), nullptr);
  EXPECT_THROW(Buffer(Device::cpu, 1LL << 60), Error);
}

}  // namespace
}  // namespace annulus
