#include <gtest/gtest.h>

#include <cstdlib>

#include "forward_problem.hpp"
#include "kernels/sm90/attention_sm90.hpp"

// The Hopper kernel against the double reference on random shapes, masks and options. Needs a
// Hopper GPU: build/test_kernels --gtest_filter='Sm90*'; ANNULUS_FUZZ sets the number of shapes.
namespace annulus {
namespace {

std::int64_t pick(std::mt19937& random, std::initializer_list<std::int64_t> from) {
  return *(from.begin() + random() % from.size());
}

ForwardCase random_case(std::mt19937& random) {
  ForwardCase c{};
  c.batch = pick(random, {1, 2, 3});
  c.seq_q = pick(random, {1, 3, 64, 113, 128, 200, 300});
  c.seq_kv = pick(random, {0, 1, 17, 128, 130, 256, 300});
  c.kv_heads = pick(random, {1, 2});
  c.q_heads = c.kv_heads * pick(random, {1, 1, 2, 5, 8});
  c.head_dim = pick(random, {64, 96, 128, 192, 256});
  c.value_dim = c.head_dim == 192 && random() % 2 == 0 ? 128 : c.head_dim;
  c.dtype = random() % 2 == 0 ? DType::bf16 : DType::f16;
  c.soft_cap = random() % 5 == 0 ? 8.0F : 0.0F;
  c.sinks = random() % 4 == 0;
  c.segments = c.seq_kv < 8 ? 1 : static_cast<int>(pick(random, {1, 1, 2, 4, 8}));
  c.ring = random() % 2 == 0;
  c.chained = random() % 2 == 0;
  c.wide_output = random() % 3 == 0;
  return c;
}

TEST_F(Sm90, MatchesTheReferenceOnRandomShapes) {
  const char* wanted = std::getenv("ANNULUS_FUZZ");
  const int shapes = wanted == nullptr ? 60 : std::atoi(wanted);
  const std::uint32_t seed = std::random_device{}();
  std::mt19937 random(seed);
  for (int i = 0; i < shapes; ++i) {
    const ForwardCase c = random_case(random);
    SCOPED_TRACE(testing::Message()
                 << "seed " << seed << " shape " << i << ": batch " << c.batch << " q " << c.seq_q
                 << "x" << c.q_heads << " kv " << c.seq_kv << "x" << c.kv_heads << " dim "
                 << c.head_dim << "/" << c.value_dim << " " << name(c.dtype) << " cap "
                 << c.soft_cap << " sinks " << c.sinks << " segments " << c.segments << " ring "
                 << c.ring << " chained " << c.chained << " wide output " << c.wide_output);
    const ForwardProblem problem(c, random_slices(random, c.seq_q, c.seq_kv), random);
    run(problem, c);
    problem.expect_close();
    if (HasFatalFailure()) return;
  }
}

// Scores that leave the range of P's type against the maxima of the blocks before: the keys come
// last to first, so each of these blocks holds larger ones. Heads that do not divide a tile's rows
// leave rows that nobody wants.
TEST_F(Sm90, FollowsScoresThatOutgrowTheirMaxima) {
  std::mt19937 random(9);
  for (const std::int64_t dim : {64, 96, 128, 192, 256}) {
    for (const DType dtype : {DType::bf16, DType::f16}) {
      for (const std::int64_t heads : {1, 5}) {
        for (const float sharpness : {20.0F, 300.0F}) {
          SCOPED_TRACE(testing::Message() << "dim " << dim << " " << name(dtype) << " heads "
                                          << heads << " sharpness " << sharpness);
          ForwardCase c{1, 70, 1500, heads, 1, dim, dim, dtype};
          c.sharpness = sharpness;
          const ForwardProblem problem(c, {{{0, 70}, {0, 1500}, {}}}, random);
          run(problem, c);
          problem.expect_close();
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

std::vector<Slice> documents(std::int64_t seq, std::int64_t length) {
  std::vector<Slice> slices;
  for (std::int64_t begin = 0; begin < seq; begin += length) {
    const std::int64_t end = std::min(seq, begin + length);
    slices.push_back({{begin, end}, {begin, end}, {-kUnbounded, 0}});
  }
  return slices;
}

// More tiles than multiprocessors: each block walks several, the shortest of all heads last. A
// batch row alone leaves every block one tile at most.
TEST_F(Sm90, ManyTilesABlockGiveWhatOneDoes) {
  std::mt19937 random(7);
  for (const std::int64_t dim : {64, 96, 128, 192, 256}) {
    for (const std::vector<Slice>& slices :
         {causal_slices(700, 700), documents(700, 90), documents(700, 350),
          std::vector<Slice>{{{0, 700}, {0, 700}, {}}},
          std::vector<Slice>{{{0, 700}, {0, 700}, {-100, 20}}},
          std::vector<Slice>{{{0, 64}, {0, 128}, {}}, {{0, 700}, {128, 640}, {}}}}) {
      ForwardCase c{20, 700, 700, 8, 1, dim, dim, DType::bf16};
      c.wide_output = false;
      const ForwardProblem problem(c, slices, random);
      run(problem, c);
      const std::vector<float> together = problem.o.fetched();
      const std::vector<float> lse_together = problem.lse.fetched();
      for (const DeviceFloats* part : {&problem.o, &problem.lse}) {
        fill_bytes(part->memory.data(), Device::cuda, 0xff, part->memory.bytes());
      }
      for (std::int64_t row = 0; row < c.batch; ++row) {
        ForwardCall call = problem.on_device();
        for (auto* view : {&call.problem.q, &call.problem.k, &call.problem.v}) {
          *view = view->slice(0, {row, row + 1});
        }
        call.o = call.o.slice(0, {row, row + 1});
        call.log_sum_exp = call.log_sum_exp.slice(0, {row, row + 1});
        attention_forward(call, "sm90");
      }
      ASSERT_EQ(problem.o.fetched(), together) << "dim " << dim << ", " << slices.size();
      ASSERT_EQ(problem.lse.fetched(), lse_together) << "dim " << dim << ", " << slices.size();
    }
  }
}

// Tiles that end with their documents, the next one's rows in their place; packs of heads, carried
// states and outputs of 32 bits, which the copy engine does not write.
TEST_F(Sm90, DocumentsOfAllLengths) {
  std::mt19937 random(13);
  for (const std::int64_t dim : {64, 96, 128, 192, 256}) {
    for (const std::int64_t length : {1, 17, 130, 200, 333, 1500}) {
      if (length == 1500 && dim != 128) continue;  // long enough for tiles of 192 rows
      for (const bool ring : {false, true}) {
        SCOPED_TRACE(testing::Message()
                     << "dim " << dim << " length " << length << " ring " << ring);
        const std::int64_t heads = length == 1500 ? 1 : 3;
        const std::int64_t seq = 9 * length + 5;
        ForwardCase c{1, seq, seq, heads, length % 2 == 0 ? heads : 1, dim, dim, DType::bf16};
        c.ring = ring;
        c.wide_output = length == 17;
        const ForwardProblem problem(c, documents(9 * length, length), random);
        run(problem, c);
        problem.expect_close();
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(Sm90, KeysOfNanShowInTheRowsThatSeeThem) {
  std::mt19937 random(8);
  for (const std::int64_t dim : {64, 128, 256}) {
    ForwardCase c{1, 40, 40, 1, 1, dim, dim, DType::bf16};
    c.wide_output = false;
    const ForwardProblem problem(c, causal_slices(40, 40), random);
    fill_bytes(problem.k.view.slice(1, {7, 8}).data, Device::cuda, 0xff, 2 * dim);
    run(problem, c);
    const std::vector<float> o = problem.o.fetched();
    for (std::int64_t i = 0; i < 40 * dim; ++i) {
      ASSERT_EQ(std::isnan(o[static_cast<std::size_t>(i)]), i / dim >= 7) << "dim " << dim;
    }
  }
}

TEST_F(Sm90, NamesWhatItDoesNotSupport) {
  std::mt19937 random(6);
  const ForwardCase c{1, 64, 64, 2, 2, 64, 64, DType::bf16};
  const ForwardProblem problem(c, {{{0, 64}, {0, 64}, {}}}, random);
  const AttentionBackend& sm90 = kernels::sm90::backends().front();
  const AttentionProblem good = problem.on_device().problem;
  EXPECT_EQ(sm90.unsupported(good, Direction::forward), "");
  AttentionProblem bad = good;
  bad.dropout.probability = 0.5F;
  EXPECT_NE(sm90.unsupported(bad, Direction::forward).find("dropout"), std::string::npos);
  bad = good;
  bad.bias = bad.q;
  EXPECT_NE(sm90.unsupported(bad, Direction::forward).find("bias"), std::string::npos);
  bad = good;
  bad.dense_mask = bad.q;
  EXPECT_NE(sm90.unsupported(bad, Direction::forward).find("mask"), std::string::npos);
  bad = good;
  bad.q.strides[1] = 129;
  EXPECT_NE(sm90.unsupported(bad, Direction::forward).find("129"), std::string::npos);
  bad = good;
  bad.q.shape[3] = bad.k.shape[3] = bad.v.shape[3] = 80;
  EXPECT_NE(sm90.unsupported(bad, Direction::forward).find("80"), std::string::npos);
}

}  // namespace
}  // namespace annulus
