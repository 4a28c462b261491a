#include "runtime/distributed_tensor.hpp"

#include <gtest/gtest.h>

#include "kernels/error.hpp"

namespace annulus {
namespace {

TensorLayout sequence_layout(const Shape& shape, int ranks) {
  return {shape, NamedSharding(Mesh({{"sp", ranks}}, ranks), PartitionSpec::parse("(-, sp)"))};
}

double number(std::span<const std::int64_t> index) {
  return static_cast<double>(index[0] * 10 + index[1]);
}

TEST(Tensor, OwnsAlignedMemoryAlsoWithoutElements) {
  Tensor tensor(DType::f16, {2, 3});
  EXPECT_TRUE(static_cast<bool>(tensor));
  EXPECT_EQ(tensor.view().strides, (Shape{3, 1}));
  EXPECT_TRUE(static_cast<bool>(Tensor(DType::f32, {0, 3})));
  EXPECT_FALSE(static_cast<bool>(Tensor()));
}

TEST(Tensor, BorrowsWithoutCopying) {
  float values[4] = {1, 2, 3, 4};
  Tensor tensor = Tensor::borrow({values, DType::f32, Shape{4}});
  static_cast<float*>(tensor.view().data)[2] = 7;
  EXPECT_EQ(values[2], 7);
}

TEST(Tensor, CopyIsRowMajorAndConverts) {
  const float values[6] = {1, 2, 3, 4, 5, 6};
  const ConstTensorView view(values, DType::f32, Shape{2, 3});
  const Tensor turned = Tensor::copy_of(view.transposed(0, 1), DType::f64);
  EXPECT_EQ(turned.shape(), (Shape{3, 2}));
  const auto* copied = static_cast<const double*>(turned.view().data);
  EXPECT_EQ(std::vector<double>(copied, copied + 6), (std::vector<double>{1, 4, 2, 5, 3, 6}));
}

TEST(Tensor, MovesItsMemory) {
  Tensor first(DType::f32, {4});
  const void* data = first.view().data;
  const Tensor second = std::move(first);
  EXPECT_EQ(second.view().data, data);
}

TEST(Tensor, RefusesSizesBeyondSixtyThreeBits) {
  const std::int64_t huge = std::int64_t{1} << 31;
  EXPECT_THROW(Tensor(DType::f64, Shape{huge, huge}), Error);
  EXPECT_THROW(Tensor(DType::u8, Shape{huge, huge, huge}), Error);
}

TEST(DistributedTensor, IsFilledByGlobalIndex) {
  const auto tensor = DistributedTensor::filled(DType::bf16, sequence_layout({2, 5}, 3), 1, number);
  EXPECT_EQ(tensor.local().shape, (Shape{2, 2}));
  const Tensor exact = Tensor::copy_of(tensor.local(), DType::f64);
  const auto* values = static_cast<const double*>(exact.view().data);
  EXPECT_EQ(std::vector<double>(values, values + 4), (std::vector<double>{2, 3, 12, 13}));
}

TEST(DistributedTensor, IsFilledInTheOrderOfItsRuns) {
  const TensorLayout zigzag = sequence_layout({1, 8}, 2).with_runs(1, {{{6, 8}, {0, 2}}, {{2, 6}}});
  const auto tensor = DistributedTensor::filled(DType::f64, zigzag, 0, number);
  const auto* values = static_cast<const double*>(tensor.local().data);
  EXPECT_EQ(std::vector<double>(values, values + 4), (std::vector<double>{6, 7, 0, 1}));
}

TEST(DistributedTensor, RefusesAShardOfAnotherShape) {
  try {
    DistributedTensor(Tensor(DType::f32, {2, 3}), sequence_layout({2, 5}, 3), 1);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::bad_data);
    EXPECT_EQ(std::string(error.what()),
              "tensor: rank 1 holds [2, 3] of [2, 5] (-, sp) over sp=3, expected [2, 2]");
  }
}

}  // namespace
}  // namespace annulus
