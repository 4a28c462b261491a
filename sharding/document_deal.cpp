#include "sharding/document_deal.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

namespace annulus {
namespace {

using Chunk = SequenceLayout::Chunk;

constexpr double kBalancedArea = 1.02;
constexpr double kBalancedRows = 1.15;
constexpr double kBalancedRowsOfOne = 1.25;  // of one document: a window's first rows see few keys

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

struct Document {
  Span rows;
  std::int64_t area = 0;
  std::vector<Slice> slices;
};

// The whole sequence in documents, in order; rows without a slice join the document before them.
std::vector<Document> documents_of(const MaskSlices& mask, std::int64_t batch, std::int64_t seq) {
  std::vector<Slice> slices = mask.slices;
  const auto first = [](const Slice& s) { return std::min(s.q.begin, s.k.begin); };
  std::sort(slices.begin(), slices.end(),
            [&](const Slice& a, const Slice& b) { return first(a) < first(b); });
  const std::int64_t copies = mask.batch_offsets.empty() ? batch : 1;
  std::vector<Document> documents;
  for (const Slice& slice : slices) {
    const std::int64_t area = copies * slice.area();
    if (area == 0) continue;
    const Span hull{first(slice), std::max(slice.q.end, slice.k.end)};
    if (documents.empty() || hull.begin >= documents.back().rows.end) {
      documents.push_back({hull, 0, {}});
    }
    Document& last = documents.back();
    last.rows.end = std::max(last.rows.end, hull.end);
    last.area += area;
    last.slices.push_back(slice);
  }
  if (documents.empty()) return documents;
  documents.front().rows.begin = 0;
  for (std::size_t i = 0; i + 1 < documents.size(); ++i) {
    documents[i].rows.end = documents[i + 1].rows.begin;
  }
  documents.back().rows.end = seq;
  return documents;
}

std::int64_t area_within(const Document& document, Span rows, std::int64_t copies) {
  std::int64_t area = 0;
  for (const Slice& slice : document.slices) {
    area += copies * clip(slice, rows, slice.k).area();
  }
  return area;
}

// What each rank has so far.
struct Loads {
  explicit Loads(int ranks) : area(index(ranks), 0), rows(index(ranks), 0) {}
  void add(int rank, std::int64_t more_area, std::int64_t more_rows) {
    area[index(rank)] += more_area;
    rows[index(rank)] += more_rows;
  }
  bool balanced(double most_rows = kBalancedRows) const {
    return imbalance(area) <= kBalancedArea && imbalance(rows) <= most_rows;
  }
  std::vector<std::int64_t> area;
  std::vector<std::int64_t> rows;
};

// Cuts the sequence where the area reaches another rank's share: beside a document where one ends
// about there, else within it, where that is the same at the end of a kernel's tile.
std::optional<std::vector<Chunk>> cut_by_area(const std::vector<Document>& documents,
                                              std::int64_t copies, std::int64_t total, int ranks) {
  constexpr double kSlack = 0.005;      // of a share, on either side
  constexpr double kTileSlack = 0.008;  // for a whole tile
  constexpr std::int64_t kTileRows = 128;
  const double share = static_cast<double>(total) / ranks;
  std::vector<Chunk> chunks;
  Loads loads(ranks);
  std::int64_t begin = 0;
  std::int64_t begin_area = 0;
  std::int64_t before = 0;  // area of the documents before this one
  int rank = 0;
  const auto cut = [&](std::int64_t end, std::int64_t end_area) {
    chunks.push_back({{begin, end}, rank, 0});
    loads.add(rank, end_area - begin_area, end - begin);
    begin = end;
    begin_area = end_area;
    ++rank;
  };
  for (const Document& document : documents) {
    const std::int64_t after = before + document.area;
    while (rank + 1 < ranks) {
      const double wanted = share * (rank + 1);
      if (static_cast<double>(after) < wanted - kSlack * share) break;
      if (static_cast<double>(after) <= wanted + kSlack * share) {
        cut(document.rows.end, after);
        break;
      }
      const auto area_until = [&](std::int64_t row) {
        return before + area_within(document, {document.rows.begin, row}, copies);
      };
      // The first row at which the share is reached.
      Span rows = document.rows;
      while (rows.size() > 1) {
        const std::int64_t middle = rows.begin + rows.size() / 2;
        const auto area = static_cast<double>(area_until(middle));
        (area < wanted ? rows.begin : rows.end) = middle;
      }
      const std::int64_t whole_tiles = (rows.end + kTileRows / 2) / kTileRows * kTileRows;
      const double off = std::abs(static_cast<double>(area_until(whole_tiles)) - wanted);
      const bool is_near = whole_tiles < document.rows.end && off <= kTileSlack * share;
      const std::int64_t end = is_near ? whole_tiles : rows.end;
      if (end <= begin) return std::nullopt;
      cut(end, area_until(end));
    }
    before = after;
  }
  while (rank < ranks) cut(rank + 1 == ranks ? documents.back().rows.end : begin, total);
  const double most_rows = documents.size() > 1 ? kBalancedRows : kBalancedRowsOfOne;
  if (!loads.balanced(most_rows)) return std::nullopt;
  return chunks;
}

// Ranks by what they have, least area first.
class RankQueue {
 public:
  RankQueue(int ranks, std::int64_t most_rows) : loads_(ranks), most_rows_(most_rows) {
    for (int rank = 0; rank < ranks; ++rank) order_.insert({0, rank});
  }
  /// The rank with the least area among the first few with room for so many rows; -1: none.
  int least(std::int64_t rows) const {
    constexpr int kTried = 32;
    int tried = 0;
    for (auto at = order_.begin(); at != order_.end() && tried < kTried; ++at, ++tried) {
      if (loads_.rows[index(at->second)] + rows <= most_rows_) return at->second;
    }
    return -1;
  }
  void add(int rank, std::int64_t area, std::int64_t rows) {
    order_.erase({loads_.area[index(rank)], rank});
    loads_.add(rank, area, rows);
    order_.insert({loads_.area[index(rank)], rank});
  }
  const Loads& loads() const { return loads_; }

 private:
  Loads loads_;
  std::int64_t most_rows_;
  std::set<std::pair<std::int64_t, int>> order_;
};

struct Unit {
  Span rows;
  std::int64_t area = 0;
};

// Units of the most area first, each to the rank with the least.
bool deal_units(std::vector<Unit> units, RankQueue& queue, std::vector<Chunk>& chunks) {
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.area > b.area; });
  for (const Unit& unit : units) {
    const int rank = queue.least(unit.rows.size());
    if (rank < 0) return false;
    queue.add(rank, unit.area, unit.rows.size());
    chunks.push_back({unit.rows, rank, 0});
  }
  return true;
}

// Documents whole, unless one is more than `largest`: those go in pieces of so many rows.
std::optional<std::vector<Chunk>> deal_whole(const std::vector<Document>& documents,
                                             std::int64_t copies, std::int64_t seq, int ranks,
                                             double largest, std::int64_t piece_rows) {
  std::vector<Unit> units;
  for (const Document& document : documents) {
    if (static_cast<double>(document.area) <= largest) {
      units.push_back({document.rows, document.area});
      continue;
    }
    for (std::int64_t begin = document.rows.begin; begin < document.rows.end; begin += piece_rows) {
      const Span rows{begin, std::min(begin + piece_rows, document.rows.end)};
      units.push_back({rows, area_within(document, rows, copies)});
    }
  }
  const auto most_rows =
      static_cast<std::int64_t>(kBalancedRows * static_cast<double>(seq) / ranks);
  RankQueue queue(ranks, most_rows);
  std::vector<Chunk> chunks;
  if (!deal_units(std::move(units), queue, chunks) || !queue.loads().balanced()) {
    return std::nullopt;
  }
  std::sort(chunks.begin(), chunks.end(),
            [](const Chunk& a, const Chunk& b) { return a.global.begin < b.global.begin; });
  return chunks;
}

}  // namespace

std::optional<std::vector<Chunk>> deal_documents(const MaskSlices& mask, std::int64_t batch,
                                                 std::int64_t seq, int ranks) {
  // Positions of keys are those of queries only where both have one length.
  const bool one_length =
      std::all_of(mask.slices.begin(), mask.slices.end(),
                  [seq](const Slice& s) { return s.k.end <= seq && s.q.end <= seq; });
  if (!one_length) return std::nullopt;
  const std::vector<Document> documents = documents_of(mask, batch, seq);
  if (documents.empty() || ranks < 2) return std::nullopt;
  const std::int64_t copies = mask.batch_offsets.empty() ? batch : 1;
  std::int64_t total = 0;
  for (const Document& document : documents) total += document.area;
  if (auto chunks = cut_by_area(documents, copies, total, ranks)) return chunks;
  if (documents.size() < 2) return std::nullopt;
  const double share = static_cast<double>(total) / ranks;
  for (const double largest : {1.0, 0.5, 0.25, 0.125}) {
    for (const std::int64_t parts : {2, 8, 32}) {
      const std::int64_t piece_rows = std::max<std::int64_t>(seq / (ranks * parts), 64);
      auto chunks = deal_whole(documents, copies, seq, ranks, largest * share, piece_rows);
      if (chunks) return chunks;
    }
  }
  return std::nullopt;
}

}  // namespace annulus
