#include "sharding/document_deal.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

namespace annulus {
namespace {

using Chunk = SequenceLayout::Chunk;

constexpr double kBalancedWork = 1.02;
constexpr double kBalancedRows = 1.15;
constexpr double kBalancedRowsOfOne = 1.25;  // of one document: a window's first rows see few keys
// Work is counted in pairs: a tile of queries takes as long as one and a half blocks of keys beside
// those that it sees.
constexpr std::int64_t kPairsOfRow = 192;

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

struct Document {
  Span rows;
  std::int64_t work = 0;
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
    last.work += area;
    last.slices.push_back(slice);
  }
  if (documents.empty()) return documents;
  documents.front().rows.begin = 0;
  for (std::size_t i = 0; i + 1 < documents.size(); ++i) {
    documents[i].rows.end = documents[i + 1].rows.begin;
  }
  documents.back().rows.end = seq;
  for (Document& document : documents) {
    document.work += batch * kPairsOfRow * document.rows.size();
  }
  return documents;
}

// How often a slice of the mask, and a row, occur.
struct Copies {
  std::int64_t slices;
  std::int64_t rows;
};

std::int64_t work_within(const Document& document, Span rows, Copies copies) {
  std::int64_t work = copies.rows * kPairsOfRow * rows.size();
  for (const Slice& slice : document.slices) {
    work += copies.slices * clip(slice, rows, slice.k).area();
  }
  return work;
}

// What each rank has so far.
struct Loads {
  explicit Loads(int ranks) : work(index(ranks), 0), rows(index(ranks), 0) {}
  void add(int rank, std::int64_t more_work, std::int64_t more_rows) {
    work[index(rank)] += more_work;
    rows[index(rank)] += more_rows;
  }
  bool balanced(double most_rows = kBalancedRows) const {
    return imbalance(work) <= kBalancedWork && imbalance(rows) <= most_rows;
  }
  std::vector<std::int64_t> work;
  std::vector<std::int64_t> rows;
};

// Cuts the sequence where the work reaches another rank's share: beside a document where one ends
// about there, else within it, where that is the same at the end of a kernel's tile.
std::optional<std::vector<Chunk>> cut_by_work(const std::vector<Document>& documents, Copies copies,
                                              std::int64_t total, int ranks) {
  constexpr double kSlack = 0.005;      // of a share, on either side
  constexpr double kTileSlack = 0.008;  // for a whole tile
  constexpr std::int64_t kTileRows = 128;
  const double share = static_cast<double>(total) / ranks;
  std::vector<Chunk> chunks;
  Loads loads(ranks);
  std::int64_t begin = 0;
  std::int64_t begin_work = 0;
  std::int64_t before = 0;  // work of the documents before this one
  int rank = 0;
  const auto cut = [&](std::int64_t end, std::int64_t end_work) {
    chunks.push_back({{begin, end}, rank, 0});
    loads.add(rank, end_work - begin_work, end - begin);
    begin = end;
    begin_work = end_work;
    ++rank;
  };
  for (const Document& document : documents) {
    const std::int64_t after = before + document.work;
    while (rank + 1 < ranks) {
      const double wanted = share * (rank + 1);
      if (static_cast<double>(after) < wanted - kSlack * share) break;
      if (static_cast<double>(after) <= wanted + kSlack * share) {
        cut(document.rows.end, after);
        break;
      }
      const auto work_until = [&](std::int64_t row) {
        return before + work_within(document, {document.rows.begin, row}, copies);
      };
      // The first row at which the share is reached.
      Span rows = document.rows;
      while (rows.size() > 1) {
        const std::int64_t middle = rows.begin + rows.size() / 2;
        const auto found = static_cast<double>(work_until(middle));
        (found < wanted ? rows.begin : rows.end) = middle;
      }
      const std::int64_t whole_tiles = (rows.end + kTileRows / 2) / kTileRows * kTileRows;
      const double off = std::abs(static_cast<double>(work_until(whole_tiles)) - wanted);
      const bool is_near = whole_tiles < document.rows.end && off <= kTileSlack * share;
      const std::int64_t end = is_near ? whole_tiles : rows.end;
      if (end <= begin) return std::nullopt;
      cut(end, work_until(end));
    }
    before = after;
  }
  while (rank < ranks) cut(rank + 1 == ranks ? documents.back().rows.end : begin, total);
  const double most_rows = documents.size() > 1 ? kBalancedRows : kBalancedRowsOfOne;
  if (!loads.balanced(most_rows)) return std::nullopt;
  return chunks;
}

// Ranks by what they have, least work first.
class RankQueue {
 public:
  RankQueue(int ranks, std::int64_t most_rows) : loads_(ranks), most_rows_(most_rows) {
    for (int rank = 0; rank < ranks; ++rank) order_.insert({0, rank});
  }
  /// The rank with the least work among the first few with room for so many rows; -1: none.
  int least(std::int64_t rows) const {
    constexpr int kTried = 32;
    int tried = 0;
    for (auto at = order_.begin(); at != order_.end() && tried < kTried; ++at, ++tried) {
      if (loads_.rows[index(at->second)] + rows <= most_rows_) return at->second;
    }
    return -1;
  }
  void add(int rank, std::int64_t work, std::int64_t rows) {
    order_.erase({loads_.work[index(rank)], rank});
    loads_.add(rank, work, rows);
    order_.insert({loads_.work[index(rank)], rank});
  }
  const Loads& loads() const { return loads_; }

 private:
  Loads loads_;
  std::int64_t most_rows_;
  std::set<std::pair<std::int64_t, int>> order_;
};

struct Unit {
  Span rows;
  std::int64_t work = 0;
};

// Units of the most work first, each to the rank with the least.
bool deal_units(std::vector<Unit> units, RankQueue& queue, std::vector<Chunk>& chunks) {
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.work > b.work; });
  for (const Unit& unit : units) {
    const int rank = queue.least(unit.rows.size());
    if (rank < 0) return false;
    queue.add(rank, unit.work, unit.rows.size());
    chunks.push_back({unit.rows, rank, 0});
  }
  return true;
}

// Documents whole, unless one is more than `largest`: those go in pieces of so many rows.
std::optional<std::vector<Chunk>> deal_whole(const std::vector<Document>& documents, Copies copies,
                                             std::int64_t seq, int ranks, double largest,
                                             std::int64_t piece_rows) {
  std::vector<Unit> units;
  for (const Document& document : documents) {
    if (static_cast<double>(document.work) <= largest) {
      units.push_back({document.rows, document.work});
      continue;
    }
    for (std::int64_t begin = document.rows.begin; begin < document.rows.end; begin += piece_rows) {
      const Span rows{begin, std::min(begin + piece_rows, document.rows.end)};
      units.push_back({rows, work_within(document, rows, copies)});
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
  const Copies copies{mask.batch_offsets.empty() ? batch : 1, batch};
  std::int64_t total = 0;
  for (const Document& document : documents) total += document.work;
  if (auto chunks = cut_by_work(documents, copies, total, ranks)) return chunks;
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
