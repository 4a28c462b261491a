#include "tests/runtime/redistribute_checks.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "runtime/redistribute.hpp"
#include "sharding/redistribution.hpp"
#include "tests/sharding/random_layout.hpp"

namespace annulus::testing {
namespace {

using Bytes = std::vector<std::uint8_t>;

/// The bytes of an element follow from its global number: NaNs and huge integers among them.
std::uint64_t pattern(std::uint64_t number) {
  std::uint64_t x = number + 0x9E3779B97F4A7C15U;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31);
}

/// `bytes` of `value(number)` for each element of a shard.
template <typename Value>
Bytes bytes_by_number(const TensorLayout& layout, int rank, std::size_t bytes, const Value& value) {
  const Shape local = layout.local_shape(rank);
  Bytes result(static_cast<std::size_t>(local.elements()) * bytes);
  for (std::int64_t i = 0; i < local.elements(); ++i) {
    std::int64_t rest = i, number = 0, stride = 1;
    for (int dim = local.rank() - 1; dim >= 0; --dim) {
      number += layout.global_index(rank, dim, rest % local[dim]) * stride;
      stride *= layout.global_shape()[dim];
      rest /= local[dim];
    }
    const std::uint64_t bits = value(static_cast<std::uint64_t>(number));
    std::memcpy(result.data() + static_cast<std::size_t>(i) * bytes, &bits, bytes);
  }
  return result;
}

Bytes expected_bytes(const TensorLayout& layout, int rank, DType dtype) {
  return bytes_by_number(layout, rank, static_cast<std::size_t>(size_bytes(dtype)), pattern);
}

/// A poisoned shard; with `turned` its first and last dimensions are exchanged in memory.
DistributedTensor poisoned(const TensorLayout& layout, int rank, DType dtype, Device device,
                           bool turned) {
  Shape shape = layout.local_shape(rank);
  const int last = shape.rank() - 1;
  if (turned) std::swap(shape[0], shape[last]);
  Buffer buffer(device, std::max<std::int64_t>(shape.elements() * size_bytes(dtype), 1));
  fill_bytes(buffer.data(), device, 0xA5, buffer.bytes());
  const TensorView memory(buffer.data(), dtype, shape, device);
  const TensorView view = turned ? memory.transposed(0, last) : memory;
  return {Tensor(std::move(buffer), view), layout, rank};
}

void write(const Bytes& bytes, DistributedTensor& tensor) {
  const TensorView view = tensor.local();
  copy(ConstTensorView(bytes.data(), view.dtype, view.shape), view);
}

Bytes read(const DistributedTensor& tensor) {
  const ConstTensorView view = tensor.local();
  Bytes bytes(static_cast<std::size_t>(view.shape.elements() * size_bytes(view.dtype)));
  copy(view, TensorView(bytes.data(), view.dtype, view.shape));
  return bytes;
}

std::int64_t bytes_to_others(const TensorLayout& from, const TensorLayout& to, int rank,
                             DType dtype) {
  std::int64_t elements = 0;
  for (const ShardTransfer& send : plan_redistribution(from, to, rank).sends) {
    if (send.peer != rank) elements += send.message_shape().elements();
  }
  return elements * size_bytes(dtype);
}

void check_trip(Communicator& ranks, const DistributedTensor& from, DistributedTensor& to) {
  const std::int64_t before = ranks.bytes_sent();
  redistribute_into(from, to, ranks);
  EXPECT_EQ(ranks.bytes_sent() - before,
            bytes_to_others(from.layout(), to.layout(), ranks.rank(), from.dtype()));
  EXPECT_EQ(read(to), expected_bytes(to.layout(), ranks.rank(), to.dtype()));
}

void check_gather(Communicator& ranks, const DistributedTensor& tensor, int root) {
  const Mesh& mesh = tensor.layout().mesh();
  const auto whole = expected_bytes(TensorLayout::only_on(root, tensor.global_shape(), mesh), root,
                                    tensor.dtype());
  const auto bytes_of = [&](const Tensor& gathered) {
    const Tensor host = Tensor::copy_of(gathered.view(), std::nullopt, Device::cpu);
    const auto* data = static_cast<const std::uint8_t*>(host.view().data);
    return Bytes(data, data + whole.size());
  };
  const Tensor all = gather(tensor, ranks);
  EXPECT_EQ(bytes_of(all), whole);
  const Tensor one = gather(tensor, ranks, root);
  EXPECT_EQ(static_cast<bool>(one), ranks.rank() == root);
  if (one) {
    EXPECT_EQ(bytes_of(one), whole);
  }
}

/// What `rank` gives to the sum of element `number`; sums round, so that the order shows.
float share(std::int64_t number, int rank) {
  const std::uint64_t bits = pattern(static_cast<std::uint64_t>(number * 64 + rank));
  return static_cast<float>(bits % 2'000'003) * 1e-3F - 1000.0F;
}

std::vector<std::int64_t> numbers_of(const TensorLayout& layout, int rank) {
  const Bytes bytes = bytes_by_number(layout, rank, sizeof(std::int64_t),
                                      [](std::uint64_t number) { return number; });
  std::vector<std::int64_t> numbers(bytes.size() / sizeof(std::int64_t));
  if (!bytes.empty()) std::memcpy(numbers.data(), bytes.data(), bytes.size());
  return numbers;
}

/// Sums of `rank`'s elements over the ranks at its own coordinates along unused axes.
std::vector<float> expected_sums(const TensorLayout& layout, int rank) {
  const std::vector<std::int64_t> numbers = numbers_of(layout, rank);
  std::vector<float> sums(numbers.size(), 0.0F);
  const AxisTuple unused = layout.sharding().unused_axes();
  for (int other = 0; other < layout.mesh().ranks(); ++other) {
    if (layout.mesh().group_index(other, unused) != layout.mesh().group_index(rank, unused)) {
      continue;
    }
    const std::vector<std::int64_t> theirs = numbers_of(layout, other);
    const std::set<std::int64_t> held(theirs.begin(), theirs.end());
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      if (held.contains(numbers[i])) sums[i] += share(numbers[i], other);
    }
  }
  return sums;
}

}  // namespace

void check_random_sums(Communicator& ranks, std::uint64_t seed, int trials, Device device) {
  std::mt19937_64 random(seed);
  for (int trial = 0; trial < trials; ++trial) {
    const TensorLayout layout = random_layout(random_shape(random), ranks.size(), random);
    SCOPED_TRACE(
        fmt::format("seed {} trial {} rank {}: {}", seed, trial, ranks.rank(), layout.to_string()));
    DistributedTensor tensor =
        poisoned(layout, ranks.rank(), DType::f32, device, random() % 2 == 0);
    std::vector<float> mine;
    for (const std::int64_t number : numbers_of(layout, ranks.rank())) {
      mine.push_back(share(number, ranks.rank()));
    }
    const TensorView view = tensor.local();
    copy(ConstTensorView(mine.data(), DType::f32, view.shape), view);
    sum_shared(tensor, ranks);
    copy(view, TensorView(mine.data(), DType::f32, view.shape));
    EXPECT_EQ(mine, layout.root() ? mine : expected_sums(layout, ranks.rank()));
    if (::testing::Test::HasFailure()) return;
  }
}

void check_random_redistributions(Communicator& ranks, std::uint64_t seed, int trials,
                                  Device device) {
  constexpr std::array kDTypes = {DType::f32, DType::f16, DType::bf16, DType::f64,
                                  DType::u8,  DType::i32, DType::i64};
  std::mt19937_64 random(seed);
  for (int trial = 0; trial < trials; ++trial) {
    const DType dtype = kDTypes[static_cast<std::size_t>(trial) % kDTypes.size()];
    const Shape shape = random_shape(random);
    const TensorLayout a = random_layout(shape, ranks.size(), random);
    const TensorLayout b = random_layout(shape, ranks.size(), random);
    SCOPED_TRACE(fmt::format("seed {} trial {} rank {}: {} {} -> {}", seed, trial, ranks.rank(),
                             name(dtype), a.to_string(), b.to_string()));
    DistributedTensor first = poisoned(a, ranks.rank(), dtype, device, random() % 2 == 0);
    DistributedTensor second = poisoned(b, ranks.rank(), dtype, device, random() % 2 == 0);
    DistributedTensor back = poisoned(a, ranks.rank(), dtype, device, random() % 2 == 0);
    write(expected_bytes(a, ranks.rank(), dtype), first);
    check_trip(ranks, first, second);
    check_trip(ranks, second, back);
    check_gather(ranks, back, static_cast<int>(random() % static_cast<unsigned>(ranks.size())));
    if (::testing::Test::HasFailure()) return;
  }
}

}  // namespace annulus::testing
