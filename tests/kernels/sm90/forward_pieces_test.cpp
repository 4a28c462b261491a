#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include "forward_problem.hpp"

// What takes several thread blocks or calls: pieces of tiles, graphs, repeats and chains. Needs a
// Hopper GPU.
namespace annulus {
namespace {

// Few tiles over many keys: each is cut, and the last of its pieces to be done merges them.
TEST_F(Sm90, PiecesOfTilesGiveWholeRows) {
  std::mt19937 random(10);
  for (const std::int64_t dim : {64, 96, 128, 192, 256}) {
    for (const std::int64_t heads : {1, 2}) {
      for (const bool ring : {false, true}) {
        SCOPED_TRACE(testing::Message() << "dim " << dim << " heads " << heads << " ring " << ring);
        ForwardCase c{1, 130, 3000, heads, 1, dim, dim, DType::bf16};
        c.sinks = c.ring = ring;
        c.segments = ring ? 2 : 1;
        c.wide_output = heads == 1;
        const ForwardProblem problem(c, {{{0, 130}, {0, 3000}, {}}}, random);
        run(problem, c);
        problem.expect_close();
        if (HasFatalFailure()) return;
      }
    }
  }
}

// As many tiles as two thirds of the multiprocessors, so that the others get a short piece of each
// two.
TEST_F(Sm90, LongAndShortPiecesOfTilesGiveWholeRows) {
  std::mt19937 random(15);
  int processors = 0;
  ASSERT_EQ(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0), cudaSuccess);
  for (const std::int64_t dim : {64, 128, 256}) {
    SCOPED_TRACE(testing::Message() << "dim " << dim);
    const std::int64_t heads = processors * 2 / 3;
    const ForwardCase c{1, 9, 4200, heads, heads, dim, dim, DType::bf16};
    const ForwardProblem problem(c, {{{0, 9}, {0, 4200}, {}}}, random);
    run(problem, c);
    problem.expect_close();
    if (HasFatalFailure()) return;
  }
}

// A row of queries and one element of the values, both NaN: the row, and the values' column in the
// rows of its head.
TEST_F(Sm90, PiecesOfTilesKeepNanToItsRows) {
  std::mt19937 random(11);
  for (const std::int64_t dim : {64, 128, 256}) {
    for (const bool ring : {false, true}) {
      SCOPED_TRACE(testing::Message() << "dim " << dim << " ring " << ring);
      ForwardCase c{1, 130, 3000, 2, 2, dim, dim, DType::bf16};
      c.ring = ring;
      c.segments = ring ? 2 : 1;
      const ForwardProblem problem(c, {{{0, 130}, {0, 3000}, {}}}, random);
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
  const ForwardCase few{1, 130, 3000, 1, 1, 64, 64, DType::bf16};
  const ForwardCase more{1, 400, 6000, 4, 4, 128, 128, DType::bf16};
  const ForwardProblem first(few, {{{0, 130}, {0, 3000}, {}}}, random);
  const ForwardProblem second(more, {{{0, 400}, {0, 6000}, {}}}, random);
  run(first, few);
  run(second, more);
  const std::vector<float> first_o = first.o.fetched();
  const std::vector<float> second_o = second.o.fetched();
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  for (const ForwardProblem* problem : {&first, &second}) {
    ForwardCall call = problem->on_device();
    call.stream.handle = stream;
    attention_forward(call, "sm90");
  }
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  for (int i = 0; i < 100; ++i) {
    for (const ForwardProblem* problem : {&first, &second}) {
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

void expect_repeats(const ForwardCase& c, const std::vector<Slice>& slices) {
  std::mt19937 random(5);
  const ForwardProblem problem(c, slices, random);
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
  ForwardCase c{1, 2000, 8000, 4, 4, 128, 128, DType::bf16};
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
  ForwardCase c{1, 3000, 3000, 8, 8, 128, 128, DType::bf16};
  c.wide_output = false;
  const ForwardProblem problem(c, {{{0, c.seq_q}, {0, c.seq_kv}, {-kUnbounded, 0}}}, random);
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

}  // namespace
}  // namespace annulus
