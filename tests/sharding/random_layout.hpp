#pragma once

#include <cstdint>
#include <random>

#include "sharding/tensor_layout.hpp"

namespace annulus::testing {

/// The seed of this run: ANNULUS_TEST_SEED if it is set, else a fresh one, the same on all ranks
/// that read it from one process. Print it with every failure.
std::uint64_t fresh_seed();

/// A mesh of up to three axes with random sizes.
Mesh random_mesh(int ranks, std::mt19937_64& random);

/// One to four extents, biased to 0, 1 and numbers that do not divide.
Shape random_shape(std::mt19937_64& random);

/// Any spec over any mesh: axes in any order on any dimension or unused, dimensions dealt in chunks
/// in any order, some shared by several parts; now and then all on one rank.
TensorLayout random_layout(const Shape& shape, int ranks, std::mt19937_64& random);

}  // namespace annulus::testing
