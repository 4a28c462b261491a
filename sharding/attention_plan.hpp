#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/mask.hpp"
#include "sharding/block_tree.hpp"
#include "sharding/sequence_layout.hpp"

namespace annulus {

/// How ranks share the work of one attention.
enum class Scheme : std::uint8_t {
  ring,        // KV rows travel from owner to reader, stage by stage; q stays
  all_gather,  // one KV head at a time is gathered whole, for one kernel without a merge
  ulysses,     // heads are exchanged against rows; every rank sees the whole sequence
  hybrid,      // ulysses inside a node, ring between nodes
};

std::string_view name(Scheme scheme);
std::optional<Scheme> parse_scheme(std::string_view text);

/// Everything that determines the plans of a sequence group: the same on all of its ranks.
struct PlanRequest {
  Scheme scheme = Scheme::ring;
  SequenceLayout q_layout;
  SequenceLayout kv_layout;
  MaskSlices mask;  // global positions, of the batch rows that the group works on
  std::int64_t batch = 1;
  std::int64_t q_heads = 1;
  std::int64_t kv_heads = 1;
  /// Query heads a KV head serves and the first one's place in its group, as in HeadGroups; 0:
  /// q_heads / kv_heads.
  std::int64_t group_size = 0;
  std::int64_t q_head_offset = 0;
  /// Hybrid: consecutive ranks that exchange heads.
  int node_ranks = 1;
  /// Ring: neighbouring ranks' rows share a stage until it has so many.
  std::int64_t stage_rows = 1024;
  /// Whole blocks of a global grid of KV rows are moved and computed; 0: no grid.
  std::int64_t block_rows = 0;
  /// Gradients of keys are sums over whole blocks of a global grid of query rows, which no rank
  /// shares with another (SequenceLayout::aligned); 0: no grid, else block_rows is not 0 either.
  std::int64_t q_block_rows = 0;
};

/// Rows of a peer's shard, for one batch row or for every one; they stand from `buffer_begin` on
/// in the receiver's buffer of the stage.
struct Piece {
  std::int64_t batch = kEveryBatch;
  Span rows;
  std::int64_t buffer_begin = 0;

  static constexpr std::int64_t kEveryBatch = -1;
  friend bool operator==(const Piece&, const Piece&) = default;
};

struct Transfer {
  int peer = 0;
  std::vector<Piece> pieces;

  /// Rows moved, where a piece for every batch row counts once for each.
  std::int64_t rows(std::int64_t batch) const;
};

/// One step of a rank: while it computes `slices` over this stage's KV rows, the next stage's
/// travel. Stages with the same number meet: what one rank sends, its peer receives.
struct Stage {
  int number = 0;
  std::vector<Transfer> receives;
  std::vector<Transfer> sends;
  /// Rows of the buffer; stage 0 reads the rank's own shard instead.
  std::int64_t buffer_rows = 0;
  /// Global positions of the buffer's rows: one list, or one for each batch row.
  std::vector<std::vector<RowRun>> runs;
  /// q in local rows, k in buffer rows.
  MaskSlices slices;
};

/// The plan of one rank: immutable, made before anything is sent, the same wherever it is made.
///
/// KV rows go straight from their owner to the rank that needs them, in a rotation: d ranks ahead
/// in the stage of distance d. The bytes are those of a ring that forwards its neighbour's block,
/// and rows that no slice needs are not sent: a window becomes a halo, a document stays with the
/// ranks that hold it. Farthest distances come first, so that the slowest transfers have most time.
class AttentionPlan {
 public:
  /// Throws usage when the scheme cannot serve the request, naming what would.
  /// Time and memory grow with the slices and with the ranks that this one talks to.
  AttentionPlan(std::shared_ptr<const PlanRequest> request, int rank);

  const PlanRequest& request() const { return *request_; }
  Scheme scheme() const { return request_->scheme; }
  int rank() const { return rank_; }
  int ranks() const { return request_->q_layout.ranks(); }

  /// Ranks that exchange heads among themselves (1: none), and groups of them that exchange KV.
  int head_ranks() const { return head_ranks_; }
  int groups() const { return ranks() / head_ranks_; }
  int head_rank() const { return rank_ % head_ranks_; }
  int group() const { return rank_ / head_ranks_; }
  /// Layouts between the groups; those of the request when no heads are exchanged.
  const SequenceLayout& q_layout() const { return q_layout_; }
  const SequenceLayout& kv_layout() const { return kv_layout_; }
  /// Query and KV heads that a rank of the head exchange computes.
  Span q_heads_of(int head_rank) const;
  Span kv_heads_of(int head_rank) const;
  std::int64_t group_size() const;

  std::span<const Stage> stages() const { return stages_; }
  /// Rows of the largest remote stage among those that share a buffer: of even numbers, or of odd.
  std::int64_t max_buffer_rows(int parity) const;
  /// Kept pairs of this rank, per query head.
  std::int64_t area() const;
  /// Nodes of the tree over the grid of query rows for which `group` computes gradients of keys: it
  /// holds all queries of each. One partial a node is returned, for each query head.
  std::vector<BlockNode> gradient_nodes(int group) const;
  /// Heads of dK and dV that are returned.
  std::int64_t gradient_heads() const;
  /// Payload this rank sends in one forward pass, and in one backward pass.
  std::int64_t forward_bytes(std::int64_t head_dim, std::int64_t value_dim,
                             std::int64_t element_bytes, bool log_sum_exp) const;
  std::int64_t backward_bytes(std::int64_t head_dim, std::int64_t value_dim,
                              std::int64_t element_bytes) const;
  /// Digest of the request: equal on ranks that planned the same.
  std::uint64_t hash() const;

 private:
  std::shared_ptr<const PlanRequest> request_;
  int rank_ = 0;
  int head_ranks_ = 1;
  SequenceLayout q_layout_;
  SequenceLayout kv_layout_;
  std::vector<Stage> stages_;
};

/// Slices of `mask` between the rows that `q_runs` and `k_runs` describe, in their local rows.
/// Runs are in global order; one list of `k_runs` serves every batch row, or one each.
MaskSlices localize(const MaskSlices& mask, std::span<const RowRun> q_runs,
                    std::span<const std::vector<RowRun>> k_runs);

}  // namespace annulus
