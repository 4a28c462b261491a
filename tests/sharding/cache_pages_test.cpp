#include "sharding/cache_pages.hpp"

#include <gtest/gtest.h>

#include <random>
#include <set>

#include "kernels/error.hpp"
#include "kernels/random_attention.hpp"

namespace annulus::testing {
namespace {

std::string message_of(const std::function<void()>& call, ExitCode code) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    return error.what();
  }
  return "";
}

// No page is anybody's twice, all tokens have one, and counts are right.
void expect_sound(const CachePages& pages, int batch_part, int rank) {
  std::set<std::int32_t> used;
  const std::span<const std::int32_t> table = pages.page_table();
  for (std::int64_t s = 0; s < pages.sequences().size(); ++s) {
    const std::int64_t length =
        pages.lengths()[static_cast<std::size_t>(pages.sequences().begin + s)];
    EXPECT_EQ(pages.local_lengths()[static_cast<std::size_t>(s)], length);
    for (std::int64_t i = 0; i < pages.max_pages(); ++i) {
      const std::int32_t page = table[static_cast<std::size_t>(s * pages.max_pages() + i)];
      const bool needed = i * pages.layout().page_size < pages.deal().tokens(length);
      ASSERT_EQ(needed, page >= 0);
      if (needed) {
        ASSERT_TRUE(page < pages.layout().pages && used.insert(page).second);
      }
    }
  }
  EXPECT_EQ(pages.free_pages(batch_part, rank),
            pages.layout().pages - static_cast<std::int64_t>(used.size()));
}

TEST(CachePages, StaySoundThroughAppendsAndFrees) {
  std::mt19937_64 random(test_seed());
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  for (int round = 0; round < 30; ++round) {
    CacheLayout layout;
    layout.batch_parts = static_cast<int>(pick(1, 3));
    layout.ranks = static_cast<int>(pick(1, 4));
    layout.sequences = pick(1, 7);
    layout.page_size = pick(1, 9);
    layout.block = pick(1, 9);
    layout.pages = pick(5, 60);
    std::vector<CachePages> all;
    for (int part = 0; part < layout.batch_parts; ++part) {
      for (int rank = 0; rank < layout.ranks; ++rank) all.emplace_back(layout, part, rank);
    }
    for (int step = 0; step < 60; ++step) {
      const std::int64_t sequence = pick(0, layout.sequences - 1);
      const std::vector<std::int64_t> before(all[0].lengths().begin(), all[0].lengths().end());
      std::set<std::string> messages;
      if (pick(0, 3) == 0) {
        const std::int64_t kept = pick(0, before[static_cast<std::size_t>(sequence)]);
        for (CachePages& pages : all) pages.truncate(sequence, kept);
      } else {
        std::vector<std::int64_t> rows(before.size());
        for (std::int64_t& count : rows) count = pick(0, 1) * pick(0, 20);
        for (CachePages& pages : all) {
          messages.insert(message_of([&] { pages.append(rows); }, ExitCode::no_memory));
        }
        EXPECT_EQ(messages.size(), 1U);  // all ranks say the same
        if (*messages.begin() != "") {
          EXPECT_TRUE(std::equal(before.begin(), before.end(), all[0].lengths().begin()));
        }
      }
      for (std::size_t i = 0; i < all.size(); ++i) {
        const int ranks = layout.ranks;
        expect_sound(all[i], static_cast<int>(i) / ranks, static_cast<int>(i) % ranks);
      }
    }
  }
}

TEST(CachePages, NamesTheSequenceThatFindsNoPages) {
  CacheLayout layout;
  layout.sequences = 3;
  layout.page_size = 4;
  layout.block = 4;
  layout.pages = 5;
  layout.ranks = 2;
  CachePages pages(layout, 0, 0);
  pages.append(std::vector<std::int64_t>{16, 16, 0});  // two pages each on both ranks
  EXPECT_EQ(message_of(
                [&] {
                  pages.append(std::vector<std::int64_t>{4, 0, 13});
                },
                ExitCode::no_memory),
            "cache: sequence 2 needs 2 more pages of 4 tokens on rank 0 of batch part 0 for 13 "
            "tokens after 0; 0 of 5 are free");
  pages.free(0);
  EXPECT_EQ(pages.free_pages(0, 0), 3);
  pages.append(std::vector<std::int64_t>{4, 0, 13});
  EXPECT_EQ(message_of([&] { pages.append(std::vector<std::int64_t>{1}); }, ExitCode::bad_data),
            "cache: new tokens of 1 sequences; the cache has 3");
  EXPECT_EQ(message_of([&] { pages.truncate(1, 99); }, ExitCode::bad_data),
            "cache: sequence 1 has 16 tokens; 99 cannot be kept");
  EXPECT_EQ(message_of([&] { pages.free(3); }, ExitCode::bad_data),
            "cache: no sequence 3; there are 3");
}

TEST(CachePages, AContiguousCacheIsOnePageASequence) {
  const CacheLayout layout = CacheLayout::contiguous(5, 100, 2, 3);
  EXPECT_EQ(layout.pages, 3);
  EXPECT_EQ(layout.page_size, 36);  // of rank 0: blocks 0, 3 and the last 4 tokens of block 6
  CachePages pages(layout, 0, 0);
  pages.append(std::vector<std::int64_t>(5, 100));
  EXPECT_EQ(pages.free_pages(0, 0), 0);
  EXPECT_NE(
      message_of([&] { pages.append(std::vector<std::int64_t>(5, 20)); }, ExitCode::no_memory), "");
}

}  // namespace
}  // namespace annulus::testing
