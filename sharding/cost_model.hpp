#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sharding/attention_plan.hpp"

namespace annulus {

/// How fast a rank works and how fast ranks talk. `annulus bench ring` measures them for a machine.
struct Rates {
  /// Kernels compute whole squares of so many queries and keys; 1: just the kept pairs.
  std::int64_t tile_rows = 1;
  double forward_flops = 1e11;  // products and sums of whole tiles, per second and rank
  double backward_flops = 1e11;
  /// Beside that, for each head and each tile of queries of a slice (below), however few its keys.
  double forward_tile_seconds = 0.0;
  double backward_tile_seconds = 0.0;
  double copy_bandwidth = 1e10;     // bytes per second a rank moves within its own memory
  double node_bandwidth = 1e10;     // bytes per second into a rank from its node
  double network_bandwidth = 1e10;  // bytes per second into a rank from other nodes
  double latency_seconds = 5e-6;    // until a message starts to arrive
  double call_seconds = 1e-5;       // of a kernel call, however short
  int node_ranks = 1;               // consecutive ranks of a node
  /// False where the receiver's own core copies messages of its node (shared memory on CPUs).
  bool hides_node_transfers = true;
  /// Ranks of a node read each other's KV where it lies.
  bool reads_in_place = false;
  /// A ring's forward pass is one launch over all stages, which carries no state between them.
  bool one_launch = false;
  /// One device has the memory of all ranks: a ring's rows are read, and its gradients added, where
  /// they lie. The rates are then of ranks that compute and copy at the same time.
  bool one_device = false;
};

/// Rates to go by where none were measured: of a core of a CPU whose node shares memory, or of an
/// H100 with eight a node over NVLink and 400 Gb/s a rank between nodes.
Rates default_rates(Device device);

/// Sizes that bytes and operations depend on besides the plan.
struct AttentionSizes {
  std::int64_t head_dim = 128;
  std::int64_t value_dim = 128;
  std::int64_t element_bytes = 2;
  bool log_sum_exp = true;
};

/// Floating-point operations of `area` kept pairs of one query head: 2 products forward, 5
/// backward.
double forward_flops(std::int64_t area, const AttentionSizes& sizes);
double backward_flops(std::int64_t area, const AttentionSizes& sizes);

/// What kernels compute of a slice.
struct TileWork {
  std::int64_t pairs = 0;  // in whole tiles
  std::int64_t tiles = 0;  // of queries that see some key
};
/// Tiles of queries begin at multiples of `tile_rows`, those of keys at the first key of a tile of
/// queries. Time grows with the tiles.
TileWork tile_work(const Slice& slice, std::int64_t tile_rows);
/// The same of a backward pass, whose tiles are of keys, from the slice's first on, and pass over
/// blocks of 5/8 as many queries, from the first that sees one of the keys.
TileWork backward_tile_work(const Slice& slice, std::int64_t tile_rows);

/// What each group of ranks (see AttentionPlan) computes, receives and sends, without making its
/// plan: exact, in time that grows with slices, chunks and the sum of both over the ranks.
struct GroupShares {
  std::vector<std::int64_t> area;           // kept pairs, all batch rows together
  std::vector<std::int64_t> rows_received;  // KV rows, every batch row counted
  std::vector<std::int64_t> rows_sent;
  std::vector<std::int64_t> rows_from_network;  // received from other nodes
};
/// `node_groups` consecutive groups share a node.
GroupShares group_shares(const SequenceLayout& q_layout, const SequenceLayout& kv_layout,
                         const MaskSlices& mask, std::int64_t batch, int node_groups = 1);

}  // namespace annulus
