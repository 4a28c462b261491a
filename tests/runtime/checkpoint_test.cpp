#include "runtime/checkpoint.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "kernels/error.hpp"
#include "runtime/hdf5_sample.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus {
namespace {

using test::Form;
using test::Pack;
using test::SampleDataset;
using testing::run_ranks;
using Field = CheckpointField;

SampleDataset floats(const std::string& path, const std::vector<std::uint64_t>& dims) {
  return {path, dims, Form::f32, Pack::contiguous, {}, false, test::exact_value};
}

class CheckpointTest : public ::testing::Test {
 protected:
  CheckpointTest() { request_.path = folder_.path("in.h5"); }

  void write(const std::vector<SampleDataset>& datasets) {
    for (std::size_t i = 0; i < datasets.size(); ++i) {
      test::write_sample(request_.path, datasets[i], i > 0);
    }
  }

  // The Error of opening with two ranks, less the file's name.
  std::string refusal(ExitCode code) {
    std::array<std::string, 2> messages;
    run_ranks(2, [&](Communicator& ranks) {
      try {
        const Checkpoint checkpoint(ranks, request_);
        ADD_FAILURE() << "was accepted";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), code);
        messages[static_cast<std::size_t>(ranks.rank())] = error.what();
      }
    });
    EXPECT_EQ(messages[0], messages[1]);
    std::string text = messages[0];
    for (std::size_t at; (at = text.find(request_.path + ": ")) != std::string::npos;) {
      text.erase(at, request_.path.size() + 2);
    }
    return text;
  }

  std::string found_query() {
    std::string path;
    run_ranks(1, [&](Communicator& ranks) {
      path = Checkpoint(ranks, request_).dataset(Field::query).path;
    });
    return path;
  }

  std::vector<SampleDataset> plain() const {
    return {floats("query", {2, 12, 4, 8}), floats("key", {2, 16, 2, 8}),
            floats("value", {2, 16, 2, 8})};
  }

  test::ScratchFolder folder_;
  CheckpointRequest request_;
};

TEST_F(CheckpointTest, FindsTheNamesOfTheSample) {
  request_.path = std::string(ANNULUS_TEST_DATA) + "/smollm_sample.h5";
  run_ranks(2, [&](Communicator& ranks) {
    const Checkpoint checkpoint(ranks, request_);
    EXPECT_EQ(checkpoint.dataset(Field::query).path, "layers/14/attention/query");
    EXPECT_EQ(checkpoint.shape(Field::query), (Shape{1, 1024, 9, 64}));
    EXPECT_EQ(checkpoint.shape(Field::key), (Shape{1, 1024, 3, 64}));
    EXPECT_EQ(checkpoint.dtype(Field::value), DType::f32);
    EXPECT_FALSE(checkpoint.has(Field::documents));
  });
}

TEST_F(CheckpointTest, SearchesFullNamesThenShortOnesThenOneGroup) {
  write({floats("q", {1, 4, 2, 8}), floats("k", {1, 4, 2, 8}), floats("v", {1, 4, 2, 8})});
  EXPECT_EQ(found_query(), "q");
  for (const SampleDataset& dataset : plain()) test::write_sample(request_.path, dataset, true);
  EXPECT_EQ(found_query(), "query");
  write({floats("a/q", {1, 4, 2, 8}), floats("a/k", {1, 4, 2, 8}), floats("a/v", {1, 4, 2, 8}),
         floats("b/q", {1, 4, 2, 8})});
  EXPECT_EQ(found_query(), "a/q");
}

TEST_F(CheckpointTest, AsksWhenSeveralGroupsWouldDo) {
  write({floats("a/q", {1, 4, 2, 8}), floats("a/k", {1, 4, 2, 8}), floats("a/v", {1, 4, 2, 8}),
         floats("b/q", {1, 4, 2, 8}), floats("b/k", {1, 4, 2, 8}), floats("b/v", {1, 4, 2, 8})});
  EXPECT_EQ(refusal(ExitCode::bad_data),
            "2 groups have q, k and v (a/, b/); name the datasets with --query, --key, --value");
  request_.dataset(Field::query) = "b/q";
  request_.dataset(Field::key) = "b/k";
  request_.dataset(Field::value) = "b/v";
  EXPECT_EQ(found_query(), "b/q");
}

TEST_F(CheckpointTest, ReportsEveryProblemInOneRun) {
  write({floats("query", {2, 12, 4}),
         floats("key", {3, 16, 3, 8}),
         {"ids", {2, 12}, Form::f32, Pack::contiguous, {}, false, test::exact_value},
         {"mask", {2, 1, 12, 15}, Form::boolean, Pack::contiguous, {}, false, [](std::int64_t) {
            return 1.0;
          }}});
  request_.dataset(Field::documents) = "ids";
  request_.dataset(Field::mask) = "mask";
  request_.dataset(Field::query) = "query";
  request_.dataset(Field::key) = "key";
  request_.dataset(Field::value) = "value";
  EXPECT_EQ(refusal(ExitCode::bad_data),
            "query: rank 3 [2, 12, 4], expected rank 4 [batch, seq, heads, dim]; "
            "value: does not exist; the file has ids, key, mask, query; "
            "ids: stores f32, expected integers; ids: seq_kv 12, expected 16 as in key; "
            "mask: seq_kv 15, expected 16 as in key");
}

TEST_F(CheckpointTest, MissingThingsAloneAreMissingInput) {
  write({floats("query", {1, 4, 2, 8})});
  EXPECT_EQ(refusal(ExitCode::missing_input),
            "key: does not exist; the file has query; value: does not exist; the file has query");
  request_.path = folder_.path("none.h5");
  EXPECT_EQ(refusal(ExitCode::missing_input),
            "cannot be read: No such file or directory (errno 2)");
}

TEST_F(CheckpointTest, ComparesShapes) {
  write({floats("query", {2, 12, 4, 8}), floats("key", {3, 16, 3, 16}),
         floats("value", {2, 15, 2, 8})});
  EXPECT_EQ(refusal(ExitCode::bad_data),
            "key: batch 3, expected 2 as in query; value: seq 15, expected 16 as in key; "
            "value: heads 2, expected 3 as in key; key: head_dim 16, expected 8 as in query; "
            "query: 4 heads do not group over the 3 heads of key; expected a multiple");
}

TEST_F(CheckpointTest, RefusesIntegersForFloatsAndBareU16WithTheReason) {
  auto datasets = plain();
  datasets[0].form = Form::i32;
  datasets[1].form = Form::u16;
  write(datasets);
  EXPECT_EQ(refusal(ExitCode::bad_data),
            "query: stores i32, expected f32, f16, bf16 or f64; "
            "key: stores u16, which would read 49216 for -3.0 if it holds bf16; give it the "
            "attribute dtype=\"bfloat16\"");
}

// Every rank reads its own rows and heads, of either layout in the file.
TEST_F(CheckpointTest, ReadsShardsOfBothLayouts) {
  constexpr std::int64_t kSeq = 13;
  for (const InputLayout layout : {InputLayout::bthd, InputLayout::bhtd}) {
    const bool swapped = layout == InputLayout::bhtd;
    const std::uint64_t seq = kSeq;
    const std::vector<std::uint64_t> q_dims = swapped ? std::vector<std::uint64_t>{2, 4, seq, 8}
                                                      : std::vector<std::uint64_t>{2, seq, 4, 8};
    const std::vector<std::uint64_t> k_dims = swapped ? std::vector<std::uint64_t>{2, 2, seq, 8}
                                                      : std::vector<std::uint64_t>{2, seq, 2, 8};
    write({floats("query", q_dims), floats("key", k_dims), floats("value", k_dims)});
    request_.layout = layout;
    run_ranks(3, [&](Communicator& ranks) {
      const Checkpoint checkpoint(ranks, request_);
      EXPECT_EQ(checkpoint.shape(Field::query), (Shape{2, kSeq, 4, 8}));
      const std::int64_t r = ranks.rank();
      Selection mine(checkpoint.shape(Field::query));
      mine.set(1, {{2 * r, 2 * r + 2}, {kSeq - 2 - 2 * r, kSeq - 2 * r}}).set(2, {{1, 3}});
      std::vector<float> part(static_cast<std::size_t>(mine.shape().elements()), NAN);
      checkpoint.read(ranks, Field::query, mine, TensorView(part.data(), DType::f32, mine.shape()));
      std::size_t next = 0;
      for (std::int64_t b = 0; b < 2; ++b) {
        for (std::int64_t row = 0; row < 4; ++row) {
          const std::int64_t t = row < 2 ? 2 * r + row : kSeq - 2 - 2 * r + row - 2;
          for (std::int64_t h = 1; h < 3; ++h) {
            for (std::int64_t d = 0; d < 8; ++d) {
              const std::int64_t index =
                  swapped ? ((b * 4 + h) * kSeq + t) * 8 + d : ((b * kSeq + t) * 4 + h) * 8 + d;
              ASSERT_EQ(part[next++], static_cast<float>(test::exact_value(index)));
            }
          }
        }
      }
    });
  }
}

TEST_F(CheckpointTest, ReadsDocumentsOffsetsMasksBiasAndSinks) {
  auto datasets = plain();
  datasets[0].dims = {2, 16, 4, 8};
  const auto ones = [](std::int64_t i) { return static_cast<double>(i % 2); };
  datasets.push_back({"ids", {2, 16}, Form::i16, Pack::gzip, {2, 16}, true, [](std::int64_t i) {
                        return static_cast<double>(i % 16 / 4) - 1;
                      }});
  datasets.push_back({"cu", {4}, Form::i64, Pack::contiguous, {}, false, [](std::int64_t i) {
                        return static_cast<double>(i * 5);
                      }});
  datasets.push_back({"m", {1, 1, 16, 16}, Form::u8, Pack::contiguous, {}, false, ones});
  datasets.push_back(
      {"b", {2, 4, 16, 16}, Form::f16, Pack::contiguous, {}, false, test::exact_value});
  datasets.push_back({"s", {4}, Form::f64, Pack::contiguous, {}, false, test::exact_value});
  write(datasets);
  request_.dataset(Field::documents) = "ids";
  request_.dataset(Field::cu_seqlens) = "cu";
  request_.dataset(Field::mask) = "m";
  request_.dataset(Field::bias) = "b";
  request_.dataset(Field::sinks) = "s";
  run_ranks(2, [&](Communicator& ranks) {
    const Checkpoint checkpoint(ranks, request_);
    EXPECT_EQ(checkpoint.dtype(Field::documents), DType::i32);
    EXPECT_EQ(checkpoint.dtype(Field::mask), DType::u8);
    EXPECT_EQ(checkpoint.dtype(Field::bias), DType::f16);
    EXPECT_EQ(checkpoint.read_integers(ranks, Field::cu_seqlens),
              (std::vector<std::int64_t>{0, 5, 10, 15}));
    EXPECT_EQ(checkpoint.read_integers(ranks, Field::documents)[17], -1);
    std::vector<std::uint8_t> mask(256);
    const Shape shape{1, 1, 16, 16};
    checkpoint.read(ranks, Field::mask, Selection(shape),
                    TensorView(mask.data(), DType::u8, shape));
    EXPECT_EQ(mask[7], 1);
    std::array<float, 4> sinks{};
    checkpoint.read(ranks, Field::sinks, Selection(Shape{4}),
                    TensorView(sinks.data(), DType::f32, Shape{4}));
    EXPECT_EQ(sinks[3], static_cast<float>(test::exact_value(3)));
  });
}

// One rank cannot read: the others throw with it instead of waiting.
TEST_F(CheckpointTest, RanksFailTogether) {
  write(plain());
  run_ranks(3, [&](Communicator& ranks) {
    const Checkpoint checkpoint(ranks, request_);
    Selection mine(checkpoint.shape(Field::query));
    if (ranks.rank() == 1) mine.set(1, {{10, 13}});
    std::vector<float> part(static_cast<std::size_t>(mine.shape().elements()));
    try {
      checkpoint.read(ranks, Field::query, mine, TensorView(part.data(), DType::f32, mine.shape()));
      ADD_FAILURE() << "was read";
    } catch (const Error& error) {
      EXPECT_EQ(error.what(), "rank 1: " + request_.path +
                                  ": query: [10, 13) of dimension 1 asked for, the shape is "
                                  "[2, 12, 4, 8]");
    }
  });
}

}  // namespace
}  // namespace annulus
