#include "sharding/cache_pages.hpp"

#include <algorithm>
#include <limits>

#include "kernels/error.hpp"
#include "sharding/named_sharding.hpp"

namespace annulus {

CacheLayout CacheLayout::contiguous(std::int64_t sequences, std::int64_t tokens, int batch_parts,
                                    int ranks) {
  CacheLayout layout;
  layout.sequences = sequences;
  layout.batch_parts = batch_parts;
  layout.ranks = ranks;
  layout.block = 16;
  layout.page_size = std::max<std::int64_t>(layout.deal(0).tokens(tokens), 1);  // rank 0 has most
  layout.pages = std::max<std::int64_t>(layout.sequences_of(0).size(), 1);
  return layout;
}

Span CacheLayout::sequences_of(int batch_part) const {
  return split_evenly(sequences, batch_parts, batch_part);
}

int CacheLayout::part_of(std::int64_t sequence) const {
  return static_cast<int>(part_holding(sequences, batch_parts, sequence));
}

std::int64_t CacheLayout::pages_for(std::int64_t length, int rank) const {
  return (deal(rank).tokens(length) + page_size - 1) / page_size;
}

CachePages::CachePages(const CacheLayout& layout, int batch_part, int rank)
    : layout_(layout), batch_part_(batch_part), rank_(rank) {
  require(layout.sequences > 0 && layout.page_size > 0 && layout.pages > 0 && layout.block > 0,
          ExitCode::usage,
          "cache: {} sequences, {} pages of {} tokens dealt in blocks of {}; accepted: 1 or more",
          layout.sequences, layout.pages, layout.page_size, layout.block);
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  require(layout.pages <= kMost, ExitCode::usage, "cache: {} pages; accepted: 1 to {}",
          layout.pages, kMost);
  require(0 <= batch_part && batch_part < layout.batch_parts && 0 <= rank && rank < layout.ranks,
          ExitCode::usage, "cache: no rank {} in batch part {} of {} ranks in {} parts", rank,
          batch_part, layout.ranks, layout.batch_parts);
  lengths_.assign(static_cast<std::size_t>(layout.sequences), 0);
  free_.assign(static_cast<std::size_t>(layout.batch_parts * layout.ranks), layout.pages);
  local_lengths_.assign(static_cast<std::size_t>(sequences().size()), 0);
  page_table_.assign(static_cast<std::size_t>(sequences().size() * max_pages()), -1);
  for (std::int64_t page = layout.pages; page-- > 0;) {
    free_pages_.push_back(static_cast<std::int32_t>(page));
  }
}

std::int64_t& CachePages::free_of(int batch_part, int rank) {
  return free_[static_cast<std::size_t>(batch_part * layout_.ranks + rank)];
}

std::int64_t CachePages::free_pages(int batch_part, int rank) const {
  return const_cast<CachePages*>(this)->free_of(batch_part, rank);
}

void CachePages::append(std::span<const std::int64_t> rows) {
  require(static_cast<std::int64_t>(rows.size()) == layout_.sequences, ExitCode::bad_data,
          "cache: new tokens of {} sequences; the cache has {}", rows.size(), layout_.sequences);
  std::vector<std::int64_t> left = free_;
  for (std::size_t s = 0; s < rows.size(); ++s) {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    require(rows[s] >= 0 && rows[s] <= kMost - lengths_[s], ExitCode::bad_data,
            "cache: {} new tokens of sequence {}, which has {}; accepted: 0 to {} in all", rows[s],
            s, lengths_[s], kMost);
    const int part = layout_.part_of(static_cast<std::int64_t>(s));
    for (int rank = 0; rank < layout_.ranks; ++rank) {
      std::int64_t& there = left[static_cast<std::size_t>(part * layout_.ranks + rank)];
      const std::int64_t wanted =
          layout_.pages_for(lengths_[s] + rows[s], rank) - layout_.pages_for(lengths_[s], rank);
      require(wanted <= there, ExitCode::no_memory,
              "cache: sequence {} needs {} more pages of {} tokens on rank {} of batch part {} for "
              "{} tokens after {}; {} of {} are free",
              s, wanted, layout_.page_size, rank, part, rows[s], lengths_[s], there, layout_.pages);
      there -= wanted;
    }
  }
  for (std::size_t s = 0; s < rows.size(); ++s) {
    if (rows[s] > 0) resize(static_cast<std::int64_t>(s), lengths_[s] + rows[s]);
  }
}

void CachePages::truncate(std::int64_t sequence, std::int64_t length) {
  require(0 <= sequence && sequence < layout_.sequences, ExitCode::bad_data,
          "cache: no sequence {}; there are {}", sequence, layout_.sequences);
  const std::int64_t before = lengths_[static_cast<std::size_t>(sequence)];
  require(0 <= length && length <= before, ExitCode::bad_data,
          "cache: sequence {} has {} tokens; {} cannot be kept", sequence, before, length);
  resize(sequence, length);
}

// @pre there are pages enough
void CachePages::resize(std::int64_t sequence, std::int64_t length) {
  std::int64_t& current = lengths_[static_cast<std::size_t>(sequence)];
  const int part = layout_.part_of(sequence);
  for (int rank = 0; rank < layout_.ranks; ++rank) {
    free_of(part, rank) -= layout_.pages_for(length, rank) - layout_.pages_for(current, rank);
  }
  if (part == batch_part_) {
    const auto row = static_cast<std::size_t>(sequence - sequences().begin);
    std::int32_t* table = page_table_.data() + row * static_cast<std::size_t>(max_pages());
    const std::int64_t before = layout_.pages_for(current, rank_);
    const std::int64_t after = layout_.pages_for(length, rank_);
    for (std::int64_t i = before; i < after; ++i) {
      table[i] = free_pages_.back();
      free_pages_.pop_back();
    }
    for (std::int64_t i = before; i-- > after;) {
      free_pages_.push_back(table[i]);
      table[i] = -1;
    }
    local_lengths_[row] = static_cast<std::int32_t>(length);
  }
  current = length;
}

}  // namespace annulus
