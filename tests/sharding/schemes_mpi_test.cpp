#include <gtest/gtest.h>

#include <cstdlib>

#include "runtime/context.hpp"
#include "sharding/case_table.hpp"

namespace annulus {
namespace {

using namespace testing;

// Sums what ranks hold where each has filled its own part of a whole tensor and the rest is 0.
void join(Communicator& ranks, HostTensor& tensor) { ranks.all_reduce_sum(tensor.data); }

void clear_outputs(AttentionTensors& t) {
  for (HostTensor* output : {&t.o, &t.lse, &t.grad_q, &t.grad_k, &t.grad_v, &t.grad_bias}) {
    std::fill(output->data.begin(), output->data.end(), 0.0F);
  }
}

std::uint64_t seed_of_first_rank(Communicator& world) {
  const std::uint64_t mine = fresh_random_seed();
  std::vector<std::uint64_t> all(static_cast<std::size_t>(world.size()));
  world.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  return all.front();
}

bool full_matrix() { return std::getenv("ANNULUS_FULL_MATRIX") != nullptr; }

// One combination: every rank compares the whole.
void run_choice(Communicator& world, const AttentionCase& c, const SequenceLayout& layout,
                const Choice& choice, bool in_place, std::uint64_t seed,
                const AttentionTensors& expected) {
  SCOPED_TRACE(::testing::Message()
               << c.name << ", seed " << seed << ", " << name(choice.scheme) << " "
               << choice.node_ranks << (in_place ? ", in place" : ", messages"));
  const auto kv = c.seq_q == c.seq_kv ? layout : SequenceLayout::zigzag(c.seq_kv, world.size());
  auto request = request_of(c, choice.scheme, layout, kv);
  request->node_ranks = choice.node_ranks;
  AttentionTensors found = random_tensors(c, seed);
  clear_outputs(found);
  RunOptions options;
  options.execute.in_place = in_place;
  run_rank(world, c, request, found, options);
  join(world, found.o);
  for (HostTensor* g : {&found.grad_q, &found.grad_k, &found.grad_v}) join(world, *g);
  if (c.bias) join(world, found.grad_bias);
  found.lse = expected.lse;  // −inf does not sum; the gradients depend on it
  expect_equal(c, found, expected);
}

// Ranks that exchange heads need one each.
bool has_heads_for(const Choice& choice, int ranks, std::int64_t q_heads) {
  if (choice.scheme == Scheme::ulysses) return ranks <= q_heads;
  return choice.scheme != Scheme::hybrid || choice.node_ranks <= q_heads;
}

// The combinations of tests/sharding/schemes_test.cpp over MPI, every `stride`-th or all.
void run_over_mpi(const std::vector<AttentionCase>& cases, std::size_t stride) {
  Context context;
  Communicator& world = context.world();
  const std::uint64_t seed = seed_of_first_rank(world);
  if (full_matrix()) stride = 1;
  std::size_t number = seed % stride;
  for (const AttentionCase& c : cases) {
    AttentionTensors expected = random_tensors(c, seed);
    run_reference(c, expected);
    for (const SequenceLayout& layout : layouts(c, c.seq_q, world.size())) {
      for (const Choice& choice : choices(world.size())) {
        if (!has_heads_for(choice, world.size(), c.q_heads)) continue;
        for (const bool in_place : {true, false}) {
          if (number++ % stride == 0) {
            run_choice(world, c, layout, choice, in_place, seed, expected);
          }
        }
      }
    }
  }
}

TEST(SchemesMpi, EqualTheReferenceForEveryMask) { run_over_mpi(mask_cases(), 3); }

TEST(SchemesMpi, EqualTheReferenceForEveryFeature) { run_over_mpi(feature_cases(), 2); }

TEST(SchemesMpi, EqualTheReferenceForOddLengths) { run_over_mpi(length_cases(full_matrix()), 4); }

}  // namespace
}  // namespace annulus
