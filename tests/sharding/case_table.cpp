#include "sharding/case_table.hpp"

#include <random>

namespace annulus::testing {
namespace {

AttentionMask batch_documents() {
  AttentionMask mask;
  mask.causal = true;
  mask.q_segments = {segments_of_offsets(std::vector<std::int64_t>{0, 3, 50}, 61),
                     segments_of_offsets(std::vector<std::int64_t>{0, 31, 40, 61}, 61)};
  return mask;
}

AttentionMask block_mask() {
  AttentionMask mask;
  mask.block_q = 16;
  mask.block_kv = 8;
  for (int i = 0; i < 6 * 12; ++i) mask.kept_blocks.push_back(i % 3 == 0 || i % 7 == 2);
  return mask;
}

AttentionMask one_token_documents(std::int64_t seq) {
  AttentionMask mask;
  std::vector<Segment> segments;
  for (std::int64_t i = 0; i < seq; ++i) segments.push_back({{i, i + 1}, i});
  mask.q_segments = {segments};
  return mask;
}

AttentionMask prefix_mask() {
  AttentionMask mask = causal_mask();
  mask.prefix_lengths = {21, 5};
  return mask;
}

}  // namespace

AttentionMask causal_mask() {
  AttentionMask mask;
  mask.causal = true;
  return mask;
}

AttentionMask window_mask(std::int64_t left, std::int64_t right) {
  AttentionMask mask;
  mask.window_left = left;
  mask.window_right = right;
  return mask;
}

AttentionMask document_mask(const std::vector<std::int64_t>& offsets, std::int64_t seq,
                            bool causal) {
  AttentionMask mask;
  mask.causal = causal;
  mask.q_segments = {segments_of_offsets(offsets, seq)};
  return mask;
}

AttentionCase make_case(std::string name, AttentionMask mask, std::int64_t seq,
                        std::int64_t batch) {
  AttentionCase c;
  c.name = std::move(name);
  c.mask = std::move(mask);
  c.batch = batch;
  c.seq_q = c.seq_kv = seq;
  c.q_heads = 8;
  c.kv_heads = 4;
  return c;
}

std::vector<AttentionCase> mask_cases() {
  std::vector<AttentionCase> cases{
      make_case("full", {}, 53),
      make_case("causal", causal_mask(), 97, 2),
      make_case("window", window_mask(9, 0), 120),
      make_case("two-sided window", window_mask(7, 5), 77),
      make_case("documents", document_mask({0, 12, 48, 90}, 97), 97),
      make_case("documents across", document_mask({0, 69, 70}, 75, false), 75),
      make_case("documents of a batch", batch_documents(), 61, 2),
      make_case("one token a document", one_token_documents(40), 40),
      make_case("blocks", block_mask(), 96),
      make_case("prefix", prefix_mask(), 64, 2),
      make_case("three rows", causal_mask(), 3),
      make_case("one row", causal_mask(), 1),
  };
  AttentionCase cross = make_case("bottom right", causal_mask(), 90);
  cross.seq_q = 31;
  cases.push_back(cross);
  cross = make_case("fewer keys", causal_mask(), 20);
  cross.seq_q = 50;
  cases.push_back(cross);
  return cases;
}

std::vector<AttentionCase> feature_cases() {
  std::vector<AttentionCase> cases;
  AttentionCase c = make_case("sinks and cap", causal_mask(), 66);
  c.sinks = true;
  c.soft_cap = 3.0F;
  cases.push_back(c);
  c = make_case("dropout", document_mask({0, 30, 66}, 66), 66, 2);
  c.dropout = 0.25F;
  cases.push_back(c);
  c = make_case("dropout of a batch", batch_documents(), 61, 2);
  c.dropout = 0.1F;
  cases.push_back(c);
  c = make_case("bias", causal_mask(), 45, 2);
  c.bias = true;
  cases.push_back(c);
  c = make_case("one bias for all heads", batch_documents(), 61, 2);
  c.bias = true;
  c.bias_heads = 1;
  c.sinks = true;
  cases.push_back(c);
  c = make_case("dense mask", causal_mask(), 45);
  c.dense_mask = true;
  cases.push_back(c);
  c = make_case("other value dim, head-major", window_mask(20, 3), 64, 2);
  c.value_dim = 16;
  c.head_major = true;
  cases.push_back(c);
  c = make_case("one KV head", causal_mask(), 50);
  c.kv_heads = 1;
  cases.push_back(c);
  c = make_case("heads that do not divide", causal_mask(), 41);
  c.q_heads = 9;
  c.kv_heads = 3;
  cases.push_back(c);
  return cases;
}

std::vector<AttentionCase> length_cases(bool all) {
  std::vector<AttentionCase> cases{
      make_case("840", causal_mask(), 840),
      make_case("1000", window_mask(128, 0), 1000),
      make_case("3824", causal_mask(), 3824),
      make_case("4232 documents", document_mask({0, 120, 1248, 4232}, 4232), 4232),
      make_case("704 documents", document_mask({0, 698, 704}, 704, false), 704),
  };
  if (all) {
    cases.push_back(make_case("10000", window_mask(512, 512), 10000));
    cases.push_back(make_case("11021", causal_mask(), 11021));
  }
  for (AttentionCase& c : cases) {
    c.q_heads = 2;
    c.kv_heads = 1;
  }
  return cases;
}

std::vector<Choice> choices(int ranks) {
  std::vector<Choice> all{
      {Scheme::ring, 1}, {Scheme::all_gather, 1}, {Scheme::ulysses, 1}, {Scheme::hybrid, 1}};
  if (ranks % 2 == 0) all.back().node_ranks = 2;
  if (ranks % 3 == 0) all.back().node_ranks = 3;
  return all;
}

std::vector<SequenceLayout> layouts(const AttentionCase& c, std::int64_t seq, int ranks) {
  const MaskSlices mask = make_slices(c.mask, c.batch, c.seq_q, c.seq_kv);
  std::vector<SequenceLayout> all{SequenceLayout::contiguous(seq, ranks),
                                  SequenceLayout::zigzag(seq, ranks)};
  if (c.seq_q == c.seq_kv) all.push_back(SequenceLayout::balanced(mask, c.batch, seq, ranks, 6));
  return all;
}

std::uint64_t fresh_random_seed() { return std::random_device{}(); }

}  // namespace annulus::testing
