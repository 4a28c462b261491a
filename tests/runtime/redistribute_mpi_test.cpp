#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "runtime/context.hpp"
#include "runtime/redistribute.hpp"
#include "tests/runtime/redistribute_checks.hpp"
#include "tests/sharding/random_layout.hpp"

namespace annulus {
namespace {

/// The seed of rank 0: each process draws its own.
std::uint64_t common_seed(Communicator& world) {
  const std::uint64_t mine = testing::fresh_seed();
  std::vector<std::uint64_t> all(static_cast<std::size_t>(world.size()));
  world.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  return all.front();
}

TEST(RedistributeMpi, RandomLayouts) {
  Context context;
  const std::uint64_t seed = common_seed(context.world());
  testing::check_random_redistributions(context.world(), seed, 150);
  testing::check_random_sums(context.world(), seed, 100);
}

TEST(RedistributeMpi, MegabytesInPieces) {
  Context context(MpiOptions{.chunk_bytes = 4096});
  const Mesh mesh({{"sp", context.size()}}, context.size());
  const Shape shape = {2, 1003, 64};
  const TensorLayout rows(shape, NamedSharding(mesh, PartitionSpec::parse("(-, sp)")));
  const TensorLayout columns(shape, NamedSharding(mesh, PartitionSpec::parse("(-, -, sp)")));
  const auto value = [](std::span<const std::int64_t> i) {
    return static_cast<double>((i[0] * 1003 + i[1]) * 64 + i[2]);
  };
  const auto tensor = DistributedTensor::filled(DType::f32, rows, context.rank(), value);
  const DistributedTensor turned = redistribute(tensor, columns, context.world());
  const auto wanted = DistributedTensor::filled(DType::f32, columns, context.rank(), value);
  const auto bytes = static_cast<std::size_t>(turned.local().shape.elements()) * sizeof(float);
  EXPECT_EQ(std::memcmp(turned.local().data, wanted.local().data, bytes), 0);
}

}  // namespace
}  // namespace annulus
