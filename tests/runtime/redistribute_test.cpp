#include "runtime/redistribute.hpp"

#include <gtest/gtest.h>

#include "kernels/error.hpp"
#include "sharding/head_layout.hpp"
#include "tests/runtime/redistribute_checks.hpp"
#include "tests/sharding/random_layout.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus {
namespace {

TEST(Redistribute, RandomLayoutsOverThreads) {
  for (int ranks = 1; ranks <= 8; ++ranks) {
    testing::run_ranks(ranks, [](Communicator& all) {
      testing::check_random_redistributions(all, testing::fresh_seed(), 60);
    });
  }
}

TEST(SumShared, RandomLayoutsOverThreads) {
  for (int ranks = 1; ranks <= 8; ++ranks) {
    testing::run_ranks(ranks, [](Communicator& all) {
      testing::check_random_sums(all, testing::fresh_seed(), 60);
    });
  }
}

TEST(SumShared, SendsOnlyWhatIsShared) {
  testing::run_ranks(2, [](Communicator& all) {
    const TensorLayout even(
        {1, 4, 3, 2}, NamedSharding(Mesh::parse("tp=2", 2), PartitionSpec::parse("(-, -, tp)")));
    const TensorLayout heads = even.with_runs(2, HeadLayout(9, 3, 2).kv_runs());
    const auto one = [](std::span<const std::int64_t>) { return 1.0; };
    auto tensor = DistributedTensor::filled(DType::f32, heads, all.rank(), one);
    sum_shared(tensor, all);
    EXPECT_EQ(all.bytes_sent(), 4 * 2 * 4);  // 4 rows of the one head that both need
    const Tensor whole = gather(tensor, all);
    for (int i = 0; i < 24; ++i) {
      EXPECT_EQ(static_cast<const float*>(whole.view().data)[i], i / 2 % 3 == 1 ? 2.0F : 1.0F);
    }
    auto plain = DistributedTensor::filled(DType::f32, even, all.rank(), one);
    sum_shared(plain, all);
    EXPECT_EQ(static_cast<const float*>(plain.local().data)[0], 1.0F);
    DistributedTensor narrow(DType::f16, heads, all.rank());
    EXPECT_THROW(sum_shared(narrow, all), Error);
  });
}

TEST(Redistribute, LateRanksChangeNothing) {
  testing::run_ranks(4,
                     [](Communicator& all) {
                       testing::check_random_redistributions(all, testing::fresh_seed() + 1, 15);
                     },
                     {.delay_seed = testing::fresh_seed() | 1});
}

double number(std::span<const std::int64_t> index) {
  return static_cast<double>(index[0] * 100 + index[1]);
}

TEST(Redistribute, FromASequenceAxisToAHeadAxis) {
  testing::run_ranks(2, [](Communicator& all) {
    const Mesh mesh = Mesh::parse("sp=2", 2);
    const TensorLayout rows({3, 4}, NamedSharding(mesh, PartitionSpec::parse("(sp)")));
    const TensorLayout columns({3, 4}, NamedSharding(mesh, PartitionSpec::parse("(-, sp)")));
    const auto tensor = DistributedTensor::filled(DType::f32, rows, all.rank(), number);
    const DistributedTensor turned = redistribute(tensor, columns, all);
    ASSERT_EQ(turned.local().shape, (Shape{3, 2}));
    const auto* values = static_cast<const float*>(turned.local().data);
    for (int i = 0; i < 6; ++i) {
      EXPECT_EQ(values[i], static_cast<float>(i / 2 * 100 + i % 2 + 2 * all.rank()));
    }
  });
}

TEST(Redistribute, EmptyTensors) {
  testing::run_ranks(3, [](Communicator& all) {
    const Mesh mesh = Mesh::parse("sp=3", 3);
    const TensorLayout rows({0, 4}, NamedSharding(mesh, PartitionSpec::parse("(sp)")));
    const auto tensor = DistributedTensor::filled(DType::f16, rows, all.rank(), number);
    EXPECT_TRUE(static_cast<bool>(tensor));
    const Tensor whole = gather(tensor, all);
    EXPECT_TRUE(static_cast<bool>(whole));
    EXPECT_EQ(whole.shape(), (Shape{0, 4}));
    EXPECT_EQ(all.bytes_sent(), 0);
  });
}

TEST(Redistribute, RefusesWhatDoesNotFitTogether) {
  testing::run_ranks(2, [](Communicator& all) {
    const Mesh mesh = Mesh::parse("sp=2", 2);
    const auto layout = [&](const Shape& shape, const Mesh& over) {
      return TensorLayout(shape, NamedSharding(over, PartitionSpec()));
    };
    const DistributedTensor tensor(DType::f32, layout({4}, mesh), all.rank());
    EXPECT_THROW(redistribute(tensor, layout({5}, mesh), all), Error);
    EXPECT_THROW(redistribute(tensor, layout({4}, Mesh::parse("sp=4", 4)), all), Error);
    EXPECT_THROW(redistribute(DistributedTensor(), layout({4}, mesh), all), Error);
    EXPECT_THROW(gather(tensor, all, 2), Error);
    DistributedTensor other(DType::f16, layout({4}, mesh), all.rank());
    EXPECT_THROW(redistribute_into(tensor, other, all), Error);
    const DistributedTensor misplaced(DType::f32, layout({4}, mesh), 1 - all.rank());
    EXPECT_THROW(redistribute(misplaced, layout({4}, mesh), all), Error);
  });
}

}  // namespace
}  // namespace annulus
