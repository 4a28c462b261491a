#include <gtest/gtest.h>

#include "kernels/cuda_support.hpp"
#include "tests/runtime/redistribute_checks.hpp"
#include "tests/sharding/random_layout.hpp"
#include "tests/sharding/thread_communicator.hpp"

namespace annulus {
namespace {

/// Device shards of ranks that talk over the host.
TEST(RedistributeCuda, RandomLayoutsOverThreads) {
  if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no GPU here";
  for (const int ranks : {1, 2, 3, 4, 6}) {
    testing::run_ranks(ranks, [](Communicator& all) {
      kernels::cuda::use_device(0);
      testing::check_random_redistributions(all, testing::fresh_seed(), 30, Device::cuda);
      testing::check_random_sums(all, testing::fresh_seed(), 30, Device::cuda);
    });
  }
}

}  // namespace
}  // namespace annulus
