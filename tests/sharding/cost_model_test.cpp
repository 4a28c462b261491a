#include "sharding/cost_model.hpp"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "sharding/attention_plan.hpp"
#include "sharding/head_parts.hpp"
#include "sharding/memory_model.hpp"
#include "sharding/simulate.hpp"

namespace annulus {
namespace {

AttentionMask causal_mask() {
  AttentionMask mask;
  mask.causal = true;
  return mask;
}

AttentionMask window_mask(std::int64_t left) {
  AttentionMask mask = causal_mask();
  mask.window_left = left;
  return mask;
}

AttentionMask random_documents(std::int64_t seq, std::int64_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::int64_t> offsets{0, seq};
  for (std::int64_t i = 1; i < count; ++i) {
    offsets.push_back(static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(seq)));
  }
  std::sort(offsets.begin(), offsets.end());
  AttentionMask mask = causal_mask();
  mask.q_segments = {segments_of_offsets(offsets, seq)};
  return mask;
}

std::shared_ptr<PlanRequest> request_of(const AttentionMask& mask, std::int64_t seq, int ranks,
                                        Scheme scheme = Scheme::ring) {
  auto request = std::make_shared<PlanRequest>();
  request->scheme = scheme;
  request->q_layout = request->kv_layout = SequenceLayout::contiguous(seq, ranks);
  request->mask = make_slices(mask, 1, seq, seq);
  request->q_heads = 16;
  request->kv_heads = 8;
  return request;
}

std::int64_t all_forward_bytes(const std::shared_ptr<const PlanRequest>& request,
                               const AttentionSizes& sizes) {
  std::int64_t bytes = 0;
  for (int rank = 0; rank < request->q_layout.ranks(); ++rank) {
    bytes +=
        AttentionPlan(request, rank)
            .forward_bytes(sizes.head_dim, sizes.value_dim, sizes.element_bytes, sizes.log_sum_exp);
  }
  return bytes;
}

// Bytes a rank sends, of bf16: S tokens, N ranks, KV heads, D.
constexpr std::int64_t kSeq = 4096;
constexpr std::int64_t kDim = 64;

TEST(Bytes, RingSendsEveryRowToEveryOtherRankUnderAFullMask) {
  for (const int ranks : {1, 2, 4, 8}) {
    const auto request = request_of({}, kSeq, ranks);
    for (const Scheme scheme : {Scheme::ring, Scheme::all_gather}) {
      request->scheme = scheme;
      for (int rank = 0; rank < ranks; ++rank) {
        const AttentionPlan plan(request, rank);
        EXPECT_EQ(plan.forward_bytes(kDim, kDim, 2, false),
                  4 * kSeq * 8 * kDim * (ranks - 1) / ranks);
        // Backward: the same rows, and as many fp32 partials of dK and dV back.
        EXPECT_EQ(plan.backward_bytes(kDim, kDim, 2), 12 * kSeq * 8 * kDim * (ranks - 1) / ranks);
      }
    }
  }
}

TEST(Bytes, CausalNeedsHalfContiguousAndThreeQuartersZigzag) {
  const int ranks = 8;
  const AttentionSizes sizes{kDim, kDim, 2, false};
  const std::int64_t full = 4 * kSeq * 8 * kDim * (ranks - 1);
  const auto request = request_of(causal_mask(), kSeq, ranks);
  EXPECT_EQ(all_forward_bytes(request, sizes), full / 2);
  request->q_layout = request->kv_layout = SequenceLayout::zigzag(kSeq, ranks);
  // Of the two parts of rank o, rank r needs both behind r, else the front one and, where r holds
  // later rows than it, the back one.
  EXPECT_EQ(all_forward_bytes(request, sizes), full * 3 / 4);
}

TEST(Bytes, UlyssesFollowsItsFormulaWithFewerAndMoreKvHeadsThanRanks) {
  for (const int ranks : {2, 4, 8, 16}) {
    const auto request = request_of(causal_mask(), kSeq, ranks, Scheme::ulysses);
    const std::int64_t heads = 16 + std::max<std::int64_t>(8, ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      EXPECT_EQ(AttentionPlan(request, rank).forward_bytes(kDim, kDim, 2, false),
                4 * (kSeq / ranks) * kDim * heads * (ranks - 1) / ranks);
    }
  }
}

TEST(Bytes, HybridSendsOnlyItsShareOfKvHeadsOverTheNetwork) {
  const int ranks = 16;
  const int node_ranks = 4;
  const auto request = request_of({}, kSeq, ranks, Scheme::hybrid);
  request->node_ranks = node_ranks;
  Rates rates;
  rates.node_ranks = node_ranks;
  const AttentionSizes sizes{kDim, kDim, 2, false};
  const Simulation simulation = simulate(request, sizes, rates, Pass::forward);
  const int nodes = ranks / node_ranks;
  EXPECT_EQ(simulation.network_bytes_sent,
            std::int64_t{ranks} * 4 * (kSeq / ranks) * 8 * kDim * (nodes - 1));
  EXPECT_EQ(simulation.bytes_sent, all_forward_bytes(request, sizes));
}

TEST(Bytes, WindowSendsAtMostTwoHalos) {
  const std::int64_t seq = 1 << 20;
  const std::int64_t window = 4096;
  AttentionMask two_sided = window_mask(window);
  two_sided.causal = false;
  two_sided.window_right = window;
  for (const AttentionMask& mask : {window_mask(window), two_sided}) {
    const auto request = request_of(mask, seq, 64);
    const std::int64_t halo = window * 8 * 2 * kDim * 2;
    const std::int64_t sides = mask.causal ? 1 : 2;
    for (int rank = 0; rank < 64; ++rank) {
      const std::int64_t sent = AttentionPlan(request, rank).forward_bytes(kDim, kDim, 2, false);
      const bool edge = rank == 63 || (sides == 2 && rank == 0);
      EXPECT_EQ(sent, halo * (edge ? sides - 1 : sides)) << rank;
    }
  }
}

TEST(Bytes, DocumentsStayWithTheRanksThatHoldThem) {
  AttentionMask mask = causal_mask();
  std::vector<std::int64_t> offsets;
  for (std::int64_t at = 0; at <= kSeq; at += 256) offsets.push_back(at);
  mask.q_segments = {segments_of_offsets(offsets, kSeq)};
  EXPECT_EQ(all_forward_bytes(request_of(mask, kSeq, 8), {}), 0);
}

TEST(GroupShares, AreThoseOfThePlans) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  const std::int64_t seq = 3000;
  for (const AttentionMask& mask :
       {AttentionMask{}, causal_mask(), window_mask(100), random_documents(seq, 40, seed)}) {
    const MaskSlices slices = make_slices(mask, 1, seq, seq);
    for (const SequenceLayout& layout :
         {SequenceLayout::contiguous(seq, 6), SequenceLayout::zigzag(seq, 6),
          SequenceLayout::balanced(slices, 1, seq, 6, 50)}) {
      auto request = request_of(mask, seq, 6);
      request->q_layout = request->kv_layout = layout;
      request->batch = 2;
      const GroupShares shares = group_shares(layout, layout, slices, 2, 3);
      for (int rank = 0; rank < 6; ++rank) {
        const AttentionPlan plan(request, rank);
        std::int64_t received = 0, sent = 0, network = 0;
        for (const Stage& stage : plan.stages()) {
          for (const Transfer& transfer : stage.receives) {
            received += transfer.rows(2);
            if (transfer.peer / 3 != rank / 3) network += transfer.rows(2);
          }
          for (const Transfer& transfer : stage.sends) sent += transfer.rows(2);
        }
        const auto r = static_cast<std::size_t>(rank);
        EXPECT_EQ(shares.area[r], plan.area());
        EXPECT_EQ(shares.rows_received[r], received);
        EXPECT_EQ(shares.rows_sent[r], sent);
        EXPECT_EQ(shares.rows_from_network[r], network);
      }
    }
  }
}

TEST(Simulate, TotalsAreThoseOfTheTimelines) {
  const AttentionSizes sizes{kDim, kDim, 2, true};
  for (const Scheme scheme : {Scheme::ring, Scheme::all_gather, Scheme::ulysses, Scheme::hybrid}) {
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      auto request = request_of(causal_mask(), kSeq, 8, scheme);
      request->node_ranks = 2;
      const Simulation simulation = simulate(request, sizes, {}, pass);
      std::int64_t bytes = 0;
      double seconds = 0.0;
      for (const RankTimeline& timeline : simulation.timelines) {
        bytes += timeline.bytes_sent;
        seconds = std::max(seconds, timeline.seconds);
        EXPECT_NEAR(timeline.seconds, timeline.compute_seconds + timeline.exposed_seconds,
                    1e-9 + 1e-6 * timeline.seconds);
      }
      EXPECT_EQ(simulation.bytes_sent, bytes) << name(scheme);
      EXPECT_EQ(simulation.seconds, seconds);
      EXPECT_NEAR(simulation.imbalance, scheme == Scheme::ulysses ? 1.0 : 1.7, 0.2);
    }
  }
}

TEST(Simulate, BalanceHelpsAndOverlapHidesTransfers) {
  const AttentionSizes sizes{kDim, kDim, 2, false};
  Rates rates;
  rates.network_bandwidth = 1e11;
  auto request = request_of(causal_mask(), 65536, 8);
  const double contiguous = simulate(request, sizes, rates, Pass::forward).seconds;
  request->q_layout = request->kv_layout = SequenceLayout::zigzag(65536, 8);
  const Simulation zigzag = simulate(request, sizes, rates, Pass::forward);
  EXPECT_LT(zigzag.seconds, 0.6 * contiguous);
  const double ideal = zigzag.flops / 8 / rates.forward_flops;
  EXPECT_LT(zigzag.seconds, 1.1 * ideal);
  EXPECT_GE(zigzag.seconds, ideal);
}

TEST(Simulate, ExchangesHeadsBesideKernelsButForTheFirstAndTheLastPart) {
  const AttentionSizes sizes{128, 128, 2, true};
  const std::int64_t seq = 16384;
  auto request = request_of({}, seq, 2, Scheme::ulysses);
  request->q_heads = 64;
  const int parts = choose_head_parts(AttentionPlan(request, 0), sizes);
  ASSERT_EQ(parts, 4);
  Rates rates;
  rates.node_ranks = 2;
  rates.copy_bandwidth = 1e30;
  rates.latency_seconds = rates.call_seconds = 0.0;
  rates.forward_flops = 7e14;
  rates.node_bandwidth = 4e11;
  const auto bytes =
      static_cast<double>(AttentionPlan(request, 0).forward_bytes(128, 128, 2, true));
  const double compute = 32.0 * forward_flops(seq * seq, sizes) / rates.forward_flops;
  const auto seconds = [&] { return simulate(request, sizes, rates, Pass::forward).seconds; };
  EXPECT_NEAR(seconds(), compute + bytes / rates.node_bandwidth / parts, 1e-9);
  rates.node_bandwidth = 4e8;
  EXPECT_NEAR(seconds(), compute / parts + bytes / rates.node_bandwidth, 1e-6);
  rates.hides_node_transfers = false;
  EXPECT_NEAR(seconds(), compute + bytes / rates.node_bandwidth, 1e-6);
}

TEST(Simulate, LeavesOwnRowsWhereTheyLieInAnExchangeOfHeads) {
  const AttentionSizes sizes{128, 128, 2, true};
  auto request = request_of(causal_mask(), 16384, 2, Scheme::ulysses);
  request->q_heads = 64;
  request->kv_heads = 8;
  Rates in_place = default_rates(Device::cuda);
  Rates in_parts = in_place;
  in_parts.one_launch = false;
  Rates slow = in_place;
  slow.node_bandwidth = 1e10;
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const RankTimeline own = simulate(request, sizes, in_place, pass).timelines.front();
    const RankTimeline parts = simulate(request, sizes, in_parts, pass).timelines.front();
    // What travels is hidden but on a slow link; what is packed and unpacked never is.
    const double sent = static_cast<double>(own.bytes_sent);
    EXPECT_LT(own.exposed_seconds, 0.7 * parts.exposed_seconds);
    EXPECT_GT(own.exposed_seconds, sent / in_place.copy_bandwidth);
    const double exposed = simulate(request, sizes, slow, pass).timelines.front().exposed_seconds;
    EXPECT_GT(exposed, 0.5 * sent / slow.node_bandwidth);
  }
}

TEST(Simulate, ReadsAndAddsInPlaceWhereRanksShareADevice) {
  const AttentionSizes sizes{kDim, kDim, 2, true};
  const int ranks = 4;
  const auto request = request_of({}, kSeq, ranks);
  Rates rates;
  rates.one_device = rates.one_launch = true;
  rates.node_ranks = ranks;
  rates.node_bandwidth = rates.latency_seconds = 1.0;  // never
  rates.copy_bandwidth = 1e11;
  rates.call_seconds = 1e-5;
  const AttentionPlan plan(request, 1);
  const std::int64_t rows = kSeq / ranks * 8 * 2 * kDim;  // elements of K and V
  const double shared = static_cast<double>(2 * rows) / rates.copy_bandwidth;
  const double pairs = static_cast<double>(kSeq) * kSeq / ranks;
  const Simulation forward = simulate(request, sizes, rates, Pass::forward);
  const double flops = 16.0 * forward_flops(1, sizes) * pairs;
  EXPECT_NEAR(forward.seconds, shared + flops / rates.forward_flops + rates.call_seconds, 1e-9);
  EXPECT_EQ(forward.peak_memory_bytes, shard_bytes(plan, sizes, false) + 2 * rows);
  // Gradients of its own rows, to which others add: cleared, and added to the caller's.
  const Simulation backward = simulate(request, sizes, rates, Pass::backward);
  const double added = 2.0 * static_cast<double>(4 * rows) / rates.copy_bandwidth;
  EXPECT_NEAR(backward.seconds,
              shared + 2.5 * flops / rates.backward_flops + rates.call_seconds + added, 1e-9);
  EXPECT_EQ(backward.peak_memory_bytes, shard_bytes(plan, sizes, true) + (2 + 4) * rows);
}

TEST(Memory, OfOneLaunchIsRoomForTheRowsOfAllStages) {
  const AttentionSizes sizes{kDim, kDim, 2, true};
  const int ranks = 4;
  const auto request = request_of({}, kSeq, ranks);
  const AttentionPlan plan(request, 0);
  const std::int64_t stage = kSeq / ranks * 8 * 2 * kDim * 2;
  EXPECT_EQ(forward_buffer_bytes(plan, sizes, {.one_launch = true}), (ranks - 1) * stage);
  // By stages: two of them at a time, and the running state of the rank's rows.
  const std::int64_t state = kSeq / ranks * 16 * (kDim + 2) * 4;
  EXPECT_EQ(forward_buffer_bytes(plan, sizes, {}), 2 * stage + state);
}

TEST(ChooseScheme, KeepsKvOffASlowNetwork) {
  Rates rates;  // 8 ranks a node, fast inside, slow between
  rates.forward_flops = 5e14;
  rates.node_ranks = 8;
  rates.node_bandwidth = rates.copy_bandwidth = 4e11;
  rates.network_bandwidth = 1e10;
  auto request = request_of(causal_mask(), 1 << 20, 32);
  request->q_layout = request->kv_layout = SequenceLayout::zigzag(1 << 20, 32);
  const auto chosen = choose_scheme(*request, {}, rates, false);
  EXPECT_EQ(chosen->scheme, Scheme::hybrid);
  EXPECT_EQ(chosen->node_ranks, 8);
  // Documents that nobody else needs: exchanging heads would only cost.
  AttentionMask mask = causal_mask();
  std::vector<std::int64_t> offsets;
  for (std::int64_t at = 0; at <= 1 << 20; at += 1 << 15) offsets.push_back(at);
  mask.q_segments = {segments_of_offsets(offsets, 1 << 20)};
  const auto local = choose_scheme(*request_of(mask, 1 << 20, 32), {}, rates, false);
  EXPECT_EQ(local->scheme, Scheme::ring);
}

TEST(TileWork, IsThatOfTheTilesThatSeeSomething) {
  const std::uint32_t seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const auto draw = [&](int least, int most) {
    return std::uniform_int_distribution<std::int64_t>(least, most)(random);
  };
  for (int round = 0; round < 500; ++round) {
    const std::int64_t tile_rows = draw(1, 6);
    Slice slice;
    slice.q.begin = draw(0, 20);
    slice.q.end = slice.q.begin + draw(0, 20);
    slice.k.begin = draw(0, 20);
    slice.k.end = slice.k.begin + draw(0, 20);
    slice.band.lo = round % 3 == 0 ? -kUnbounded : draw(-30, 10);
    slice.band.hi =
        round % 3 == 1 ? kUnbounded : std::max<std::int64_t>(slice.band.lo, -30) + draw(0, 30);
    std::map<std::int64_t, std::set<std::int64_t>> keys;  // of each tile
    for (std::int64_t q = slice.q.begin; q < slice.q.end; ++q) {
      for (std::int64_t k = slice.k.begin; k < slice.k.end; ++k) {
        if (slice.keeps(q, k)) keys[q / tile_rows].insert(k);
      }
    }
    TileWork expected;
    for (const auto& [tile, seen] : keys) {
      const auto count = *seen.rbegin() - *seen.begin() + 1;
      ++expected.tiles;
      expected.pairs += (count + tile_rows - 1) / tile_rows * tile_rows * tile_rows;
    }
    const TileWork work = tile_work(slice, tile_rows);
    EXPECT_EQ(work.tiles, expected.tiles);
    EXPECT_EQ(work.pairs, tile_rows == 1 ? slice.area() : expected.pairs);
  }
}

TEST(TileWork, OfABackwardPassIsThatOfItsTilesOfKeys) {
  const Band causal{-kUnbounded, 0};
  const auto work = [](const Slice& slice) { return backward_tile_work(slice, 8); };
  EXPECT_EQ(work({{0, 10}, {3, 19}, {}}).tiles, 2);  // from the slice's first key on
  EXPECT_EQ(work({{0, 10}, {3, 19}, {}}).pairs, 2 * 8 * 10);
  EXPECT_EQ(work({{0, 11}, {3, 19}, {}}).pairs, 2 * 8 * 15);  // blocks of 5 queries
  // 16 queries see the first 8 keys, 8 the others.
  EXPECT_EQ(work({{20, 36}, {20, 36}, causal}).tiles, 2);
  EXPECT_EQ(work({{20, 36}, {20, 36}, causal}).pairs, 8 * (20 + 10));
  EXPECT_EQ(work({{20, 36}, {40, 50}, causal}).tiles, 0);
  EXPECT_EQ(backward_tile_work({{0, 10}, {0, 10}, causal}, 1).pairs, 55);
}

TEST(Simulate, ChargesWholeTiles) {
  const AttentionSizes sizes;
  Rates rates;
  rates.call_seconds = 0.0;
  const auto seconds = [&](const AttentionMask& mask, Pass pass) {
    return simulate(request_of(mask, 100, 1), sizes, rates, pass).seconds;
  };
  const double whole = seconds({}, Pass::forward);
  rates.tile_rows = 10;
  EXPECT_DOUBLE_EQ(seconds({}, Pass::forward), whole);
  EXPECT_NEAR(seconds(causal_mask(), Pass::forward), 0.55 * whole, 1e-9 * whole);
  rates.forward_tile_seconds = 1e-3;
  EXPECT_NEAR(seconds({}, Pass::forward), whole + 16 * 10 * 1e-3, 1e-9);
  const double backward = seconds({}, Pass::backward);
  rates.backward_tile_seconds = 1e-3;
  EXPECT_NEAR(seconds({}, Pass::backward), backward + 16 * 10 * 1e-3, 1e-9);
}

TEST(Simulate, CallsAKernelOnceWhereOneLaunchServesAllStages) {
  auto request = request_of({}, 1024, 4);
  request->stage_rows = 0;
  Rates rates;
  rates.latency_seconds = 0.0;
  rates.node_ranks = 4;
  rates.node_bandwidth = rates.copy_bandwidth = 1e30;
  const auto calls = [&](bool one_launch) {
    rates.one_launch = one_launch;
    rates.call_seconds = 0.0;
    const double without = simulate(request, {}, rates, Pass::forward).seconds;
    rates.call_seconds = 1.0;
    return simulate(request, {}, rates, Pass::forward).seconds - without;
  };
  EXPECT_NEAR(calls(false), 4.0, 1e-6);
  EXPECT_NEAR(calls(true), 1.0, 1e-6);
}

// Rows that a window needs of a neighbour cost no more in stages of their own than gathered, and
// gathering takes a kernel call for each KV head.
TEST(ChooseScheme, TakesARingForWindowsOnDevices) {
  const std::int64_t seq = 131072;
  auto request = request_of(window_mask(4096), seq, 2);
  request->q_heads = 64;
  const auto chosen = choose_scheme(*request, {}, default_rates(Device::cuda), true);
  EXPECT_EQ(name(chosen->scheme), "ring");
}

}  // namespace
}  // namespace annulus
