#include "tests/sharding/random_layout.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>

namespace annulus::testing {
namespace {

int below(int count, std::mt19937_64& random) {
  return std::uniform_int_distribution<int>(0, count - 1)(random);
}

int random_divisor(int number, std::mt19937_64& random) {
  int divisor = 0;
  do {
    divisor = 1 + below(number, random);
  } while (number % divisor != 0);
  return divisor;
}

PartitionSpec random_spec(int dims, const Mesh& mesh, std::mt19937_64& random) {
  std::vector<AxisTuple> entries(static_cast<std::size_t>(dims));
  std::vector<MeshAxis> axes(mesh.axes().begin(), mesh.axes().end());
  std::shuffle(axes.begin(), axes.end(), random);
  for (const MeshAxis& axis : axes) {
    const int dim = below(dims + 1, random);  // the last one: unused
    if (dim < dims) entries[static_cast<std::size_t>(dim)].push_back(axis.name);
  }
  return PartitionSpec(std::move(entries));
}

/// Cuts 0..extent into chunks, deals them to parts at random, some of them twice.
std::vector<Runs> random_runs(std::int64_t extent, int parts, std::mt19937_64& random) {
  Runs chunks;
  for (std::int64_t begin = 0; begin < extent;) {
    const std::int64_t end = std::min<std::int64_t>(begin + 1 + below(4, random), extent);
    chunks.push_back({begin, end});
    begin = end;
  }
  std::shuffle(chunks.begin(), chunks.end(), random);
  std::vector<Runs> runs(static_cast<std::size_t>(parts));
  const bool share = below(2, random) == 0;
  for (const Span chunk : chunks) {
    const auto first = static_cast<std::size_t>(below(parts, random));
    const auto second = static_cast<std::size_t>(below(parts, random));
    runs[first].push_back(chunk);
    if (share && second != first) runs[second].push_back(chunk);
  }
  return runs;
}

}  // namespace

std::uint64_t fresh_seed() {
  static const std::uint64_t seed = [] {
    const char* given = std::getenv("ANNULUS_TEST_SEED");
    return given != nullptr ? std::stoull(given) : std::random_device{}();
  }();
  return seed;
}

Mesh random_mesh(int ranks, std::mt19937_64& random) {
  const int first = random_divisor(ranks, random);
  const int second = random_divisor(ranks / first, random);
  return Mesh({{"a", first}, {"b", second}, {"c", -1}}, ranks);
}

Shape random_shape(std::mt19937_64& random) {
  constexpr std::array<std::int64_t, 9> kExtents = {0, 1, 1, 2, 3, 5, 7, 8, 12};
  std::vector<std::int64_t> dims;
  const int rank = 1 + below(4, random);
  for (int dim = 0; dim < rank; ++dim) {
    const std::int64_t extent = kExtents[static_cast<std::size_t>(below(9, random))];
    // Most shapes have elements.
    dims.push_back(extent == 0 && below(4, random) != 0 ? 4 : extent);
  }
  return Shape(dims);
}

TensorLayout random_layout(const Shape& shape, int ranks, std::mt19937_64& random) {
  const Mesh mesh = random_mesh(ranks, random);
  if (below(8, random) == 0) return TensorLayout::only_on(below(ranks, random), shape, mesh);
  TensorLayout layout(shape, NamedSharding(mesh, random_spec(shape.rank(), mesh, random)));
  for (int dim = 0; dim < shape.rank(); ++dim) {
    if (below(3, random) != 0) continue;
    layout = layout.with_runs(dim, random_runs(shape[dim], layout.sharding().parts(dim), random));
  }
  return layout;
}

}  // namespace annulus::testing
