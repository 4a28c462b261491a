#include "runtime/checkpoint_output.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <random>

#include "kernels/buffer.hpp"
#include "kernels/element.hpp"
#include "kernels/error.hpp"
#include "runtime/hdf5_file.hpp"
#include "runtime/hdf5_sample.hpp"
#include "runtime/output_layout.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus {
namespace {

using testing::run_ranks;

double value_at(std::int64_t index) { return test::exact_value(index); }

// One rank's part of a tensor whose element at row-major place i is value_at(i).
struct Part {
  Part(const Shape& shape, Selection selection, DType dtype) : mine(std::move(selection)) {
    const Shape strides = contiguous_strides(shape);
    const Shape local = mine.shape();
    bytes.resize(static_cast<std::size_t>(local.elements() * size_bytes(dtype)));
    view = TensorView(bytes.data(), dtype, local);
    for_each_box(mine, [&](const Box& box) {
      for (std::int64_t i = 0; i < box.extent.elements(); ++i) {
        std::int64_t global = 0;
        std::int64_t place = 0;
        std::int64_t rest = i;
        for (int dim = shape.rank() - 1; dim >= 0; --dim) {
          const std::int64_t at = rest % box.extent[dim];
          rest /= box.extent[dim];
          global += (box.global_begin[dim] + at) * strides[dim];
          place += (box.local_begin[dim] + at) * view.strides[dim];
        }
        store_element(bytes.data(), dtype, place, value_at(global));
      }
    });
  }
  Selection mine;
  std::vector<std::byte> bytes;
  TensorView view;
};

void expect_whole(const std::string& path, const std::string& dataset, const Shape& shape) {
  const Hdf5File file(path);
  const DatasetInfo info = file.describe(dataset);
  ASSERT_EQ(info.shape, shape);
  std::vector<double> values(static_cast<std::size_t>(shape.elements()), NAN);
  file.read(info, Selection(shape), TensorView(values.data(), DType::f64, shape));
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(values[i], value_at(static_cast<std::int64_t>(i))) << "element " << i;
  }
}

// Rows dealt at random to `ranks` in runs, heads to `tp` of them: some ranks may hold nothing.
std::vector<Selection> random_parts(std::mt19937& random, const Shape& shape, int ranks, int tp) {
  const int sp = ranks / tp;
  std::vector<std::vector<Span>> rows(static_cast<std::size_t>(sp));
  for (std::int64_t begin = 0; begin < shape[1];) {
    const auto length = static_cast<std::int64_t>(random() % 9 + 1);
    const std::int64_t end = std::min(shape[1], begin + length);
    rows[random() % rows.size()].push_back({begin, end});
    begin = end;
  }
  std::vector<Selection> parts;
  for (int rank = 0; rank < ranks; ++rank) {
    Selection part(shape);
    part.set(1, rows[static_cast<std::size_t>(rank / tp)]);
    const std::int64_t h = rank % tp;
    part.set(2, {{shape[2] * h / tp, shape[2] * (h + 1) / tp}});
    parts.push_back(part);
  }
  return parts;
}

class CheckpointOutputTest : public ::testing::Test {
 protected:
  std::string path(const std::string& name = "out.h5") const { return folder_.path(name); }

  void write(Communicator& ranks, const OutputDataset& dataset, bool force = false) {
    const OutputAttribute attributes[] = {{"operation", std::string("ring")},
                                          {"ranks", std::int64_t{ranks.size()}},
                                          {"scale", 0.125}};
    OutputOptions options;
    options.force = force;
    options.durable = false;
    write_checkpoint(ranks, path(), {&dataset, 1}, attributes, options);
  }

  // A small valid output, from one rank.
  void write_small(bool force = false) {
    const Shape shape{1, 16, 2, 8};
    run_ranks(1, [&](Communicator& ranks) {
      const Part part(shape, Selection(shape), DType::f32);
      write(ranks, {"output/attention_outputs", shape, DType::f32, part.mine, part.view}, force);
    });
  }

  std::string refusal(ExitCode code, const std::function<void()>& step) {
    try {
      step();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      return error.what();
    }
    ADD_FAILURE() << "nothing was thrown";
    return {};
  }

  test::ScratchFolder folder_;
};

TEST_F(CheckpointOutputTest, AnyDealOfRowsAndHeadsIsWrittenWhole) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (int trial = 0; trial < 12; ++trial) {
    const int ranks = std::array{1, 2, 3, 4, 6}[random() % 5];
    const int tp = ranks % 2 == 0 && random() % 2 == 0 ? 2 : 1;
    // Past 1 MiB now and then, so that there are several chunks.
    const std::int64_t rows = random() % 3 == 0 ? 3000 : static_cast<std::int64_t>(random() % 60);
    const Shape shape{2, rows, 4, 32};
    const DType dtype = std::array{DType::f32, DType::f16, DType::bf16, DType::f64}[random() % 4];
    const std::vector<Selection> parts = random_parts(random, shape, ranks, tp);
    run_ranks(ranks, [&](Communicator& communicator) {
      const Part part(shape, parts[static_cast<std::size_t>(communicator.rank())], DType::f32);
      write(communicator, {"output/attention_outputs", shape, dtype, part.mine, part.view}, true);
    });
    expect_whole(path(), "output/attention_outputs", shape);
    EXPECT_EQ(folder_.names(), std::vector<std::string>{"out.h5"});
  }
}

TEST_F(CheckpointOutputTest, ReplicasAreWrittenOnceAndStridedPartsAsTheyAre) {
  const Shape shape{1, 500, 6, 64};
  run_ranks(4, [&](Communicator& ranks) {
    Selection mine(shape);
    mine.set(1, {ranks.rank() / 2 == 0 ? Span{0, 200} : Span{200, 500}});
    const Part part(shape, mine, DType::f32);
    // The same part as [batch, heads, seq, dim] in memory.
    const Shape local = part.view.shape;
    std::vector<float> swapped(static_cast<std::size_t>(local.elements()));
    TensorView view(swapped.data(), DType::f32, {local[0], local[2], local[1], local[3]});
    copy(part.view, view.transposed(1, 2));
    write(ranks, {"output/attention_outputs", shape, DType::f32, mine, view.transposed(1, 2)});
  });
  expect_whole(path(), "output/attention_outputs", shape);
}

TEST_F(CheckpointOutputTest, PartsMustCoverTheShapeExactlyOnce) {
  const Shape shape{1, 100, 2, 8};
  const auto attempt = [&](Span first, Span second) {
    return refusal(ExitCode::bad_data, [&] {
      run_ranks(2, [&](Communicator& ranks) {
        Selection mine(shape);
        mine.set(1, {ranks.rank() == 0 ? first : second});
        const Part part(shape, mine, DType::f32);
        write(ranks, {"output/x", shape, DType::f32, mine, part.view});
      });
    });
  };
  EXPECT_EQ(attempt({0, 50}, {51, 100}), path() +
                                             ": output/x: 1584 of 1600 elements near "
                                             "[0, 0, 0, 0] are held by a rank, expected all");
  EXPECT_EQ(attempt({0, 52}, {50, 100}),
            path() + ": output/x: ranks 0 and 1 both hold elements near [0, 0, 0, 0]");
  EXPECT_TRUE(folder_.names().empty());
}

TEST_F(CheckpointOutputTest, AnExistingOutputIsKeptUnlessForced) {
  write_small();
  const std::vector<char> before = test::file_bytes(path());
  EXPECT_EQ(refusal(ExitCode::cannot_create, [&] { write_small(); }),
            path() + ": exists; use --force to replace it");
  EXPECT_EQ(test::file_bytes(path()), before);
  write_small(true);
  expect_whole(path(), "output/attention_outputs", {1, 16, 2, 8});
  EXPECT_EQ(folder_.names(), std::vector<std::string>{"out.h5"});
}

TEST_F(CheckpointOutputTest, ASymlinkAtTheDestinationIsReplacedNotFollowed) {
  test::write_bytes(path("victim"), {'k', 'e', 'e', 'p'});
  ASSERT_EQ(symlink(path("victim").c_str(), path().c_str()), 0);
  refusal(ExitCode::cannot_create, [&] { write_small(); });
  write_small(true);
  EXPECT_EQ(test::file_bytes(path("victim")), (std::vector<char>{'k', 'e', 'e', 'p'}));
  EXPECT_FALSE(std::filesystem::is_symlink(path()));
}

TEST_F(CheckpointOutputTest, PlacesThatCannotHoldAFileAreNamed) {
  const auto check = [&](const std::string& place) {
    return refusal(ExitCode::cannot_create, [&] {
      run_ranks(2, [&](Communicator& ranks) { require_writable_output(ranks, place, true); });
    });
  };
  EXPECT_NE(check(path("no/such.h5")).find("No such file or directory (errno 2)"),
            std::string::npos);
  EXPECT_EQ(check("/dev/full"), "/dev/full: exists and is not a regular file");
  EXPECT_EQ(check(folder_.folder() + "/.."), folder_.folder() + "/..: is no name for a file");
  EXPECT_EQ(check(folder_.folder() + "/"), folder_.folder() + "/: is no name for a file");
}

// Promise 10: a limit on file sizes raises SIGXFSZ, which must not end the process.
TEST_F(CheckpointOutputTest, AWriteThatDoesNotFitLeavesTheEarlierOutput) {
  write_small();
  const std::vector<char> before = test::file_bytes(path());
  rlimit old{};
  getrlimit(RLIMIT_FSIZE, &old);
  for (const rlim_t bytes :
       {rlim_t{0}, rlim_t{1000}, rlim_t{2000}, rlim_t{200000}, rlim_t{1 << 20}}) {
    const rlimit limit{bytes, old.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
    const Shape shape{1, 8192, 2, 64};
    const std::string message = refusal(ExitCode::io, [&] {
      run_ranks(3, [&](Communicator& ranks) {
        Selection mine(shape);
        const std::int64_t r = ranks.rank();
        mine.set(1, {{8192 * r / 3, 8192 * (r + 1) / 3}});
        const Part part(shape, mine, DType::f32);
        write(ranks, {"output/x", shape, DType::f32, mine, part.view}, true);
      });
    });
    setrlimit(RLIMIT_FSIZE, &old);
    EXPECT_NE(message.find(path()), std::string::npos) << message;
    EXPECT_NE(message.find("File too large (errno 27)"), std::string::npos) << message;
    EXPECT_EQ(test::file_bytes(path()), before);
    EXPECT_EQ(folder_.names(), std::vector<std::string>{"out.h5"});
  }
}

TEST_F(CheckpointOutputTest, EmptyTensorsAndEmptyRanksWork) {
  for (const Shape& shape : {Shape{1, 0, 2, 8}, Shape{1, 1, 2, 8}}) {
    run_ranks(3, [&](Communicator& ranks) {
      Selection mine(shape);
      mine.set(1, {{ranks.rank() == 2 ? 0 : shape[1], shape[1]}});
      const Part part(shape, mine, DType::f32);
      write(ranks, {"output/x", shape, DType::f32, mine, part.view}, true);
    });
    expect_whole(path(), "output/x", shape);
  }
}

TEST_F(CheckpointOutputTest, KeepsAttributes) {
  write_small();
  EXPECT_EQ(Hdf5File(path()).text_attribute("output", "operation"), "ring");
}

TEST(OutputLayout, ChunksFollowTheRanksWhereTheyCan) {
  const Shape shape{1, 4096, 8, 128};
  std::vector<Selection> parts;
  for (int rank = 0; rank < 8; ++rank) {
    Selection part(shape);
    part.set(1, {{1024 * (rank / 2), 1024 * (rank / 2 + 1)}})
        .set(2, {{4 * (rank % 2), 4 * (rank % 2) + 4}});
    parts.push_back(part);
  }
  const OutputLayout layout("x", shape, 4, parts);
  EXPECT_EQ(layout.chunk(), (Shape{1, 512, 4, 128}));
  EXPECT_TRUE(layout.shared_chunks().empty());
  EXPECT_EQ(layout.exclusive_chunks(3), (std::vector<std::int64_t>{5, 7}));
}

}  // namespace
}  // namespace annulus
