#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
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

TEST_F(DeviceMemory, AccumulatesOtherDTypesIntoFloats) {
  const Shape shape{3, 5, 8};
  const std::vector<float> more = random_floats(shape.elements(), 5);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f64}) {
    const Buffer memory(Device::cuda, shape.elements() * size_bytes(dtype));
    const TensorView from(memory.data(), dtype, shape, Device::cuda);
    copy(ConstTensorView(more.data(), DType::f32, shape), from);
    std::vector<float> rounded(more.size());
    copy(from, TensorView(rounded.data(), DType::f32, shape));
    Mirror into(shape, 6);
    kernels::cuda::accumulate(from, into.view(), {});
    for (std::size_t i = 0; i < rounded.size(); ++i) into.host[i] += rounded[i];
    EXPECT_EQ(into.fetched(), into.host) << name(dtype);
  }
}

// Rows and heads of a tensor.
struct Part {
  Span rows;
  Span heads;

  template <typename View>
  View of(const View& view) const {
    return view.slice(1, rows).slice(2, heads);
  }
};

// The same bytes on the host and on the device.
struct Twins {
  std::vector<float> values;
  Buffer memory;
  TensorView host;
  TensorView device;

  Twins(DType dtype, const Shape& shape, std::uint32_t seed)
      : values(random_floats(shape.elements() * size_bytes(dtype) / 4 + 1, seed)),
        memory(Device::cuda, shape.elements() * size_bytes(dtype)),
        host(values.data(), dtype, shape),
        device(memory.data(), dtype, shape, Device::cuda) {
    copy(std::as_const(host), device);
  }
  void expect_equal() const {
    std::vector<float> fetched(values.size());
    copy(std::as_const(device), TensorView(fetched.data(), device.dtype, device.shape));
    EXPECT_EQ(std::memcmp(fetched.data(), values.data(), static_cast<std::size_t>(memory.bytes())),
              0);
  }
};

// So that words of every width are as wide as they can be; what lies beside stays as it was.
TEST_F(DeviceMemory, CopiesAndAddsPartsOfTensors) {
  const std::uint32_t seed = std::random_device{}();
  std::mt19937 random(seed);
  const auto below = [&](std::int64_t end) {
    return std::uniform_int_distribution<std::int64_t>(0, end - 1)(random);
  };
  const auto one_of = [&](const auto& list) {
    return list[static_cast<std::size_t>(below(static_cast<std::int64_t>(list.size())))];
  };
  const std::array dtypes{DType::u8, DType::bf16, DType::f32, DType::f64};
  const std::array<std::int64_t, 5> dims{1, 6, 8, 20, 64};
  for (int round = 0; round < 200; ++round) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed << ", round " << round);
    const DType dtype = one_of(dtypes);
    const Shape shape{1 + below(3), 1 + below(40), 1 + below(9), one_of(dims)};
    const auto twin_seed = static_cast<std::uint32_t>(random());
    const Twins from(dtype, shape, twin_seed), to(dtype, shape, twin_seed + 1);
    const std::int64_t rows = 1 + below(shape[1]), heads = 1 + below(shape[2]);
    const auto part = [&] {
      const std::int64_t row = below(shape[1] - rows + 1), head = below(shape[2] - heads + 1);
      return Part{{row, row + rows}, {head, head + heads}};
    };
    const Part read = part(), written = part();
    const bool adds = dtype == DType::f32 && round % 2 == 0;
    const auto move = adds ? accumulate : static_cast<decltype(&accumulate)>(copy);
    move(read.of(from.host), written.of(to.host), {});
    move(read.of(from.device), written.of(to.device), {});
    to.expect_equal();
  }
}

// A fill of 1 GiB takes a third of a millisecond on an H100; the host's clock is met to some
// microseconds where nothing takes the processor away, so that much less is asked for.
TEST_F(DeviceMemory, MarksOfAStreamLieOnTheHostsClock) {
  constexpr std::int64_t kSlackNs = 100'000;
  const auto host_ns = [] {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  };
  const Buffer memory(Device::cuda, std::int64_t{1} << 30);
  synchronize(Device::cuda, {});
  for (int round = 0; round < 5; ++round) {
    const std::int64_t begin = host_ns();
    const kernels::cuda::StreamMark first({});
    fill_bytes(memory.data(), Device::cuda, round, memory.bytes());
    const kernels::cuda::StreamMark second({});
    const std::int64_t ended = second.wait_ns();
    const std::int64_t end = host_ns();
    EXPECT_GT(first.wait_ns(), begin - kSlackNs);
    EXPECT_GT(ended - first.wait_ns(), 100'000);  // 10 TB/s
    EXPECT_LT(ended, end + kSlackNs);
  }
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

// Rows of whole 16-byte pieces, with the pieces of other heads and columns beside them NaN. A
// thread's next row is one of the same query's, or not.
TEST_F(DeviceState, RowSumsOfSixteenBitRowsMatchTheHost) {
  constexpr std::int64_t kSeq = 131;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const std::int64_t dim : {8, 64, 72, 96, 128, 192, 256}) {
      const std::int64_t heads = dim == 72 || dim == 128 ? 37 : 3;
      const Shape wanted{2, kSeq, heads, dim};
      const Shape stored{2, heads + 2, kSeq, dim + 8};
      const std::vector<float> nans(static_cast<std::size_t>(stored.elements()), NAN);
      Buffer memory[2] = {{Device::cuda, stored.elements() * 2},
                          {Device::cuda, stored.elements() * 2}};
      std::vector<float> values[2];
      TensorView rows[2];
      for (int i = 0; i < 2; ++i) {
        const TensorView all(memory[i].data(), dtype, stored, Device::cuda);
        copy(ConstTensorView(nans.data(), DType::f32, stored), all);
        rows[i] = all.transposed(1, 2).slice(2, {1, 1 + heads}).slice(3, {8, 8 + dim});
        values[i] = random_floats(wanted.elements(), static_cast<std::uint32_t>(dim + i));
        copy(ConstTensorView(values[i].data(), DType::f32, wanted), rows[i]);
        copy(rows[i], TensorView(values[i].data(), DType::f32, wanted));  // as rounded
      }
      Mirror delta(Shape{2, kSeq, heads}, 19);
      attention_delta(rows[0], rows[1], delta.view().transposed(1, 2));
      const std::vector<float> actual = delta.fetched();
      for (std::size_t row = 0; row < actual.size(); ++row) {
        double sum = 0.0;
        for (std::size_t i = row * dim; i < (row + 1) * dim; ++i) {
          sum += static_cast<double>(values[0][i]) * values[1][i];
        }
        ASSERT_NEAR(actual[row], sum, 1e-4) << name(dtype) << " " << dim << ", row " << row;
      }
    }
  }
}

}  // namespace
}  // namespace annulus
