#include "sharding/head_parts.hpp"

#include <gtest/gtest.h>

#include "sharding/case_table.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus {
namespace {

using namespace testing;

std::shared_ptr<PlanRequest> heads_request(std::int64_t q_heads, std::int64_t kv_heads, int ranks,
                                           std::int64_t seq = 64) {
  auto request = std::make_shared<PlanRequest>();
  request->scheme = Scheme::ulysses;
  request->q_layout = request->kv_layout = SequenceLayout::contiguous(seq, ranks);
  request->mask = make_slices({}, 1, seq, seq);
  request->q_heads = q_heads;
  request->kv_heads = kv_heads;
  return request;
}

// The parts of each rank follow each other and are its heads, and every query head comes with the
// KV head that serves it; also where the first of them lies inside a group.
TEST(HeadParts, AreAllHeadsOnce) {
  struct Heads {
    std::int64_t q, kv, group, offset;
  };
  for (const Heads& heads :
       {Heads{64, 8, 8, 0}, Heads{6, 6, 1, 0}, Heads{10, 5, 2, 0}, Heads{10, 3, 4, 2}}) {
    for (const int ranks : {1, 2, 5}) {
      const auto request = heads_request(heads.q, heads.kv, ranks);
      request->group_size = heads.group;
      request->q_head_offset = heads.offset;
      const AttentionPlan plan(request, 0);
      for (const int wanted : {1, 2, 3, 4, 7}) {
        const std::vector<HeadPart> parts = head_parts(plan, wanted);
        for (int rank = 0; rank < ranks; ++rank) {
          const auto r = static_cast<std::size_t>(rank);
          std::int64_t next_q = plan.q_heads_of(rank).begin;
          std::int64_t next_kv = plan.kv_heads_of(rank).begin;
          for (const HeadPart& part : parts) {
            EXPECT_EQ(part.q[r].begin, next_q);
            EXPECT_EQ(part.kv[r].begin, next_kv);
            next_q = part.q[r].end;
            next_kv = part.kv[r].end;
            EXPECT_FALSE(part.q[r].empty());
            EXPECT_EQ((part.q[r].begin + heads.offset) / heads.group, part.kv[r].begin);
            EXPECT_EQ((part.q[r].end - 1 + heads.offset) / heads.group, part.kv[r].end - 1);
          }
          EXPECT_EQ(next_q, plan.q_heads_of(rank).end);
          EXPECT_EQ(next_kv, plan.kv_heads_of(rank).end);
        }
      }
    }
  }
}

TEST(HeadParts, AreAsManyAsEveryRankCanMake) {
  const auto count = [](std::int64_t q_heads, std::int64_t kv_heads, int ranks, int wanted) {
    return head_parts(AttentionPlan(heads_request(q_heads, kv_heads, ranks), 0), wanted).size();
  };
  EXPECT_EQ(count(64, 8, 2, 4), 4U);
  EXPECT_EQ(count(64, 8, 2, 5), 1U);
  EXPECT_EQ(count(64, 8, 8, 2), 1U);
  EXPECT_EQ(count(8, 2, 4, 2), 1U);  // two ranks share a KV head
  EXPECT_EQ(count(9, 9, 4, 2), 2U);
}

TEST(HeadParts, AreChosenBySizeWithinWhatIsPossible) {
  const AttentionSizes sizes{128, 128, 2, true};
  const auto chosen = [&](std::int64_t kv_heads, std::int64_t seq) {
    return choose_head_parts(AttentionPlan(heads_request(64, kv_heads, 2, seq), 0), sizes);
  };
  EXPECT_EQ(chosen(8, 2048), 1);
  EXPECT_EQ(chosen(8, 8192), 2);
  EXPECT_EQ(chosen(8, 16384), 4);
  EXPECT_EQ(chosen(8, 1 << 20), 4);
  EXPECT_EQ(chosen(4, 16384), 2);
  EXPECT_EQ(chosen(2, 16384), 1);
}

// A head's results do not depend on the heads beside it.
TEST(HeadParts, GiveTheBitsOfOnePart) {
  for (const Scheme scheme : {Scheme::ulysses, Scheme::hybrid}) {
    for (const AttentionCase& c : {make_case("causal", causal_mask(), 97, 2),
                                   make_case("documents", document_mask({0, 40, 97}, 97), 97)}) {
      const SequenceLayout layout = SequenceLayout::zigzag(97, 2);
      auto request = request_of(c, scheme, layout, layout);
      request->node_ranks = 2;
      const std::uint64_t seed = fresh_random_seed();
      SCOPED_TRACE(::testing::Message() << c.name << ", seed " << seed << ", " << name(scheme));
      RunOptions options;
      options.execute.head_parts = 1;
      AttentionTensors one = random_tensors(c, seed);
      run_on_threads(c, request, one, options);
      options.execute.head_parts = 2;
      AttentionTensors two = random_tensors(c, seed);
      run_on_threads(c, request, two, options);
      EXPECT_TRUE(same_bits(one.o, two.o));
      EXPECT_TRUE(same_bits(one.lse, two.lse));
      EXPECT_TRUE(same_bits(one.grad_q, two.grad_q));
      EXPECT_TRUE(same_bits(one.grad_k, two.grad_k));
      EXPECT_TRUE(same_bits(one.grad_v, two.grad_v));
    }
  }
}

}  // namespace
}  // namespace annulus
