#include "sharding/attention_plan.hpp"

#include <algorithm>
#include <array>

#include "kernels/error.hpp"
#include "sharding/named_sharding.hpp"
#include "sharding/stage_builder.hpp"

namespace annulus {
namespace {

struct SchemeRow {
  Scheme scheme;
  std::string_view name;
};

constexpr std::array kSchemes{
    SchemeRow{Scheme::ring, "ring"}, SchemeRow{Scheme::all_gather, "all_gather"},
    SchemeRow{Scheme::ulysses, "ulysses"}, SchemeRow{Scheme::hybrid, "hybrid"}};

constexpr std::int64_t kFloatBytes = 4;

// 64 bits over a sequence of integers, a multiply and a shift each (as in splitmix64).
class Digest {
 public:
  void add(std::int64_t value) {
    state_ = (state_ ^ static_cast<std::uint64_t>(value)) * 0xBF58476D1CE4E5B9ULL;
    state_ ^= state_ >> 29;
  }
  void add(Span span) {
    add(span.begin);
    add(span.end);
  }
  void add(const SequenceLayout& layout) {
    add(std::int64_t{layout.ranks()});
    for (const SequenceLayout::Chunk& chunk : layout.chunks()) {
      add(chunk.global);
      add(std::int64_t{chunk.rank});
    }
  }
  std::uint64_t value() const { return state_; }

 private:
  std::uint64_t state_ = 0xCBF29CE484222325ULL;
};

std::uint64_t digest(const PlanRequest& request) {
  Digest digest;
  for (const std::int64_t field :
       {static_cast<std::int64_t>(request.scheme), request.batch, request.q_heads, request.kv_heads,
        request.group_size, request.q_head_offset, std::int64_t{request.node_ranks},
        request.stage_rows, request.block_rows, request.q_block_rows}) {
    digest.add(field);
  }
  digest.add(request.q_layout);
  digest.add(request.kv_layout);
  for (const Slice& slice : request.mask.slices) {
    digest.add(slice.q);
    digest.add(slice.k);
    digest.add(slice.band.lo);
    digest.add(slice.band.hi);
  }
  for (const std::int64_t offset : request.mask.batch_offsets) digest.add(offset);
  return digest.value();
}

int head_ranks_of(const PlanRequest& request) {
  if (request.scheme == Scheme::ulysses) return request.q_layout.ranks();
  return request.scheme == Scheme::hybrid ? request.node_ranks : 1;
}

void check_blocks(const PlanRequest& request) {
  const std::string_view scheme = name(request.scheme);
  const std::int64_t block = request.q_block_rows;
  require(request.block_rows > 0, ExitCode::internal, "{}: a grid of queries, but none of keys",
          scheme);
  for (const SequenceLayout::Chunk& chunk : request.q_layout.chunks()) {
    const Span rows = chunk.global;
    const bool whole =
        rows.begin % block == 0 && (rows.end % block == 0 || rows.end == request.q_layout.seq());
    require(whole, ExitCode::usage,
            "{}: queries {} to {} of rank {} cut a block of {} rows; accepted: whole blocks",
            scheme, rows.begin, rows.end, chunk.rank, block);
  }
}

void check(const PlanRequest& request, int head_ranks) {
  const std::string_view scheme = name(request.scheme);
  const int ranks = request.q_layout.ranks();
  require(ranks > 0 && request.kv_layout.ranks() == ranks, ExitCode::usage,
          "{}: queries over {} ranks and keys over {}; accepted: the same number", scheme, ranks,
          request.kv_layout.ranks());
  require(head_ranks > 0 && ranks % head_ranks == 0, ExitCode::usage,
          "{}: {} ranks do not divide into nodes of {}", scheme, ranks, head_ranks);
  require(
      head_ranks <= std::max<std::int64_t>(request.q_heads, 1), ExitCode::usage,
      "{}: {} ranks exchange heads but there are {} query heads; use ring, or hybrid with nodes "
      "of at most {}",
      scheme, head_ranks, request.q_heads, request.q_heads);
  const auto lists = static_cast<std::int64_t>(request.mask.batch_offsets.size()) - 1;
  require(lists < 0 || lists == request.batch, ExitCode::internal,
          "{}: slices of {} batch rows for batch {}", scheme, lists, request.batch);
  if (request.q_block_rows > 0) check_blocks(request);
}

std::int64_t rows_to_others(std::span<const Transfer> transfers, int self, std::int64_t batch) {
  std::int64_t rows = 0;
  for (const Transfer& transfer : transfers) {
    if (transfer.peer != self) rows += transfer.rows(batch);
  }
  return rows;
}

}  // namespace

std::string_view name(Scheme scheme) { return kSchemes.at(static_cast<std::size_t>(scheme)).name; }

std::optional<Scheme> parse_scheme(std::string_view text) {
  for (const SchemeRow& row : kSchemes) {
    if (row.name == text) return row.scheme;
  }
  return std::nullopt;
}

std::int64_t Transfer::rows(std::int64_t batch) const {
  std::int64_t rows = 0;
  for (const Piece& piece : pieces) {
    rows += piece.rows.size() * (piece.batch == Piece::kEveryBatch ? batch : 1);
  }
  return rows;
}

AttentionPlan::AttentionPlan(std::shared_ptr<const PlanRequest> request, int rank)
    : request_(std::move(request)), rank_(rank), head_ranks_(head_ranks_of(*request_)) {
  check(*request_, head_ranks_);
  q_layout_ = request_->q_layout.grouped(head_ranks_);
  kv_layout_ = request_->kv_layout.grouped(head_ranks_);
  const StageRules rules{request_->scheme == Scheme::all_gather, request_->stage_rows,
                         request_->block_rows};
  stages_ = build_stages(q_layout_, kv_layout_, request_->mask, group(), rules);
}

std::uint64_t AttentionPlan::hash() const { return digest(*request_); }

std::int64_t AttentionPlan::group_size() const {
  if (request_->group_size > 0) return request_->group_size;
  return std::max<std::int64_t>(request_->q_heads / std::max<std::int64_t>(request_->kv_heads, 1),
                                1);
}

Span AttentionPlan::q_heads_of(int head_rank) const {
  return split_evenly(request_->q_heads, head_ranks_, head_rank);
}

Span AttentionPlan::kv_heads_of(int head_rank) const {
  if (head_ranks_ == 1) return {0, request_->kv_heads};
  const Span q_heads = q_heads_of(head_rank);
  if (q_heads.empty()) return {0, 0};
  const std::int64_t offset = request_->q_head_offset;
  return {(q_heads.begin + offset) / group_size(), (q_heads.end - 1 + offset) / group_size() + 1};
}

std::int64_t AttentionPlan::max_buffer_rows(int parity) const {
  std::int64_t rows = 0;
  for (const Stage& stage : stages_) {
    if (stage.number > 0 && stage.number % 2 == parity) rows = std::max(rows, stage.buffer_rows);
  }
  return rows;
}

std::vector<BlockNode> AttentionPlan::gradient_nodes(int group) const {
  const std::int64_t block = request_->q_block_rows;
  if (block == 0) return {};
  std::vector<Span> held;
  for (const RowRun& run : q_layout_.runs(group)) {
    held.push_back({run.global.begin / block, (run.global.end + block - 1) / block});
  }
  return nodes_of(held, (q_layout_.seq() + block - 1) / block);
}

std::int64_t AttentionPlan::gradient_heads() const {
  return (request_->q_block_rows > 0 ? q_heads_of(head_rank()) : kv_heads_of(head_rank())).size();
}

std::int64_t AttentionPlan::area() const {
  std::int64_t area = 0;
  for (const Stage& stage : stages_) {
    const std::int64_t copies = stage.slices.batch_offsets.empty() ? request_->batch : 1;
    for (const Slice& slice : stage.slices.slices) area += copies * slice.area();
  }
  return area;
}

std::int64_t AttentionPlan::forward_bytes(std::int64_t head_dim, std::int64_t value_dim,
                                          std::int64_t element_bytes, bool log_sum_exp) const {
  std::int64_t bytes = 0;
  const std::int64_t kv_row = kv_heads_of(head_rank()).size() * (head_dim + value_dim);
  for (const Stage& stage : stages_) {
    bytes += rows_to_others(stage.sends, group(), request_->batch) * kv_row * element_bytes;
  }
  const Span own_heads = q_heads_of(head_rank());
  for (int peer = 0; peer < head_ranks_; ++peer) {
    if (peer == head_rank()) continue;
    const int peer_rank = group() * head_ranks_ + peer;
    const std::int64_t q_rows = request_->batch * request_->q_layout.rows(rank_);
    const std::int64_t kv_rows = request_->batch * request_->kv_layout.rows(rank_);
    const std::int64_t peer_rows = request_->batch * request_->q_layout.rows(peer_rank);
    bytes += q_rows * q_heads_of(peer).size() * head_dim * element_bytes;
    bytes += kv_rows * kv_heads_of(peer).size() * (head_dim + value_dim) * element_bytes;
    bytes += peer_rows * own_heads.size() * value_dim * element_bytes;
    if (log_sum_exp) bytes += peer_rows * own_heads.size() * kFloatBytes;
  }
  return bytes;
}

std::int64_t AttentionPlan::backward_bytes(std::int64_t head_dim, std::int64_t value_dim,
                                           std::int64_t element_bytes) const {
  std::int64_t bytes = 0;
  const std::int64_t kv_heads = kv_heads_of(head_rank()).size();
  const std::int64_t kv_row = kv_heads * (head_dim + value_dim);
  const std::int64_t grad_row = gradient_heads() * (head_dim + value_dim);
  const std::int64_t partials =
      request_->q_block_rows > 0 ? static_cast<std::int64_t>(gradient_nodes(group()).size()) : 1;
  for (const Stage& stage : stages_) {
    bytes += rows_to_others(stage.sends, group(), request_->batch) * kv_row * element_bytes;
    bytes += rows_to_others(stage.receives, group(), request_->batch) * partials * grad_row *
             kFloatBytes;
  }
  const std::int64_t q_heads = q_heads_of(head_rank()).size();
  for (int peer = 0; peer < head_ranks_; ++peer) {
    if (peer == head_rank()) continue;
    const int peer_rank = group() * head_ranks_ + peer;
    const std::int64_t q_rows = request_->batch * request_->q_layout.rows(rank_);
    const std::int64_t kv_rows = request_->batch * request_->kv_layout.rows(rank_);
    const std::int64_t statistics = 2 * kFloatBytes;  // log-sum-exp and delta
    bytes +=
        q_rows * q_heads_of(peer).size() * ((head_dim + value_dim) * element_bytes + statistics);
    bytes += kv_rows * kv_heads_of(peer).size() * (head_dim + value_dim) * element_bytes;
    bytes +=
        request_->batch * request_->q_layout.rows(peer_rank) * q_heads * head_dim * kFloatBytes;
    bytes += request_->batch * request_->kv_layout.rows(peer_rank) * grad_row * kFloatBytes;
  }
  return bytes;
}

}  // namespace annulus
