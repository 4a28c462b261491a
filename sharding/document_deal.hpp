#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/mask.hpp"
#include "sharding/sequence_layout.hpp"

namespace annulus {

/// A deal of rows that leaves documents (rows that no slice joins to the rows around them) whole
/// where balance allows, so that little is sent: in one run for each rank, or else whole documents
/// by the longest first and the largest ones in pieces. The work of a rank, its mask area and what
/// tiles of rows cost beside that, is at most 1.02 times the mean and its rows 1.15 times; absent
/// where that is not found. One document, such as a sliding window over everything, is only cut
/// into one run for each rank, of rows up to 1.25 times the mean.
std::optional<std::vector<SequenceLayout::Chunk>> deal_documents(const MaskSlices& mask,
                                                                 std::int64_t batch,
                                                                 std::int64_t seq, int ranks);

}  // namespace annulus
