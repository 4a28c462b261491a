#include "sharding/dense_mask.hpp"

#include <gtest/gtest.h>

#include "kernels/error.hpp"

namespace annulus {
namespace {

using Bytes = std::vector<std::uint8_t>;

TEST(SplitAttentionMask, TheLastHeadCounts) {
  // [2,2,3,4]: head 0 is all true and must not matter.
  Bytes mask(48, 0);
  const auto set = [&](std::size_t b, std::size_t h, const Bytes& rows) {
    std::copy(rows.begin(), rows.end(), mask.begin() + static_cast<long>((b * 2 + h) * 12));
  };
  set(0, 0, Bytes(12, 1));
  set(1, 0, Bytes(12, 1));
  set(0, 1, {1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0});
  set(1, 1, {0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1});
  const SplitMask split = split_attention_mask({mask.data(), DType::u8, Shape{2, 2, 3, 4}});
  EXPECT_EQ(split.query, (DenseMask{{2, 3}, {1, 1, 0, 1, 1, 1}}));
  EXPECT_EQ(split.kv, (DenseMask{{2, 4}, {1, 1, 0, 0, 0, 0, 0, 1}}));
}

TEST(SplitAttentionMask, WithoutHeadsAndWithAnyStridesAndAnyNonZero) {
  const Bytes mask = {0, 7, 0, 0, 0, 0};
  EXPECT_EQ(split_attention_mask({mask.data(), DType::u8, Shape{1, 2, 3}}).query,
            (DenseMask{{1, 2}, {1, 0}}));
  const ConstTensorView transposed =
      ConstTensorView(mask.data(), DType::u8, Shape{1, 2, 3}).transposed(1, 2);
  EXPECT_EQ(split_attention_mask(transposed).query, (DenseMask{{1, 3}, {0, 1, 0}}));
}

TEST(SplitAttentionMask, RefusesOtherArrays) {
  const Bytes mask(8, 1);
  EXPECT_THROW(split_attention_mask({mask.data(), DType::u8, Shape{2, 4}}), Error);
  EXPECT_THROW(split_attention_mask({mask.data(), DType::f32, Shape{1, 1, 2}}), Error);
  EXPECT_THROW(split_attention_mask({mask.data(), DType::u8, Shape{1, 0, 2, 4}}), Error);
}

TEST(CombineQueryKvMasks, BothMustKeep) {
  const DenseMask both = combine_query_kv_masks({{1, 3}, {1, 1, 0}}, {{1, 4}, {1, 0, 1, 1}});
  EXPECT_EQ(both, (DenseMask{{1, 3, 4}, {1, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0}}));
}

TEST(CombineQueryKvMasks, EachBatchRowHasItsOwnKeys) {
  const DenseMask both = combine_query_kv_masks({{2, 1}, {1, 1}}, {{2, 2}, {1, 0, 0, 1}});
  EXPECT_EQ(both, (DenseMask{{2, 1, 2}, {1, 0, 0, 1}}));
}

TEST(CombineQueryKvMasks, UnequalBatchesAreRefused) {
  EXPECT_THROW(combine_query_kv_masks({{1, 2}, {1, 1}}, {{2, 1}, {1, 1}}), Error);
  EXPECT_THROW(combine_query_kv_masks({{2}, {1, 1}}, {{2, 1}, {1, 1}}), Error);
}

TEST(CreateCausalMask, AQueryKeepsKeysUpToItself) {
  EXPECT_EQ(create_causal_mask(3), (DenseMask{{3, 3}, {1, 0, 0, 1, 1, 0, 1, 1, 1}}));
}

}  // namespace
}  // namespace annulus
