#include "runtime/output_layout.hpp"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "kernels/error.hpp"

namespace annulus {
namespace {

// HDF5's chunk cache holds 1 MiB by default: readers that go row by row decode larger chunks again
// and again.
constexpr std::int64_t kChunkBytes = std::int64_t{1} << 20;
// Chunks smaller than wanted by up to this factor are taken when no two ranks then share one.
constexpr std::int64_t kSmallerForAlignment = 8;

// The greatest number that divides every place where a part begins or ends.
std::int64_t boundary_divisor(const std::vector<Selection>& parts, int dim, std::int64_t extent) {
  std::int64_t divisor = extent;
  for (const Selection& part : parts) {
    for (const Span& run : part.runs(dim)) {
      divisor = std::gcd(divisor, std::gcd(run.begin, run.end));
    }
  }
  return divisor;
}

std::int64_t largest_divisor(std::int64_t number, std::int64_t most) {
  for (std::int64_t divisor = std::min(number, most); divisor > 1; --divisor) {
    if (number % divisor == 0) return divisor;
  }
  return 1;
}

std::int64_t size_within(const std::vector<Span>& runs, Span window) {
  std::int64_t size = 0;
  for (const Span& run : runs) size += intersect(run, window).size();
  return size;
}

bool meet_within(const std::vector<Span>& a, const std::vector<Span>& b, Span window) {
  return std::any_of(a.begin(), a.end(),
                     [&](const Span& run) { return size_within(b, intersect(run, window)) > 0; });
}

// Ranges of one part may come in any order but must not overlap.
void check_disjoint(const std::string& what, const Selection& part, int rank) {
  for (int dim = 0; dim < part.rank(); ++dim) {
    std::vector<Span> runs = part.runs(dim);
    std::sort(runs.begin(), runs.end(), [](Span a, Span b) { return a.begin < b.begin; });
    for (std::size_t i = 1; i < runs.size(); ++i) {
      require(runs[i - 1].end <= runs[i].begin, ExitCode::bad_data,
              "{}: rank {} holds [{}, {}) of dimension {} twice", what, rank, runs[i].begin,
              std::min(runs[i - 1].end, runs[i].end), dim);
    }
  }
}

}  // namespace

OutputLayout::OutputLayout(const std::string& what, const Shape& shape, std::int64_t element_bytes,
                           std::vector<Selection> parts)
    : shape_(shape), element_bytes_(element_bytes), parts_(std::move(parts)) {
  for (std::size_t rank = 0; rank < parts_.size(); ++rank) {
    parts_[rank].validate(shape_, what);
    check_disjoint(what, parts_[rank], static_cast<int>(rank));
    const auto end = parts_.begin() + static_cast<std::ptrdiff_t>(rank);
    if (std::find(parts_.begin(), end, parts_[rank]) != end) {
      for (int dim = 0; dim < shape_.rank(); ++dim) parts_[rank].set(dim, {});
    }
  }
  if (shape_.elements() == 0) return;
  choose_chunk();
  assign(what);
}

void OutputLayout::choose_chunk() {
  chunk_ = shape_;
  grid_ = shape_;
  chunks_ = 1;
  std::int64_t room = std::max<std::int64_t>(1, kChunkBytes / element_bytes_);
  for (int dim = shape_.rank() - 1; dim >= 0; --dim) {
    const std::int64_t wanted = std::min(shape_[dim], room);
    const std::int64_t aligned =
        largest_divisor(boundary_divisor(parts_, dim, shape_[dim]), wanted);
    chunk_[dim] = aligned * kSmallerForAlignment >= wanted ? aligned : wanted;
    grid_[dim] = (shape_[dim] + chunk_[dim] - 1) / chunk_[dim];
    chunks_ *= grid_[dim];
    room = std::max<std::int64_t>(1, room / chunk_[dim]);
  }
}

Shape OutputLayout::begin_of(std::int64_t chunk) const {
  Shape begin = shape_;
  for (int dim = shape_.rank() - 1; dim >= 0; --dim) {
    begin[dim] = chunk % grid_[dim] * chunk_[dim];
    chunk /= grid_[dim];
  }
  return begin;
}

Shape OutputLayout::extent_of(std::int64_t chunk) const {
  const Shape begin = begin_of(chunk);
  Shape extent = chunk_;
  for (int dim = 0; dim < shape_.rank(); ++dim) {
    extent[dim] = std::min(chunk_[dim], shape_[dim] - begin[dim]);
  }
  return extent;
}

std::int64_t OutputLayout::elements(int rank, std::int64_t chunk) const {
  const Shape begin = begin_of(chunk);
  std::int64_t product = 1;
  for (int dim = 0; dim < shape_.rank(); ++dim) {
    product *= size_within(part(rank).runs(dim), {begin[dim], begin[dim] + chunk_[dim]});
  }
  return product;
}

void OutputLayout::assign(const std::string& what) {
  std::vector<std::pair<std::int64_t, int>> holders;  // chunk and rank
  for (int rank = 0; rank < static_cast<int>(parts_.size()); ++rank) {
    for_each_cell(part(rank), chunk_, [&](const Shape& cell) {
      std::int64_t index = 0;
      for (int dim = 0; dim < grid_.rank(); ++dim) index = index * grid_[dim] + cell[dim];
      holders.emplace_back(index, rank);
    });
  }
  std::sort(holders.begin(), holders.end());
  only_holder_.assign(static_cast<std::size_t>(chunks_), -1);
  std::size_t next = 0;
  for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
    std::vector<int> ranks;
    for (; next < holders.size() && holders[next].first == chunk; ++next) {
      ranks.push_back(holders[next].second);
    }
    check_cover(what, chunk, ranks);
    if (ranks.size() == 1) {
      only_holder_[static_cast<std::size_t>(chunk)] = ranks[0];
      continue;
    }
    // The writer is one of the holders, each in turn: parts of less than a chunk are spread evenly.
    const int owner = ranks[static_cast<std::size_t>(chunk) % ranks.size()];
    shared_.push_back({chunk, owner, std::move(ranks)});
  }
}

// Disjoint parts whose sizes add up to the chunk cover it exactly.
void OutputLayout::check_cover(const std::string& what, std::int64_t chunk,
                               std::span<const int> ranks) const {
  const Shape begin = begin_of(chunk);
  std::int64_t covered = 0;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    covered += elements(ranks[i], chunk);
    for (std::size_t j = 0; j < i; ++j) {
      bool meet = true;
      for (int dim = 0; dim < shape_.rank() && meet; ++dim) {
        meet = meet_within(part(ranks[i]).runs(dim), part(ranks[j]).runs(dim),
                           {begin[dim], begin[dim] + chunk_[dim]});
      }
      require(!meet, ExitCode::bad_data, "{}: ranks {} and {} both hold elements near {}", what,
              ranks[j], ranks[i], begin.to_string());
    }
  }
  const std::int64_t wanted = extent_of(chunk).elements();
  require(covered == wanted, ExitCode::bad_data,
          "{}: {} of {} elements near {} are held by a rank, expected all", what, covered, wanted,
          begin.to_string());
}

std::vector<std::int64_t> OutputLayout::exclusive_chunks(int rank) const {
  std::vector<std::int64_t> chunks;
  for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
    if (only_holder_[static_cast<std::size_t>(chunk)] == rank) chunks.push_back(chunk);
  }
  return chunks;
}

}  // namespace annulus
