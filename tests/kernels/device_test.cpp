#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"
#include "kernels/cuda_support.hpp"

// What stands beside the attention kernels on a device, held against the host's. Needs a GPU:
//   build/test_kernels --gtest_filter='Device*'
namespace annulus {
namespace {

std::vector<float> random_floats(std::int64_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// A tensor on the device with a host copy of the same values.
struct Mirror {
  std::vector<float> host;
  Shape shape;
  Buffer memory;

  Mirror(const Shape& shape_, std::uint32_t seed)
      : host(random_floats(shape_.elements(), seed)),
        shape(shape_),
        memory(Device::cuda, shape_.elements() * 4) {
    copy(host_view(), view());
  }
  TensorView host_view() { return {host.data(), DType::f32, shape}; }
  TensorView view() const { return {memory.data(), DType::f32, shape, Device::cuda}; }
  std::vector<float> fetched() const {
    std::vector<float> values(host.size(), NAN);
    copy(view(), TensorView(values.data(), DType::f32, shape));
    return values;
  }
};

class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no GPU here";
  }
};
class DeviceMemory : public DeviceTest {};
class DeviceState : public DeviceTest {};

void expect_near(const std::vector<float>& actual, const std::vector<float>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (std::isinf(expected[i])) {
      EXPECT_EQ(actual[i], expected[i]) << i;
    } else {
      EXPECT_NEAR(actual[i], expected[i], 1e-5 * (1.0 + std::abs(expected[i]))) << i;
    }
  }
}

TEST_F(DeviceMemory, CopiesAnyStridesAndDTypesBothWays) {
  const Shape shape{2, 5, 3, 8};
  std::vector<float> values = random_floats(shape.elements(), 1);
  const ConstTensorView host(values.data(), DType::f32, shape);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    for (const bool turned : {false, true}) {
      const Buffer memory(Device::cuda, shape.elements() * size_bytes(dtype));
      const Shape stored{2, 3, 5, 8};
      const TensorView plain(memory.data(), dtype, turned ? stored : shape, Device::cuda);
      const TensorView device = turned ? plain.transposed(1, 2) : plain;
      copy(host, device);
      std::vector<float> back(values.size(), NAN), wanted(values.size(), NAN);
      copy(device, TensorView(back.data(), DType::f32, shape));
      std::vector<double> rounded(values.size());
      const TensorView through(rounded.data(), dtype, shape);
      copy(host, through);
      copy(through, TensorView(wanted.data(), DType::f32, shape));
      EXPECT_EQ(back, wanted) << name(dtype) << turned;
      // And on the device: turned about, to f32.
      Mirror other(Shape{5, 2, 3, 8}, 2);
      copy(device, other.view().transposed(0, 1));
      std::vector<float> from_device(values.size(), NAN);
      copy(other.view().transposed(0, 1), TensorView(from_device.data(), DType::f32, shape));
      EXPECT_EQ(from_device, wanted) << name(dtype) << turned;
    }
  }
}

TEST_F(DeviceMemory, AccumulatesStridedViews) {
  Mirror from(Shape{4, 6}, 3), into(Shape{6, 4}, 4);
  accumulate(from.host_view().transposed(0, 1), into.host_view());
  accumulate(from.view().transposed(0, 1), into.view());
  EXPECT_EQ(into.fetched(), into.host);
}

TEST_F(DeviceState, MergesAndFinishesLikeTheHost) {
  const Shape rows{2, 7, 3, 40};
  const Shape statistics{2, 3, 7};
  Mirror o1(rows, 5), o2(rows, 6), max1(statistics, 7), max2(statistics, 8), sum1(statistics, 9),
      sum2(statistics, 10), o(rows, 11), lse(statistics, 12);
  for (float& value : sum1.host) value = std::abs(value) + 0.5F;
  for (float& value : sum2.host) value = std::abs(value) + 0.5F;
  for (std::size_t i = 0; i < 10; ++i) {  // rows 0..4 empty on both sides, 5..9 on one
    (i < 5 ? max1 : max2).host[i] = -INFINITY;
    if (i < 5) max2.host[i] = -INFINITY;
  }
  for (Mirror* mirror : {&max1, &max2, &sum1, &sum2}) copy(mirror->host_view(), mirror->view());
  merge({o2.host_view(), max2.host_view(), sum2.host_view()},
        {o1.host_view(), max1.host_view(), sum1.host_view()});
  finish({o1.host_view(), max1.host_view(), sum1.host_view()}, o.host_view(), lse.host_view());
  const AttentionState into{o1.view(), max1.view(), sum1.view()};
  merge({o2.view(), max2.view(), sum2.view()}, into);
  finish(into, o.view(), lse.view());
  expect_near(o1.fetched(), o1.host);
  expect_near(max1.fetched(), max1.host);
  expect_near(sum1.fetched(), sum1.host);
  expect_near(o.fetched(), o.host);
  expect_near(lse.fetched(), lse.host);
}

TEST_F(DeviceState, RowSumsAndSinkGradientsMatchTheHost) {
  const Shape rows{2, 700, 3, 40};
  Mirror o(rows, 13), grad_o(rows, 14), delta(Shape{2, 3, 700}, 15), lse(Shape{2, 3, 700}, 16),
      sinks(Shape{3}, 17), grad_sinks(Shape{3}, 18);
  attention_delta(o.host_view(), grad_o.host_view(), delta.host_view());
  attention_delta(o.view(), grad_o.view(), delta.view());
  attention_sink_gradient(sinks.host_view(), lse.host_view(), delta.host_view(),
                          grad_sinks.host_view());
  attention_sink_gradient(sinks.view(), lse.view(), delta.view(), grad_sinks.view());
  const std::vector<float> actual = delta.fetched();
  for (std::size_t i = 0; i < actual.size(); ++i) EXPECT_NEAR(actual[i], delta.host[i], 1e-4);
  const std::vector<float> gradients = grad_sinks.fetched();
  for (std::size_t h = 0; h < 3; ++h) {
    // Rounding of 1,400 fp32 terms: 1400·ε of the sum of magnitudes, some tens of thousands.
    EXPECT_NEAR(gradients[h], grad_sinks.host[h], 1e-4 * std::abs(grad_sinks.host[h]) + 0.05);
  }
}

}  // namespace
}  // namespace annulus
