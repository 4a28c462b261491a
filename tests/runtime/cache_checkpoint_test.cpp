#include "runtime/cache_checkpoint.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "kernels/element.hpp"
#include "kernels/error.hpp"
#include "sharding/thread_communicator.hpp"
#include "tests/runtime/decode_checks.hpp"

namespace annulus::testing {
namespace {

std::string file_for(const char* name) {
  return (std::filesystem::temp_directory_path() / fmt::format("{}_{}.h5", name, ::getpid()))
      .string();
}

// A value for every element, exact in every dtype.
double value_at(std::int64_t sequence, std::int64_t position, std::int64_t head,
                std::int64_t column) {
  return static_cast<double>((sequence * 31 + position * 7 + head * 3 + column) % 251);
}

struct Expected {
  std::vector<std::int64_t> lengths;
  std::vector<std::int64_t> starts;
};

std::shared_ptr<KeyValueCache> empty_cache(const OperationMetadata& metadata, bool latent,
                                           std::int64_t page_size, DType dtype) {
  KeyValueCacheOptions options{.sequences = 3,
                               .kv_heads = latent ? 1 : 4,
                               .head_dim = 16,
                               .value_dim = 8,
                               .latent = latent,
                               .dtype = dtype,
                               .page_size = page_size,
                               .pages = 80};
  return std::make_shared<KeyValueCache>(metadata, options);
}

// Visits every element that lies on this rank.
template <typename Visit>
void for_each_element(KeyValueCache& cache, int rank, const Visit& visit) {
  const CachePages& pages = cache.pages();
  const Span own = pages.sequences();
  const int parts = cache.mesh().size(cache.axes().head);
  const Span heads =
      cache_heads(
          cache.options().kv_heads,
          parts)[static_cast<std::size_t>(cache.mesh().group_index(rank, cache.axes().head))]
          .front();
  for (const TensorView& view : {cache.key(), cache.value()}) {
    for (std::int64_t s = own.begin; s < own.end; ++s) {
      const std::int64_t length = pages.lengths()[static_cast<std::size_t>(s)];
      for (std::int64_t token = 0; token < pages.deal().tokens(length); ++token) {
        const std::int64_t page = pages.page_table()[static_cast<std::size_t>(
            (s - own.begin) * pages.max_pages() + token / view.shape[1])];
        for (std::int64_t h = 0; h < view.shape[2]; ++h) {
          for (std::int64_t d = 0; d < view.shape[3]; ++d) {
            const std::int64_t at = page * view.strides[0] +
                                    token % view.shape[1] * view.strides[1] + h * view.strides[2] +
                                    d;
            visit(view, at, value_at(s, pages.deal().position(token), heads.begin + h, d));
          }
        }
      }
    }
  }
}

void on_ranks(int ranks, const std::string& mesh,
              const std::function<void(Context&, const OperationMetadata&)>& body) {
  run_ranks(ranks, [&](Communicator& communicator) {
    Context context(communicator);
    body(context, decode_metadata(context, {.mesh = mesh}, DType::f32));
  });
}

class CacheCheckpoint : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Latent, CacheCheckpoint, ::testing::Bool());

TEST_P(CacheCheckpoint, LoadsOnAnotherMeshWithOtherPages) {
  const bool latent = GetParam();
  const std::string path = file_for("cache_checkpoint");
  on_ranks(4, "sp=2,tp=2", [&](Context& context, const OperationMetadata& metadata) {
    const auto cache = empty_cache(metadata, latent, 4, DType::bf16);
    cache->append(std::vector<std::int64_t>{37, 0, 5});
    cache->set_start(0, 3);
    for_each_element(*cache, context.rank(),
                     [](const TensorView& view, std::int64_t at, double value) {
                       store_element(view.data, view.dtype, at, value);
                     });
    save_cache(context, path, *cache);
  });
  for (const auto& [ranks, mesh] : {std::pair(1, "sp=1"), {3, "sp=3"}, {4, "dp=2,tp=2"}}) {
    SCOPED_TRACE(mesh);
    on_ranks(ranks, mesh, [&](Context& context, const OperationMetadata& metadata) {
      const auto cache = empty_cache(metadata, latent, 3, DType::f32);
      load_cache(context, path, *cache);
      EXPECT_EQ(cache->lengths()[0], 37);
      EXPECT_EQ(cache->lengths()[1], 0);
      EXPECT_EQ(cache->lengths()[2], 5);
      EXPECT_EQ(cache->starts()[0], 3);
      std::int64_t wrong = 0;
      std::int64_t seen = 0;
      for_each_element(*cache, context.rank(),
                       [&](const TensorView& view, std::int64_t at, double value) {
                         ++seen;
                         if (load_element(view.data, view.dtype, at) != value) ++wrong;
                       });
      EXPECT_EQ(wrong, 0) << "of " << seen;
    });
  }
  std::filesystem::remove(path);
}

TEST(CacheCheckpoint, RefusesWhatDoesNotFit) {
  const std::string path = file_for("cache_checkpoint_other");
  on_ranks(2, "sp=2", [&](Context& context, const OperationMetadata& metadata) {
    const auto cache = empty_cache(metadata, true, 4, DType::f32);
    cache->append(std::vector<std::int64_t>{9, 1, 2});
    for_each_element(*cache, context.rank(),
                     [](const TensorView& view, std::int64_t at, double value) {
                       store_element(view.data, view.dtype, at, value);
                     });
    save_cache(context, path, *cache);
    EXPECT_THROW(load_cache(context, path, *cache), Error);  // it is not empty
    const auto other = empty_cache(metadata, false, 4, DType::f32);
    try {
      load_cache(context, path, *other);
      ADD_FAILURE() << "the file has no values";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::bad_data) << error.what();
    }
  });
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace annulus::testing
