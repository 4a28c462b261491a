#include "kernels/mask.hpp"

#include <algorithm>
#include <map>

#include "kernels/error.hpp"

namespace annulus {
namespace {

std::int64_t shifted_bound(std::int64_t bound, std::int64_t shift) {
  if (bound >= kUnbounded || bound <= -kUnbounded) return bound;
  return bound + shift;
}

std::int64_t clamp_unbounded(std::int64_t bound) {
  return std::clamp(bound, -kUnbounded, kUnbounded);
}

// Whether a side of a window cuts anything; wider ones would also leave 64 bits.
bool bounded(std::int64_t side) { return side >= 0 && side < kUnbounded; }

// Σ over i in [0, n) of clamp(first + i, 0, cap): a ramp between two plateaus.
std::int64_t ramp_sum(std::int64_t first, std::int64_t n, std::int64_t cap) {
  const std::int64_t begin = std::clamp<std::int64_t>(-first, 0, n);         // below: 0
  const std::int64_t end = std::clamp<std::int64_t>(cap - first, begin, n);  // from here on: cap
  const std::int64_t rising = end - begin;
  const std::int64_t sum = rising * (first + begin) + rising * (rising - 1) / 2;
  return sum + (n - end) * cap;
}

// Pairs of the rectangle with k − q <= bound.
std::int64_t pairs_up_to(Span q, Span k, std::int64_t bound) {
  return ramp_sum(q.begin + clamp_unbounded(bound) - k.begin + 1, q.size(), k.size());
}

bool differs_by_batch(const AttentionMask& mask) {
  return mask.q_segments.size() > 1 || mask.kv_segments.size() > 1 ||
         mask.prefix_lengths.size() > 1;
}

template <typename T>
const T* entry(const std::vector<T>& per_batch, std::int64_t b) {
  if (per_batch.empty()) return nullptr;
  return &per_batch[per_batch.size() == 1 ? 0 : static_cast<std::size_t>(b)];
}

// Blocks of one row that follow each other and are kept become one run.
void append_kept_blocks(const AttentionMask& mask, std::int64_t seq_kv, const Slice& slice,
                        std::vector<Slice>& out) {
  const std::int64_t blocks_kv = (seq_kv + mask.block_kv - 1) / mask.block_kv;
  for (std::int64_t row = slice.q.begin / mask.block_q; row * mask.block_q < slice.q.end; ++row) {
    const Span rows{row * mask.block_q, (row + 1) * mask.block_q};
    std::int64_t column = slice.k.begin / mask.block_kv;
    while (column * mask.block_kv < slice.k.end) {
      const auto kept = [&](std::int64_t c) {
        return c * mask.block_kv < slice.k.end &&
               mask.kept_blocks[static_cast<std::size_t>(row * blocks_kv + c)] != 0;
      };
      std::int64_t last = column;
      while (kept(last)) ++last;
      const Slice part = clip(slice, rows, {column * mask.block_kv, last * mask.block_kv});
      if (part.area() > 0) out.push_back(part);
      column = last + 1;
    }
  }
}

// Splits one rectangle at the prefix, which `causal` does not cut, and at the block pattern.
class SliceBuilder {
 public:
  SliceBuilder(const AttentionMask& mask, std::int64_t seq_kv, std::int64_t prefix,
               std::vector<Slice>& out)
      : mask_(mask), seq_kv_(seq_kv), prefix_(prefix), out_(out) {}

  void add(Span q, Span k, std::int64_t diagonal) {
    Band window;
    if (bounded(mask_.window_left)) window.lo = diagonal - mask_.window_left;
    if (bounded(mask_.window_right)) window.hi = diagonal + mask_.window_right;
    Band causal = window;
    if (mask_.causal) causal.hi = std::min(causal.hi, diagonal);
    if (mask_.causal && prefix_ > 0) emit({q, intersect(k, {0, prefix_}), window});
    emit({q, mask_.causal ? intersect(k, {prefix_, seq_kv_}) : k, causal});
  }

 private:
  void emit(const Slice& slice) {
    const Slice tight = clip(slice, slice.q, slice.k);
    if (tight.area() == 0) return;
    if (mask_.block_q > 0) return append_kept_blocks(mask_, seq_kv_, tight, out_);
    out_.push_back(tight);
  }

  const AttentionMask& mask_;
  std::int64_t seq_kv_;
  std::int64_t prefix_;
  std::vector<Slice>& out_;
};

void append_segment_pairs(const std::vector<Segment>& q_segments,
                          const std::vector<Segment>& kv_segments, bool align_per_segment,
                          std::int64_t diagonal, SliceBuilder& builder) {
  std::multimap<std::int64_t, Span> keys_by_id;
  for (const Segment& segment : kv_segments) keys_by_id.emplace(segment.id, segment.rows);
  for (const Segment& segment : q_segments) {
    if (segment.id < 0) continue;
    const auto [first, last] = keys_by_id.equal_range(segment.id);
    for (auto it = first; it != last; ++it) {
      const Span keys = it->second;
      builder.add(segment.rows, keys, align_per_segment ? keys.end - segment.rows.end : diagonal);
    }
  }
}

void check_segments(const std::vector<std::vector<Segment>>& per_batch, std::int64_t batch,
                    std::int64_t seq, std::string_view side) {
  require(per_batch.size() <= 1 || static_cast<std::int64_t>(per_batch.size()) == batch,
          ExitCode::bad_data, "mask: {} rows of {} segments for batch {}; accepted: 1 or {}",
          per_batch.size(), side, batch, batch);
  for (const std::vector<Segment>& segments : per_batch) {
    std::int64_t next = 0;
    for (const Segment& segment : segments) {
      require(segment.rows.begin == next && segment.rows.end >= next, ExitCode::bad_data,
              "mask: {} segment [{}, {}) does not follow {}", side, segment.rows.begin,
              segment.rows.end, next);
      next = segment.rows.end;
    }
    require(next == seq, ExitCode::bad_data, "mask: {} segments cover {} of {} tokens", side, next,
            seq);
  }
}

void check_mask(const AttentionMask& mask, std::int64_t batch, std::int64_t seq_q,
                std::int64_t seq_kv) {
  check_segments(mask.q_segments, batch, seq_q, "query");
  check_segments(mask.kv_segments, batch, seq_kv, "key");
  require(!mask.q_segments.empty() || mask.kv_segments.empty(), ExitCode::bad_data,
          "mask: key segments without query segments");
  require(mask.q_segments.empty() || !mask.kv_segments.empty() || seq_q == seq_kv,
          ExitCode::bad_data, "mask: query segments of {} tokens need key segments of {}", seq_q,
          seq_kv);
  require(mask.window_left >= -1 && mask.window_right >= -1, ExitCode::usage,
          "mask: window {},{}; accepted: 0 or more, -1 for unbounded", mask.window_left,
          mask.window_right);
  for (const std::int64_t length : mask.prefix_lengths) {
    require(length >= 0, ExitCode::bad_data, "mask: prefix of {} keys; accepted: 0 or more",
            length);
  }
  const auto prefixes = static_cast<std::int64_t>(mask.prefix_lengths.size());
  require(prefixes <= 1 || prefixes == batch, ExitCode::bad_data,
          "mask: {} prefix lengths for batch {}; accepted: 1 or {}", prefixes, batch, batch);
  if (mask.block_q == 0 && mask.block_kv == 0) return;
  require(mask.block_q > 0 && mask.block_kv > 0, ExitCode::bad_data,
          "mask: block sizes {} and {}; accepted: both above 0", mask.block_q, mask.block_kv);
  const std::int64_t blocks =
      ((seq_q + mask.block_q - 1) / mask.block_q) * ((seq_kv + mask.block_kv - 1) / mask.block_kv);
  require(static_cast<std::int64_t>(mask.kept_blocks.size()) == blocks, ExitCode::bad_data,
          "mask: {} block flags; {} x {} tokens in blocks of {} x {} have {}",
          mask.kept_blocks.size(), seq_q, seq_kv, mask.block_q, mask.block_kv, blocks);
}

void append_batch_row(const AttentionMask& mask, std::int64_t b, std::int64_t seq_q,
                      std::int64_t seq_kv, std::vector<Slice>& out) {
  const std::int64_t* prefix = entry(mask.prefix_lengths, b);
  SliceBuilder builder(mask, seq_kv, prefix == nullptr ? 0 : std::min(*prefix, seq_kv), out);
  const std::int64_t diagonal = seq_kv - seq_q;
  const std::vector<Segment>* q_segments = entry(mask.q_segments, b);
  if (q_segments == nullptr) return builder.add({0, seq_q}, {0, seq_kv}, diagonal);
  const std::vector<Segment>* kv_segments = entry(mask.kv_segments, b);
  append_segment_pairs(*q_segments, kv_segments == nullptr ? *q_segments : *kv_segments,
                       mask.align_per_segment, diagonal, builder);
}

}  // namespace

Coverage Band::coverage(Span q, Span k) const {
  if (q.empty() || k.empty()) return Coverage::none;
  const std::int64_t least = k.begin - (q.end - 1);
  const std::int64_t most = (k.end - 1) - q.begin;
  if (most < lo || least > hi || lo > hi) return Coverage::none;
  return lo <= least && most <= hi ? Coverage::full : Coverage::partial;
}

Span Band::keys_of(std::int64_t q) const { return {q + lo, q + hi + 1}; }

Band Band::shifted(std::int64_t q_shift, std::int64_t k_shift) const {
  return {shifted_bound(lo, q_shift - k_shift), shifted_bound(hi, q_shift - k_shift)};
}

Coverage Slice::coverage(Span rows, Span columns) const {
  const Span kept_rows = intersect(rows, q);
  const Span kept_columns = intersect(columns, k);
  const Coverage inside = band.coverage(kept_rows, kept_columns);
  if (inside == Coverage::none) return Coverage::none;
  return inside == Coverage::full && kept_rows == rows && kept_columns == columns
             ? Coverage::full
             : Coverage::partial;
}

std::int64_t Slice::area() const {
  if (q.empty() || k.empty() || band.lo > band.hi) return 0;
  return pairs_up_to(q, k, band.hi) - pairs_up_to(q, k, band.lo - 1);
}

Slice clip(const Slice& slice, Span rows, Span columns) {
  Slice part{intersect(slice.q, rows), intersect(slice.k, columns), slice.band};
  if (part.q.empty() || part.k.empty() || part.band.lo > part.band.hi) {
    return {{part.q.begin, part.q.begin}, {part.k.begin, part.k.begin}, part.band};
  }
  part.q = intersect(part.q, {part.k.begin - part.band.hi, part.k.end - part.band.lo});
  part.k = intersect(part.k, {part.q.begin + part.band.lo, part.q.end + part.band.hi});
  return part;
}

std::vector<Segment> segments_of(std::span<const std::int32_t> ids) {
  std::vector<Segment> segments;
  const auto count = static_cast<std::int64_t>(ids.size());
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t id = ids[static_cast<std::size_t>(i)];
    if (segments.empty() || segments.back().id != id) segments.push_back({{i, i}, id});
    segments.back().rows.end = i + 1;
  }
  return segments;
}

std::vector<Segment> segments_of_offsets(std::span<const std::int64_t> offsets, std::int64_t seq) {
  require(!offsets.empty() && offsets.front() == 0, ExitCode::bad_data,
          "cumulative lengths: must start at 0");
  std::vector<Segment> segments;
  for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
    require(offsets[i] <= offsets[i + 1] && offsets[i + 1] <= seq, ExitCode::bad_data,
            "cumulative lengths: entry {} is {} after {}, of {} tokens", i + 1, offsets[i + 1],
            offsets[i], seq);
    segments.push_back({{offsets[i], offsets[i + 1]}, static_cast<std::int64_t>(i)});
  }
  if (offsets.back() < seq) segments.push_back({{offsets.back(), seq}, -1});
  return segments;
}

std::int64_t MaskSlices::area(std::int64_t batch) const {
  std::int64_t sum = 0;
  for (const Slice& slice : view().of_batch(batch)) sum += slice.area();
  return sum;
}

MaskSlices make_slices(const AttentionMask& mask, std::int64_t batch, std::int64_t seq_q,
                       std::int64_t seq_kv) {
  check_mask(mask, batch, seq_q, seq_kv);
  MaskSlices result;
  const bool by_batch = differs_by_batch(mask);
  for (std::int64_t b = 0; b < (by_batch ? batch : 1); ++b) {
    if (by_batch) result.batch_offsets.push_back(static_cast<std::int64_t>(result.slices.size()));
    append_batch_row(mask, b, seq_q, seq_kv, result.slices);
  }
  if (by_batch) result.batch_offsets.push_back(static_cast<std::int64_t>(result.slices.size()));
  return result;
}

}  // namespace annulus
