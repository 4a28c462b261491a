#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/mask.hpp"

namespace annulus::kernels::cudnn {

enum class Diagonal : std::uint8_t { none, top_left, bottom_right };

/// cuDNN's form of a mask: bounds measured from one of two diagonals.
struct BandForm {
  bool causal = false;
  Diagonal diagonal = Diagonal::none;
  std::int64_t left_bound = 0;  // keys up to this many before the diagonal, itself included; 0: all

  friend auto operator<=>(const BandForm&, const BandForm&) = default;
};

/// The form of a band over all of seq_q × seq_kv; absent when cuDNN has none.
std::optional<BandForm> band_form(const Band& band, std::int64_t seq_q, std::int64_t seq_kv);

/// A rectangle of queries and keys whose kept pairs cuDNN can name.
struct BandPiece {
  Span q;
  Span k;
  BandForm form;

  bool keeps(std::int64_t query, std::int64_t key) const;
};

/// Any slice as disjoint pieces, at most four.
std::vector<BandPiece> band_pieces(const Slice& slice);

}  // namespace annulus::kernels::cudnn
