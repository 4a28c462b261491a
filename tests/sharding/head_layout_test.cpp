#include "sharding/head_layout.hpp"

#include <gtest/gtest.h>

#include "kernels/error.hpp"

namespace annulus {
namespace {

using Map = std::vector<std::int64_t>;

std::string message_of(std::int64_t heads, std::int64_t q_heads, std::int64_t kv_heads) {
  try {
    handle_kvhead(heads, q_heads, kv_heads);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::bad_data);
    return error.what();
  }
  return "accepted";
}

TEST(RepeatKvHeads, IsBlocked) {
  const std::vector<int> heads = {10, 11};
  std::vector<int> repeated;
  for (const std::int64_t i : repeat_kv_heads(2, 3)) {
    repeated.push_back(heads[static_cast<std::size_t>(i)]);
  }
  EXPECT_EQ(repeated, (std::vector<int>{10, 10, 10, 11, 11, 11}));
}

TEST(HandleKvhead, NoneStaysNoneAndMatchingHeadsStay) {
  EXPECT_EQ(handle_kvhead(std::nullopt, 6, 2), std::nullopt);
  EXPECT_EQ(handle_kvhead(6, 6, 2), (Map{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(handle_kvhead(1, 6, 2), Map{0});
}

TEST(HandleKvhead, KvHeadsAreRepeatedBlocked) {
  EXPECT_EQ(handle_kvhead(2, 6, 2), (Map{0, 0, 0, 1, 1, 1}));
}

TEST(HandleKvhead, RefusesOtherHeads) {
  EXPECT_EQ(message_of(3, 6, 2), "Incompatible array shape. Got 3 heads, expected 6, 2, or 1");
}

TEST(HandleKvhead, RefusesHeadsThatDoNotGroup) {
  EXPECT_EQ(message_of(4, 6, 4),
            "heads: 6 query heads do not group over 4 KV heads; the KV heads must divide the "
            "query heads");
  EXPECT_THROW(handle_kvhead(std::nullopt, 6, 4), Error);
  EXPECT_THROW(handle_kvhead(6, 6, 0), Error);
}

TEST(HeadLayout, KvHeadsThatDivideAreHeldOnce) {
  const HeadLayout layout(8, 4, 2);
  EXPECT_TRUE(layout.kv_heads_divide());
  EXPECT_EQ(layout.q_heads(1), (Span{4, 8}));
  EXPECT_EQ(layout.kv_heads(1), (Span{2, 4}));
  EXPECT_EQ(layout.groups(1).q_head_offset, 0);
}

TEST(HeadLayout, APartGetsTheKvHeadsItsQueryHeadsNeed) {
  const HeadLayout layout(9, 3, 2);  // query heads 0..4 and 5..8, groups of 3
  EXPECT_FALSE(layout.kv_heads_divide());
  EXPECT_EQ(layout.kv_heads(0), (Span{0, 2}));
  EXPECT_EQ(layout.kv_heads(1), (Span{1, 3}));
  EXPECT_EQ(layout.groups(1).group_size, 3);
  EXPECT_EQ(layout.groups(1).q_head_offset, 2);
}

TEST(HeadLayout, RefusesHeadsThatDoNotGroup) {
  EXPECT_THROW(HeadLayout(6, 4, 2), Error);
  EXPECT_THROW(HeadLayout(6, 0, 2), Error);
  EXPECT_THROW(HeadLayout(0, 1, 2), Error);
  EXPECT_THROW(HeadLayout(6, 2, 0), Error);
}

/// What a kernel does with the part's local heads must reach the right global KV head, and no KV
/// head may lie on the part for nothing.
void expect_right_heads(const HeadLayout& layout, std::int64_t group) {
  for (int part = 0; part < layout.parts(); ++part) {
    const Span q = layout.q_heads(part);
    const Span kv = layout.kv_heads(part);
    const HeadGroups groups = layout.groups(part);
    std::vector<bool> used(static_cast<std::size_t>(kv.size()), false);
    for (std::int64_t local = 0; local < q.size(); ++local) {
      const std::int64_t local_kv = (local + groups.q_head_offset) / groups.group_size;
      ASSERT_LT(local_kv, kv.size());
      ASSERT_EQ(kv.begin + local_kv, (q.begin + local) / group);
      used[static_cast<std::size_t>(local_kv)] = true;
    }
    for (const bool head_used : used) ASSERT_TRUE(head_used);
  }
}

TEST(HeadLayout, EveryCombinationMapsRight) {
  for (std::int64_t kv_heads = 1; kv_heads <= 9; ++kv_heads) {
    for (std::int64_t group = 1; group <= 6; ++group) {
      for (int parts = 1; parts <= 12; ++parts) {
        const HeadLayout layout(kv_heads * group, kv_heads, parts);
        expect_right_heads(layout, group);
        if (kv_heads % parts == 0) {
          ASSERT_TRUE(layout.kv_heads_divide());
        }
      }
    }
  }
}

}  // namespace
}  // namespace annulus
