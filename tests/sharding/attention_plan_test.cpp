#include "sharding/attention_plan.hpp"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "kernels/error.hpp"

namespace annulus {
namespace {

struct Case {
  std::string name;
  AttentionMask mask;
  std::int64_t batch = 1;
  std::int64_t seq_q = 0;
  std::int64_t seq_kv = 0;
};

AttentionMask with_documents(bool causal, const std::vector<std::vector<std::int64_t>>& offsets,
                             std::int64_t seq) {
  AttentionMask mask;
  mask.causal = causal;
  for (const auto& row : offsets) mask.q_segments.push_back(segments_of_offsets(row, seq));
  return mask;
}

std::vector<Case> cases() {
  AttentionMask causal;
  causal.causal = true;
  AttentionMask window;
  window.window_left = 5;
  window.window_right = 2;
  AttentionMask prefix = causal;
  prefix.prefix_lengths = {13, 0};
  AttentionMask blocks;
  blocks.block_q = 8;
  blocks.block_kv = 4;
  for (int i = 0; i < 10 * 20; ++i) blocks.kept_blocks.push_back(i % 7 == 0 || i % 5 == 3);
  return {{"full", {}, 1, 37, 50},
          {"causal", causal, 2, 64, 64},
          {"bottom right", causal, 1, 29, 71},
          {"window", window, 1, 83, 83},
          {"prefix", prefix, 2, 47, 47},
          {"blocks", blocks, 1, 80, 80},
          {"documents", with_documents(true, {{0, 20, 27, 90}}, 97), 3, 97, 97},
          {"batch documents", with_documents(false, {{0, 3, 50}, {0, 31, 40, 60}}, 60), 2, 60, 60},
          {"fewer rows than ranks", causal, 1, 3, 3},
          {"none", {}, 1, 0, 0}};
}

std::vector<SequenceLayout> layouts(const MaskSlices& mask, std::int64_t batch, std::int64_t seq,
                                    int ranks) {
  return {SequenceLayout::contiguous(seq, ranks), SequenceLayout::zigzag(seq, ranks),
          SequenceLayout::balanced(mask, batch, seq, ranks, 5)};
}

using Pair = std::pair<std::int64_t, std::int64_t>;

// Global (query, key) pairs that a plan computes in one batch row; the same pair twice counts two.
void add_pairs(const AttentionPlan& plan, std::int64_t b, std::map<Pair, int>& pairs) {
  for (const Stage& stage : plan.stages()) {
    const auto& runs = stage.runs[stage.runs.size() == 1 ? 0 : static_cast<std::size_t>(b)];
    const auto global_key = [&](std::int64_t row) {
      for (const RowRun& run : runs) {
        if (run.rows().contains(row)) return run.global.begin + row - run.begin;
      }
      ADD_FAILURE() << "buffer row " << row << " was never received";
      return std::int64_t{-1};
    };
    for (const Slice& slice : stage.slices.view().of_batch(b)) {
      for (std::int64_t q = slice.q.begin; q < slice.q.end; ++q) {
        const Span keys = intersect(slice.k, slice.band.keys_of(q));
        for (std::int64_t k = keys.begin; k < keys.end; ++k) {
          ++pairs[{plan.q_layout().global_row(plan.group(), q), global_key(k)}];
        }
      }
    }
  }
}

// The rows each side expects of one pair of ranks in one stage.
using Wire = std::map<std::tuple<int, int, int>, std::vector<Span>>;  // stage, from, to

void add_wires(const AttentionPlan& plan, Wire& sent, Wire& received) {
  for (const Stage& stage : plan.stages()) {
    for (const Transfer& transfer : stage.sends) {
      auto& spans = sent[{stage.number, plan.group(), transfer.peer}];
      for (const Piece& piece : transfer.pieces) spans.push_back(piece.rows);
    }
    for (const Transfer& transfer : stage.receives) {
      auto& spans = received[{stage.number, transfer.peer, plan.group()}];
      for (const Piece& piece : transfer.pieces) spans.push_back(piece.rows);
    }
  }
}

std::shared_ptr<PlanRequest> request_of(const Case& c, const SequenceLayout& q,
                                        const SequenceLayout& kv) {
  auto request = std::make_shared<PlanRequest>();
  request->q_layout = q;
  request->kv_layout = kv;
  request->mask = make_slices(c.mask, c.batch, c.seq_q, c.seq_kv);
  request->batch = c.batch;
  request->q_heads = 16;
  request->kv_heads = 4;
  return request;
}

// Together the ranks compute the mask, each pair once, and what one sends another receives.
void expect_exact(const Case& c, const std::shared_ptr<const PlanRequest>& request) {
  Wire sent;
  Wire received;
  std::vector<std::map<Pair, int>> pairs(static_cast<std::size_t>(c.batch));
  std::int64_t area = 0;
  for (int rank = 0; rank < request->q_layout.ranks(); ++rank) {
    const AttentionPlan plan(request, rank);
    if (plan.head_rank() != 0) continue;
    add_wires(plan, sent, received);
    area += plan.area();
    for (std::int64_t b = 0; b < c.batch; ++b)
      add_pairs(plan, b, pairs[static_cast<std::size_t>(b)]);
  }
  EXPECT_EQ(sent, received);
  std::int64_t expected_area = 0;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    std::map<Pair, int> expected;
    for (const Slice& slice : request->mask.view().of_batch(b)) {
      for (std::int64_t q = slice.q.begin; q < slice.q.end; ++q) {
        for (std::int64_t k = slice.k.begin; k < slice.k.end; ++k) {
          if (slice.keeps(q, k)) ++expected[{q, k}];
        }
      }
    }
    expected_area += static_cast<std::int64_t>(expected.size());
    EXPECT_EQ(pairs[static_cast<std::size_t>(b)], expected) << "batch row " << b;
  }
  EXPECT_EQ(area, expected_area);
}

TEST(AttentionPlan, ComputesEachKeptPairOnceAndSendsWhatIsReceived) {
  for (const Case& c : cases()) {
    for (const int ranks : {1, 2, 3, 4, 6, 8}) {
      const MaskSlices mask = make_slices(c.mask, c.batch, c.seq_q, c.seq_kv);
      const auto q_layouts = layouts(mask, c.batch, c.seq_q, ranks);
      const auto kv_layouts = layouts(mask, c.batch, c.seq_kv, ranks);
      for (std::size_t i = 0; i < q_layouts.size(); ++i) {
        for (const Scheme scheme :
             {Scheme::ring, Scheme::all_gather, Scheme::ulysses, Scheme::hybrid}) {
          for (const std::int64_t block_rows : {0, 8}) {
            for (const std::int64_t stage_rows : {0, 20}) {
              SCOPED_TRACE(testing::Message() << c.name << " ranks " << ranks << " layout " << i
                                              << " " << name(scheme) << " blocks " << block_rows);
              // Mixed kinds too: queries in one layout, keys in another.
              auto request = request_of(c, q_layouts[i], kv_layouts[(i * 2) % 3]);
              request->scheme = scheme;
              request->node_ranks = ranks % 2 == 0 ? 2 : 1;
              request->block_rows = block_rows;
              request->stage_rows = stage_rows;
              expect_exact(c, request);
            }
          }
        }
      }
    }
  }
}

TEST(AttentionPlan, SendsNoRowThatNoSliceNeeds) {
  for (const Case& c : cases()) {
    for (const SequenceLayout& layout :
         layouts(make_slices(c.mask, c.batch, c.seq_kv, c.seq_kv), c.batch, c.seq_kv, 4)) {
      if (c.seq_q != c.seq_kv) continue;
      const auto request = request_of(c, layout, layout);
      for (int rank = 0; rank < 4; ++rank) {
        const AttentionPlan plan(request, rank);
        for (const Stage& stage : plan.stages()) {
          if (stage.number == 0) continue;
          for (std::int64_t b = 0; b < c.batch; ++b) {
            std::vector<bool> used(static_cast<std::size_t>(stage.buffer_rows), false);
            for (const Slice& slice : stage.slices.view().of_batch(b)) {
              for (std::int64_t k = slice.k.begin; k < slice.k.end; ++k) {
                used[static_cast<std::size_t>(k)] = true;
              }
            }
            for (const Transfer& transfer : stage.receives) {
              for (const Piece& piece : transfer.pieces) {
                if (piece.batch != Piece::kEveryBatch && piece.batch != b) continue;
                for (std::int64_t i = 0; i < piece.rows.size(); ++i) {
                  EXPECT_TRUE(used[static_cast<std::size_t>(piece.buffer_begin + i)]) << c.name;
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(AttentionPlan, HashTellsRequestsApart) {
  const Case c = cases()[1];
  const SequenceLayout layout = SequenceLayout::contiguous(64, 4);
  const auto request = request_of(c, layout, layout);
  const std::uint64_t hash = AttentionPlan(request, 0).hash();
  EXPECT_EQ(hash, AttentionPlan(request, 3).hash());
  auto other = std::make_shared<PlanRequest>(*request);
  other->mask.slices.front().band.hi -= 1;
  EXPECT_NE(hash, AttentionPlan(other, 0).hash());
  other = std::make_shared<PlanRequest>(*request);
  other->kv_layout = SequenceLayout::zigzag(64, 4);
  EXPECT_NE(hash, AttentionPlan(other, 0).hash());
}

TEST(AttentionPlan, RefusesWhatASchemeCannotServe) {
  const Case c = cases()[1];
  const SequenceLayout layout = SequenceLayout::contiguous(64, 4);
  auto request = request_of(c, layout, layout);
  request->q_heads = 3;
  request->kv_heads = 1;
  request->scheme = Scheme::ulysses;
  try {
    const AttentionPlan plan(request, 0);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    EXPECT_NE(std::string(error.what()).find("4 ranks exchange heads but there are 3"),
              std::string::npos)
        << error.what();
  }
  request->scheme = Scheme::hybrid;
  request->node_ranks = 3;
  EXPECT_THROW(AttentionPlan(request, 0), Error);
  request->scheme = Scheme::ring;
  request->block_rows = request->q_block_rows = 24;
  try {
    const AttentionPlan plan(request, 0);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    EXPECT_NE(std::string(error.what()).find("queries 0 to 16 of rank 0 cut a block of 24 rows"),
              std::string::npos)
        << error.what();
  }
  request->q_layout = layout.aligned(24);
  EXPECT_NO_THROW(AttentionPlan(request, 0));
}

}  // namespace
}  // namespace annulus
