#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "device_tensor.hpp"
#include "kernels/attention.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "kernels/sm90/attention_sm90.hpp"
#include "random_slices.hpp"

// The Hopper kernel against the double reference on random shapes, masks and options. Needs a
// Hopper GPU: build/test_kernels --gtest_filter='Sm90*'; ANNULUS_FUZZ sets the number of shapes.
namespace annulus {
namespace {

struct Case {
  std::int64_t batch, seq_q, seq_kv, q_heads, kv_heads, head_dim, value_dim;
  DType dtype;
  float soft_cap = 0.0F;
  bool sinks = false;
  int segments = 1;
  bool ring = false;        // one call a segment, with carried state
  bool chained = false;     // the calls of a ring may overlap
  bool wide_output = true;  // fp32, or the type of the inputs
  float sharpness = 1.0F;   // of the scale; at 300, the scores of later blocks outgrow all ranges
};

struct Reference {
  std::vector<double> o, lse;
};

Reference reference(const AttentionProblem& problem, const Shape& o_shape, const Shape& lse_shape) {
  Reference result{std::vector<double>(static_cast<std::size_t>(o_shape.elements())),
                   std::vector<double>(static_cast<std::size_t>(lse_shape.elements()))};
  ForwardCall call;
  call.problem = problem;
  call.o = {result.o.data(), DType::f64, o_shape};
  call.log_sum_exp = {result.lse.data(), DType::f64, lse_shape};
  attention_forward(call, "reference");
  return result;
}

/// The tensors of a case, its mask, and the expected result.
class Problem {
 public:
  Problem(const Case& c, std::vector<Slice> slices, std::mt19937& random)
      : case_(c),
        q(Shape{c.batch, c.seq_q, c.q_heads, c.head_dim}, c.dtype, random),
        k(Shape{c.batch, c.seq_kv, c.kv_heads, c.head_dim}, c.dtype, random),
        v(Shape{c.batch, c.seq_kv, c.kv_heads, c.value_dim}, c.dtype, random),
        o_shape{c.batch, c.seq_q, c.q_heads, c.value_dim},
        lse_shape{c.batch, c.q_heads, c.seq_q},
        o(o_shape, c.wide_output ? DType::f32 : c.dtype),
        lse(lse_shape),
        slices_(std::move(slices)),
        sinks_(static_cast<std::size_t>(c.q_heads)),
        sinks_device_(Shape{c.q_heads}) {
    std::normal_distribution<float> normal;
    for (float& sink : sinks_) sink = normal(random);
    copy(ConstTensorView(sinks_.data(), DType::f32, Shape{c.q_heads}), sinks_device_.view());
  }

  AttentionProblem on_host() const {
    AttentionProblem problem = options();
    problem.q = q.host_view();
    problem.k = k.host_view();
    problem.v = v.host_view();
    if (case_.sinks) problem.sinks = {sinks_.data(), DType::f32, Shape{case_.q_heads}};
    return problem;
  }

  ForwardCall on_device() const {
    ForwardCall call;
    call.problem = options();
    call.problem.q = q.view;
    call.problem.k = k.view;
    call.problem.v = v.view;
    if (case_.sinks) call.problem.sinks = sinks_device_.view();
    call.o = o.view();
    call.log_sum_exp = lse.view();
    return call;
  }

  /// The mask of keys [begin, end), in indices from begin on.
  std::vector<Slice> slices_of(Span keys) const {
    std::vector<Slice> part;
    for (const Slice& slice : slices_) {
      const Span k_range = intersect(slice.k, keys);
      if (k_range.empty()) continue;
      part.push_back({slice.q,
                      {k_range.begin - keys.begin, k_range.end - keys.begin},
                      slice.band.shifted(0, keys.begin)});
    }
    return part;
  }

  void expect_close() const {
    const Reference expected = reference(on_host(), o_shape, lse_shape);
    const std::vector<float> actual = o.fetched();
    const std::vector<float> actual_lse = lse.fetched();
    // P is rounded to half a unit in the last place, at |O| <= max |V|; as much for the rest.
    const double unit = case_.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
    const double tolerance = 2.0 * unit * v.largest() + 1e-6;
    for (std::size_t i = 0; i < actual.size(); ++i) {
      ASSERT_NEAR(static_cast<double>(actual[i]), expected.o[i], tolerance) << "O at " << i;
    }
    for (std::size_t i = 0; i < actual_lse.size(); ++i) {
      if (std::isinf(expected.lse[i])) {
        ASSERT_EQ(actual_lse[i], -INFINITY) << "LSE at " << i;
      } else {
        ASSERT_NEAR(static_cast<double>(actual_lse[i]), expected.lse[i],
                    1e-3 + 4e-6 * std::abs(expected.lse[i]))
            << "LSE at " << i;
      }
    }
  }

 private:
  AttentionProblem options() const {
    AttentionProblem problem;
    problem.mask = {slices_, {}};
    problem.scale = case_.sharpness / std::sqrt(static_cast<float>(case_.head_dim));
    problem.soft_cap = case_.soft_cap;
    return problem;
  }

  Case case_;

 public:
  DeviceTensor q, k, v;
  Shape o_shape, lse_shape;
  DeviceFloats o, lse;

 private:
  std::vector<Slice> slices_;
  std::vector<float> sinks_;
  DeviceFloats sinks_device_;
};

Span part_of(std::int64_t length, int i, int parts) {
  return {length * i / parts, length * (i + 1) / parts};
}

void run_segments(const Problem& problem, const Case& c) {
  std::vector<std::vector<Slice>> slices;
  std::vector<kernels::sm90::ForwardSegment> segments;
  for (int i = 0; i < c.segments; ++i) {
    slices.push_back(problem.slices_of(part_of(c.seq_kv, i, c.segments)));
  }
  for (int i = 0; i < c.segments; ++i) {
    const Span keys = part_of(c.seq_kv, i, c.segments);
    segments.push_back({problem.k.view.slice(1, keys),
                        problem.v.view.slice(1, keys),
                        {slices[static_cast<std::size_t>(i)], {}}});
  }
  kernels::sm90::forward_segments(problem.on_device(), segments);
}

void run_ring(const Problem& problem, const Case& c) {
  const DeviceFloats accumulator(problem.o_shape), max(problem.lse_shape), sum(problem.lse_shape);
  for (int i = 0; i < c.segments; ++i) {
    const Span keys = part_of(c.seq_kv, i, c.segments);
    const std::vector<Slice> slices = problem.slices_of(keys);
    ForwardCall call = problem.on_device();
    call.problem.k = problem.k.view.slice(1, keys);
    call.problem.v = problem.v.view.slice(1, keys);
    call.problem.mask = {slices, {}};
    call.state = {accumulator.view(), max.view(), sum.view()};
    call.start = i == 0 ? ForwardCall::Start::fresh : ForwardCall::Start::resume;
    call.chained = c.chained;
    if (i + 1 < c.segments) {
      call.o = {};
      call.log_sum_exp = {};
    }
    attention_forward(call, "sm90");
  }
}

void run(const Problem& problem, const Case& c) {
  if (c.ring) return run_ring(problem, c);
  if (c.segments > 1) return run_segments(problem, c);
  attention_forward(problem.on_device(), "sm90");
}

class Sm90 : public testing::Test {
 protected:
  void SetUp() override {
    if (kernels::cuda::device_count() == 0) GTEST_SKIP() << "no GPU here";
  }
};

std::int64_t pick(std::mt19937& random, std::initializer_list<std::int64_t> from) {
  return *(from.begin() + random() % from.size());
}

Case random_case(std::mt19937& random) {
  Case c{};
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
    const Case c = random_case(random);
    SCOPED_TRACE(testing::Message()
                 << "seed " << seed << " shape " << i << ": batch " << c.batch << " q " << c.seq_q
                 << "x" << c.q_heads << " kv " << c.seq_kv << "x" << c.kv_heads << " dim "
                 << c.head_dim << "/" << c.value_dim << " " << name(c.dtype) << " cap "
                 << c.soft_cap << " sinks " << c.sinks << " segments " << c.segments << " ring "
                 << c.ring << " chained " << c.chained << " wide output " << c.wide_output);
    const Problem problem(c, random_slices(random, c.seq_q, c.seq_kv), random);
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
          Case c{1, 70, 1500, heads, 1, dim, dim, dtype};
          c.sharpness = sharpness;
          const Problem problem(c, {{{0, 70}, {0, 1500}, {}}}, random);
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
      Case c{20, 700, 700, 8, 1, dim, dim, DType::bf16};
      c.wide_output = false;
      const Problem problem(c, slices, random);
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
        Case c{1, seq, seq, heads, length % 2 == 0 ? heads : 1, dim, dim, DType::bf16};
        c.ring = ring;
        c.wide_output = length == 17;
        const Problem problem(c, documents(9 * length, length), random);
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
    Case c{1, 40, 40, 1, 1, dim, dim, DType::bf16};
    c.wide_output = false;
    const Problem problem(c, causal_slices(40, 40), random);
    fill_bytes(problem.k.view.slice(1, {7, 8}).data, Device::cuda, 0xff, 2 * dim);
    run(problem, c);
    const std::vector<float> o = problem.o.fetched();
    for (std::int64_t i = 0; i < 40 * dim; ++i) {
      ASSERT_EQ(std::isnan(o[static_cast<std::size_t>(i)]), i / dim >= 7) << "dim " << dim;
    }
  }
}

// Few tiles over many keys: each is cut, and the last of its pieces to be done merges them.
TEST_F(Sm90, PiecesOfTilesGiveWholeRows) {
  std::mt19937 random(10);
  for (const std::int64_t dim : {64, 96, 128, 192, 256}) {
    for (const std::int64_t heads : {1, 2}) {
      for (const bool ring : {false, true}) {
        SCOPED_TRACE(testing::Message() << "dim " << dim << " heads " << heads << " ring " << ring);
        Case c{1, 130, 3000, heads, 1, dim, dim, DType::bf16};
        c.sinks = c.ring = ring;
        c.segments = ring ? 2 : 1;
        c.wide_output = heads == 1;
        const Problem problem(c, {{{0, 130}, {0, 3000}, {}}}, random);
        run(problem, c);
        problem.expect_close();
        if (HasFatalFailure()) return;
      }
    }
  }
}

// A row of queries and one element of the values, both NaN: the row, and the values' column in the
// rows of its head.
TEST_F(Sm90, PiecesOfTilesKeepNanToItsRows) {
  std::mt19937 random(11);
  for (const std::int64_t dim : {64, 128, 256}) {
    for (const bool ring : {false, true}) {
      SCOPED_TRACE(testing::Message() << "dim " << dim << " ring " << ring);
      Case c{1, 130, 3000, 2, 2, dim, dim, DType::bf16};
      c.ring = ring;
      c.segments = ring ? 2 : 1;
      const Problem problem(c, {{{0, 130}, {0, 3000}, {}}}, random);
      run(problem, c);
      const std::vector<float> clean = problem.o.fetched();
      fill_bytes(problem.q.view.slice(1, {5, 6}).data, Device::cuda, 0xff, 2 * dim);
      auto* value = static_cast<std::byte*>(problem.v.view.slice(1, {1000, 1001}).data) + 2 * 3;
      fill_bytes(value, Device::cuda, 0xff, 2);
      run(problem, c);
      const std::vector<float> o = problem.o.fetched();
      for (std::int64_t i = 0; i < problem.o_shape.elements(); ++i) {
        const std::int64_t row = i / dim / 2;
        const bool first_head = i / dim % 2 == 0;
        const auto at = static_cast<std::size_t>(i);
        if (first_head && (row == 5 || i % dim == 3)) {
          ASSERT_TRUE(std::isnan(o[at])) << "O at " << i;
        } else {
          ASSERT_NEAR(o[at], clean[at], 1e-3) << "O at " << i;
        }
      }
    }
  }
}

// Two calls in a graph, each with tiles that are cut, on memory that they share.
TEST_F(Sm90, GraphsOfCutTilesReplay) {
  std::mt19937 random(12);
  const Case few{1, 130, 3000, 1, 1, 64, 64, DType::bf16};
  const Case more{1, 400, 6000, 4, 4, 128, 128, DType::bf16};
  const Problem first(few, {{{0, 130}, {0, 3000}, {}}}, random);
  const Problem second(more, {{{0, 400}, {0, 6000}, {}}}, random);
  run(first, few);
  run(second, more);
  const std::vector<float> first_o = first.o.fetched();
  const std::vector<float> second_o = second.o.fetched();
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  for (const Problem* problem : {&first, &second}) {
    ForwardCall call = problem->on_device();
    call.stream.handle = stream;
    attention_forward(call, "sm90");
  }
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  for (int i = 0; i < 100; ++i) {
    for (const Problem* problem : {&first, &second}) {
      fill_bytes(problem->o.memory.data(), Device::cuda, 0xff, problem->o.memory.bytes());
    }
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    ASSERT_EQ(first.o.fetched(), first_o) << "replay " << i;
    ASSERT_EQ(second.o.fetched(), second_o) << "replay " << i;
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

void expect_repeats(const Case& c, const std::vector<Slice>& slices) {
  std::mt19937 random(5);
  const Problem problem(c, slices, random);
  run(problem, c);
  const std::vector<float> first = problem.o.fetched();
  for (int i = 0; i < 1000; ++i) {
    fill_bytes(problem.o.memory.data(), Device::cuda, 0xff, problem.o.memory.bytes());
    run(problem, c);
    ASSERT_EQ(problem.o.fetched(), first) << "repeat " << i;
  }
}

TEST_F(Sm90, RepeatsBitForBit) {
  expect_repeats({2, 700, 700, 8, 2, 128, 128, DType::bf16},
                 {{{0, 700}, {0, 700}, {-kUnbounded, 0}}});
}

TEST_F(Sm90, MergesPiecesBitForBit) {
  expect_repeats({1, 400, 6000, 4, 4, 128, 128, DType::bf16}, {{{0, 400}, {0, 6000}, {}}});
}

// Calls that begin before those whose state they resume have ended: with less than a tile a
// multiprocessor, and with several.
TEST_F(Sm90, ChainsRepeatBitForBit) {
  Case c{1, 2000, 8000, 4, 4, 128, 128, DType::bf16};
  c.segments = 8;
  c.ring = c.chained = true;
  expect_repeats(c, {{{0, c.seq_q}, {0, c.seq_kv}, {}}});
  c.seq_q = 9000;
  c.seq_kv = 1200;
  expect_repeats(c, {{{0, c.seq_q}, {0, c.seq_kv}, {}}});
}

// Launches begin where those before end, and wait for what these write.
TEST_F(Sm90, CallsReadWhatThoseBeforeThemWrote) {
  constexpr int kCalls = 50;
  std::mt19937 random(14);
  Case c{1, 3000, 3000, 8, 8, 128, 128, DType::bf16};
  c.wide_output = false;
  const Problem problem(c, {{{0, c.seq_q}, {0, c.seq_kv}, {-kUnbounded, 0}}}, random);
  const DeviceFloats other(problem.o_shape, c.dtype);
  const auto run_all = [&](bool apart) {
    ForwardCall call = problem.on_device();
    for (int i = 0; i < kCalls; ++i) {
      attention_forward(call, "sm90");
      if (apart) cudaDeviceSynchronize();
      call.problem.q = call.o;
      call.o = i % 2 == 0 ? other.view() : problem.o.view();
    }
  };
  run_all(true);
  const std::vector<float> expected = other.fetched();
  for (int repeat = 0; repeat < 10; ++repeat) {
    fill_bytes(other.memory.data(), Device::cuda, 0xff, other.memory.bytes());
    run_all(false);
    ASSERT_EQ(other.fetched(), expected) << "repeat " << repeat;
  }
}

TEST_F(Sm90, NamesWhatItDoesNotSupport) {
  std::mt19937 random(6);
  const Case c{1, 64, 64, 2, 2, 64, 64, DType::bf16};
  const Problem problem(c, {{{0, 64}, {0, 64}, {}}}, random);
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
