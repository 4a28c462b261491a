#include "runtime/hdf5_file.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "kernels/element.hpp"
#include "kernels/error.hpp"
#include "runtime/hdf5_sample.hpp"

namespace annulus {
namespace {

using test::Form;
using test::Pack;
using test::SampleDataset;
using test::ScratchFolder;

// Sorted or not, disjoint or not: any ranges of [0, extent).
std::vector<Span> random_ranges(std::mt19937& random, std::int64_t extent) {
  std::vector<Span> ranges;
  const int count = std::uniform_int_distribution<int>(0, 3)(random);
  for (int i = 0; i <= count; ++i) {
    std::uniform_int_distribution<std::int64_t> edge(0, extent);
    const std::int64_t a = edge(random);
    const std::int64_t b = edge(random);
    ranges.push_back({std::min(a, b), std::max(a, b)});
  }
  return ranges;
}

Selection random_selection(std::mt19937& random, const Shape& shape) {
  Selection selection(shape);
  for (int dim = 0; dim < shape.rank(); ++dim) {
    if (random() % 3 != 0) selection.set(dim, random_ranges(random, shape[dim]));
  }
  return selection;
}

// Global coordinate of every local one.
std::vector<std::int64_t> coordinates(const Selection& selection, int dim) {
  std::vector<std::int64_t> list;
  for (const Span& run : selection.runs(dim)) {
    for (std::int64_t i = run.begin; i < run.end; ++i) list.push_back(i);
  }
  return list;
}

// A tensor inside a larger poisoned one, its dimensions in a random order.
struct Padded {
  Padded(std::mt19937& random, DType dtype, const Shape& shape) : shape_(shape) {
    std::vector<int> order(static_cast<std::size_t>(shape.rank()));
    std::iota(order.begin(), order.end(), 0);
    if (random() % 2 == 0) std::shuffle(order.begin(), order.end(), random);
    Shape strides = shape;
    std::int64_t stride = 1;
    for (const int dim : order) {
      strides[dim] = stride;
      stride *= shape[dim] + static_cast<std::int64_t>(random() % 2);
    }
    bytes.assign(static_cast<std::size_t>(stride * size_bytes(dtype) + 64), std::byte{0xab});
    view = TensorView(bytes.data() + 32, dtype, shape, strides);
  }
  // True when every byte outside the tensor's elements still has the poison.
  bool padding_intact() const {
    std::vector<std::byte> rest = bytes;
    clear(rest, 0, 0);
    return std::all_of(rest.begin(), rest.end(), [](std::byte b) { return b == std::byte{0xab}; });
  }
  void clear(std::vector<std::byte>& rest, int dim, std::int64_t offset) const {
    if (dim == shape_.rank()) {
      const auto at =
          rest.begin() + 32 + static_cast<std::ptrdiff_t>(offset * size_bytes(view.dtype));
      std::fill_n(at, size_bytes(view.dtype), std::byte{0xab});
      return;
    }
    for (std::int64_t i = 0; i < shape_[dim]; ++i) {
      clear(rest, dim + 1, offset + i * view.strides[dim]);
    }
  }

  std::vector<std::byte> bytes;
  TensorView view;
  Shape shape_;
};

void expect_values(const SampleDataset& sample, const Shape& shape, const Selection& selection,
                   const TensorView& view) {
  const Shape file_strides = contiguous_strides(shape);
  const auto b = coordinates(selection, 0);
  const auto t = coordinates(selection, 1);
  const auto h = coordinates(selection, 2);
  const auto d = coordinates(selection, 3);
  for (std::size_t i = 0; i < b.size(); ++i) {
    for (std::size_t j = 0; j < t.size(); ++j) {
      for (std::size_t k = 0; k < h.size(); ++k) {
        for (std::size_t l = 0; l < d.size(); ++l) {
          const std::int64_t index =
              b[i] * file_strides[0] + t[j] * file_strides[1] + h[k] * file_strides[2] + d[l];
          const std::int64_t written = shape.elements() / 2;
          const bool missing = sample.pack == Pack::missing_chunks && b[i] >= shape[0] / 2;
          ASSERT_TRUE(missing || index < written || sample.pack != Pack::missing_chunks);
          const double wanted = missing ? 1.5 : sample.value(index);
          const std::int64_t at = static_cast<std::int64_t>(i) * view.strides[0] +
                                  static_cast<std::int64_t>(j) * view.strides[1] +
                                  static_cast<std::int64_t>(k) * view.strides[2] +
                                  static_cast<std::int64_t>(l) * view.strides[3];
          ASSERT_EQ(load_element(view.data, view.dtype, at), wanted)
              << "element " << b[i] << "," << t[j] << "," << h[k] << "," << d[l];
        }
      }
    }
  }
}

class EveryForm : public testing::TestWithParam<Pack> {};

TEST_P(EveryForm, ReadsAnySelectionAsADoubleLoopDoes) {
  const Pack pack = GetParam();
  if (!test::is_available(pack)) GTEST_SKIP() << "this HDF5 cannot write it";
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const ScratchFolder folder;
  const std::string path = folder.path("in.h5");
  for (int f = 0; f <= static_cast<int>(Form::bf16_uint16); ++f) {
    for (const bool big_endian : {false, true}) {
      const auto form = static_cast<Form>(f);
      const bool opaque = form == Form::bf16_opaque || form == Form::bf16_opaque_named;
      if (opaque && (big_endian || pack == Pack::szip)) continue;
      const bool scaled = form == Form::f32 || form == Form::f64;  // all that HDF5 scales
      if (pack == Pack::scale_offset && !scaled) continue;
      SCOPED_TRACE(testing::Message() << name(form) << (big_endian ? " big-endian" : ""));
      const Shape shape{2, 21, 4, 8};
      const SampleDataset sample{"query",    {2, 21, 4, 8},    form, pack, {1, 5, 3, 8},
                                 big_endian, test::exact_value};
      test::write_sample(path, sample);
      const Hdf5File file(path);
      const DatasetInfo info = file.describe("query");
      EXPECT_EQ(info.shape, shape);
      EXPECT_EQ(info.type.big_endian, big_endian);
      for (int trial = 0; trial < 6; ++trial) {
        const Selection selection = random_selection(random, shape);
        constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16, DType::f64};
        Padded out(random, kTypes[random() % 4], selection.shape());
        ReadOptions options;
        if (trial % 2 == 0) options.staging_bytes = static_cast<std::int64_t>(random() % 600);
        file.read(info, selection, out.view, options);
        expect_values(sample, shape, selection, out.view);
        EXPECT_TRUE(out.padding_intact());
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Storage, EveryForm,
                         testing::Values(Pack::contiguous, Pack::compact, Pack::chunked, Pack::gzip,
                                         Pack::shuffle_gzip, Pack::fletcher,
                                         Pack::shuffle_gzip_fletcher, Pack::gzip_fletcher_first,
                                         Pack::szip, Pack::nbit, Pack::scale_offset,
                                         Pack::missing_chunks),
                         [](const auto& info) { return name(info.param); });

TEST(Hdf5File, ReadsIntegersOfEverySizeAndOrder) {
  const ScratchFolder folder;
  const std::string path = folder.path("in.h5");
  const auto value = [](std::int64_t i) { return static_cast<double>(i % 100); };
  for (int f = static_cast<int>(Form::i8); f <= static_cast<int>(Form::u64); ++f) {
    for (const bool big_endian : {false, true}) {
      const SampleDataset sample{"ids",      {3, 40}, static_cast<Form>(f), Pack::gzip, {2, 7},
                                 big_endian, value};
      SCOPED_TRACE(name(sample.form));
      test::write_sample(path, sample);
      const Hdf5File file(path);
      const Selection part = Selection::block({1, 5}, {2, 30});
      std::vector<std::int64_t> wide(60);
      file.read(file.describe("ids"), part, TensorView(wide.data(), DType::i64, {2, 30}));
      std::vector<std::int32_t> narrow(60);
      file.read(file.describe("ids"), part, TensorView(narrow.data(), DType::i32, {2, 30}));
      for (std::int64_t i = 0; i < 60; ++i) {
        const auto wanted = ((1 + i / 30) * 40 + 5 + i % 30) % 100;
        EXPECT_EQ(wide[static_cast<std::size_t>(i)], wanted);
        EXPECT_EQ(narrow[static_cast<std::size_t>(i)], wanted);
      }
    }
  }
}

// Numbers of few bits above the smallest, for every width and sign, and the fill value where
// nothing was written.
TEST(Hdf5File, ReadsScaledIntegers) {
  const ScratchFolder folder;
  const std::string path = folder.path("in.h5");
  const auto value = [](std::int64_t i) { return static_cast<double>(i * i % 23 + 40); };
  const auto negative = [](std::int64_t i) { return static_cast<double>(i * i % 23 - 11); };
  for (int f = static_cast<int>(Form::i8); f <= static_cast<int>(Form::u64); ++f) {
    for (const bool big_endian : {false, true}) {
      const auto form = static_cast<Form>(f);
      const bool is_signed = name(form)[0] == 'i';
      const SampleDataset sample{"ids",  {5, 40},    form, Pack::scale_offset,
                                 {2, 7}, big_endian, is_signed ? negative : value};
      SCOPED_TRACE(testing::Message() << name(form) << (big_endian ? " big-endian" : ""));
      test::write_sample(path, sample);
      const Hdf5File file(path);
      std::vector<std::int64_t> wide(200, -1);
      file.read(file.describe("ids"), Selection({5, 40}),
                TensorView(wide.data(), DType::i64, {5, 40}));
      for (std::int64_t i = 0; i < 200; ++i) {
        ASSERT_EQ(static_cast<double>(wide[static_cast<std::size_t>(i)]), sample.value(i)) << i;
      }
    }
  }
}

TEST(Hdf5File, ReadsBooleansAsBytes) {
  const ScratchFolder folder;
  const std::string path = folder.path("in.h5");
  test::write_sample(path,
                     {"mask", {4, 6}, Form::boolean, Pack::gzip, {4, 6}, false, [](std::int64_t i) {
                        return static_cast<double>(i % 3 == 0);
                      }});
  const Hdf5File file(path);
  std::vector<std::uint8_t> mask(24, 7);
  file.read(file.describe("mask"), Selection({4, 6}), TensorView(mask.data(), DType::u8, {4, 6}));
  for (std::size_t i = 0; i < 24; ++i) EXPECT_EQ(mask[i], i % 3 == 0 ? 1 : 0);
}

// Message of the Error that `step` throws.
std::string message_of(ExitCode code, const std::function<void()>& step) {
  try {
    step();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(Hdf5File, RefusesIntegersThatDoNotFit) {
  const ScratchFolder folder;
  const std::string path = folder.path("in.h5");
  test::write_sample(path, {"ids", {3}, Form::i64, Pack::contiguous, {}, false, [](std::int64_t i) {
                              return static_cast<double>(i << 32);
                            }});
  const Hdf5File file(path);
  std::vector<std::int32_t> ids(3);
  const std::string message = message_of(ExitCode::bad_data, [&] {
    file.read(file.describe("ids"), Selection({3}), TensorView(ids.data(), DType::i32, {3}));
  });
  EXPECT_EQ(message, path + ": ids: the value 4294967296 does not fit 32 bits");
}

TEST(Hdf5File, NamesWhatThereIsWhenADatasetIsMissing) {
  const ScratchFolder folder;
  const std::string path = folder.path("in.h5");
  test::write_sample(path,
                     {"a/keys", {3}, Form::f32, Pack::contiguous, {}, false, test::exact_value});
  const Hdf5File file(path);
  EXPECT_EQ(message_of(ExitCode::missing_input, [&] { file.describe("key"); }),
            path + ": key: does not exist; the file has a/keys");
  EXPECT_EQ(message_of(ExitCode::bad_data, [&] { file.describe("a"); }),
            path + ": a: is not a dataset; the file has a/keys");
}

TEST(Hdf5File, TellsAMissingFileFromOneThatIsNoHdf5) {
  const ScratchFolder folder;
  const std::string path = folder.path("in.h5");
  EXPECT_EQ(message_of(ExitCode::missing_input, [&] { Hdf5File{path}; }),
            path + ": cannot be read: No such file or directory (errno 2)");
  test::write_bytes(path, std::vector<char>(5000, 'x'));
  EXPECT_EQ(message_of(ExitCode::bad_data, [&] { Hdf5File{path}; }),
            path + ": is not a readable HDF5 file: file signature not found");
  message_of(ExitCode::bad_data, [&] { Hdf5File{folder.folder()}; });
}

}  // namespace
}  // namespace annulus
