#include "kernels/cudnn/band_pieces.hpp"

#include <limits>

namespace annulus::kernels::cudnn {
namespace {

bool is_bounded(std::int64_t bound) { return -kUnbounded < bound && bound < kUnbounded; }

/// Without the bounds that no pair of seq_q × seq_kv violates.
Band binding(Band band, std::int64_t seq_q, std::int64_t seq_kv) {
  if (band.hi >= seq_kv - 1) band.hi = kUnbounded;
  if (band.lo <= 1 - seq_q) band.lo = -kUnbounded;
  return band;
}

/// Splits off the first `rows` queries into `pieces` and returns the slice of the others.
Slice split(const Slice& slice, std::int64_t rows, std::vector<BandPiece>& pieces);

void add_pieces(const Slice& given, std::vector<BandPiece>& pieces) {
  const Slice slice = clip(given, given.q, given.k);
  const std::int64_t seq_q = slice.q.size();
  const std::int64_t seq_kv = slice.k.size();
  if (seq_q == 0 || seq_kv == 0) return;
  const Band band = binding(slice.band.shifted(slice.q.begin, slice.k.begin), seq_q, seq_kv);
  if (const auto form = band_form(band, seq_q, seq_kv)) {
    pieces.push_back({slice.q, slice.k, *form});
    return;
  }
  // Rows whose last key is the slice's own are no longer cut on the right; before them the band
  // ends in the bottom-right corner.
  if (is_bounded(band.hi)) return add_pieces(split(slice, seq_kv - band.hi, pieces), pieces);
  // Rows that are not cut on the left come first; after them the band starts in the top-left one.
  add_pieces(split(slice, 1 - band.lo, pieces), pieces);
}

Slice split(const Slice& slice, std::int64_t rows, std::vector<BandPiece>& pieces) {
  Slice first = slice;
  Slice rest = slice;
  first.q.end = rest.q.begin = slice.q.begin + rows;
  add_pieces(first, pieces);
  return rest;
}

}  // namespace

std::optional<BandForm> band_form(const Band& band, std::int64_t seq_q, std::int64_t seq_kv) {
  const std::int64_t corner = seq_kv - seq_q;  // k - q on the bottom-right diagonal
  BandForm form;
  std::int64_t diagonal = 0;
  if (is_bounded(band.hi)) {
    if (band.hi != 0 && band.hi != corner) return std::nullopt;
    form.causal = true;
    diagonal = band.hi;
  } else if (is_bounded(band.lo) && band.lo > 0) {
    diagonal = corner;
  }
  if (form.causal || is_bounded(band.lo)) {
    form.diagonal = diagonal == 0 ? Diagonal::top_left : Diagonal::bottom_right;
  }
  if (form.diagonal == Diagonal::bottom_right && seq_q > seq_kv) return std::nullopt;
  if (!is_bounded(band.lo)) return form;
  form.left_bound = diagonal - band.lo + 1;
  const bool windows =
      form.left_bound > 0 && seq_q <= seq_kv && form.left_bound <= std::numeric_limits<int>::max();
  return windows ? std::optional(form) : std::nullopt;
}

bool BandPiece::keeps(std::int64_t query, std::int64_t key) const {
  if (!q.contains(query) || !k.contains(key)) return false;
  const std::int64_t diagonal = form.diagonal == Diagonal::bottom_right ? k.size() - q.size() : 0;
  const std::int64_t after = key - k.begin - (query - q.begin) - diagonal;
  return (!form.causal || after <= 0) && (form.left_bound == 0 || after > -form.left_bound);
}

std::vector<BandPiece> band_pieces(const Slice& slice) {
  std::vector<BandPiece> pieces;
  add_pieces(slice, pieces);
  return pieces;
}

}  // namespace annulus::kernels::cudnn
