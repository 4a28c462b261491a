// Real processes: an output written by all ranks through one nameless file, read back by each, also
// by collective MPI-IO.

#include <gtest/gtest.h>

#include <filesystem>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/checkpoint.hpp"
#include "runtime/checkpoint_output.hpp"
#include "runtime/context.hpp"
#include "runtime/hdf5_sample.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kRows = 2003;
const Shape kShape{1, kRows, 4, 64};

// Zigzag: rank r has the r-th slice from either end.
Selection zigzag(const Context& context) {
  const std::int64_t parts = 2 * context.size();
  const auto slice = [&](std::int64_t i) {
    return Span{kRows * i / parts, kRows * (i + 1) / parts};
  };
  Selection mine(kShape);
  mine.set(1, {slice(context.rank()), slice(parts - 1 - context.rank())});
  return mine;
}

std::vector<float> expected(const Selection& mine) {
  std::vector<float> values;
  const std::int64_t row = kShape[2] * kShape[3];
  for (const Span& run : mine.runs(1)) {
    for (std::int64_t i = run.begin * row; i < run.end * row; ++i) {
      values.push_back(static_cast<float>(test::exact_value(i)));
    }
  }
  return values;
}

// A folder that all ranks know, removed by rank 0.
class SharedFolder {
 public:
  explicit SharedFolder(Context& context) : context_(context) {
    folder_ = std::filesystem::temp_directory_path() / "annulus_checkpoint_mpi_test";
    if (context.rank() == 0) std::filesystem::create_directories(folder_);
    context.world().barrier();
  }
  ~SharedFolder() {
    context_.world().barrier();
    std::error_code ignored;
    if (context_.rank() == 0) std::filesystem::remove_all(folder_, ignored);
  }
  std::string path() const { return folder_ + "/out.h5"; }
  std::size_t files() const {
    const std::filesystem::directory_iterator all(folder_);
    return static_cast<std::size_t>(std::distance(begin(all), end(all)));
  }

 private:
  Context& context_;
  std::string folder_;
};

void write(Context& context, const std::string& path) {
  const Selection mine = zigzag(context);
  std::vector<float> values = expected(mine);
  const OutputDataset dataset{"output/attention_outputs", kShape, DType::f32, mine,
                              ConstTensorView(values.data(), DType::f32, mine.shape())};
  OutputOptions options;
  options.force = true;
  write_checkpoint(context.world(), path, {&dataset, 1}, {}, options);
}

TEST(CheckpointUnderMpi, RanksWriteAndReadTheirParts) {
  Context context;
  const SharedFolder folder(context);
  write(context, folder.path());
  EXPECT_EQ(folder.files(), 1U);
  const Hdf5File file(folder.path());
  const DatasetInfo info = file.describe("output/attention_outputs");
  const Selection mine = zigzag(context);
  const std::vector<float> wanted = expected(mine);
  std::vector<float> values(wanted.size(), -1.0F);
  const TensorView view(values.data(), DType::f32, mine.shape());
  file.read(info, mine, view);
  EXPECT_EQ(values, wanted);
  ReadOptions options;
  options.staging_bytes = 100000;  // several rounds, not the same number on all ranks
  std::fill(values.begin(), values.end(), -1.0F);
  file.read_collectively(*context.mpi(), info, mine, view, options);
  EXPECT_EQ(values, wanted);
}

TEST(CheckpointUnderMpi, CollectiveReadsOfContiguousDataInAnyOrderOfBytes) {
  Context context;
  const SharedFolder folder(context);
  if (context.rank() == 0) {
    test::write_sample(folder.path(), {"query",
                                       {1, kRows, 4, 64},
                                       test::Form::f32,
                                       test::Pack::contiguous,
                                       {},
                                       true,
                                       test::exact_value});
  }
  context.world().barrier();
  const Hdf5File file(folder.path());
  const Selection mine = zigzag(context);
  const std::vector<float> wanted = expected(mine);
  std::vector<float> values(wanted.size(), -1.0F);
  file.read_collectively(*context.mpi(), file.describe("query"), mine,
                         TensorView(values.data(), DType::f32, mine.shape()));
  EXPECT_EQ(values, wanted);
}

TEST(CheckpointUnderMpi, AFailedCollectiveReadFailsEverywhere) {
  Context context;
  const SharedFolder folder(context);
  write(context, folder.path());
  const Hdf5File file(folder.path());
  Selection mine = zigzag(context);
  if (context.rank() == context.size() - 1) mine.set(1, {{kRows, kRows + 1}});
  std::vector<float> values(static_cast<std::size_t>(mine.shape().elements()));
  EXPECT_THROW(file.read_collectively(*context.mpi(), file.describe("output/attention_outputs"),
                                      mine, TensorView(values.data(), DType::f32, mine.shape())),
               Error);
}

}  // namespace
}  // namespace annulus
