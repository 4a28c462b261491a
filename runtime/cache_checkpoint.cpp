#include "runtime/cache_checkpoint.hpp"

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/agreement.hpp"
#include "runtime/hdf5_file.hpp"

namespace annulus {
namespace {

constexpr const char* kKey = "cache/key";
constexpr const char* kValue = "cache/value";
constexpr const char* kLengths = "cache/lengths";
constexpr const char* kStarts = "cache/starts";

// A stretch of this rank's tokens of one sequence that lies in one page and one block of the deal.
struct Stretch {
  std::int64_t packed = 0;  // first row among the tokens of all sequences
  std::int64_t page = 0;
  std::int64_t row = 0;
  std::int64_t tokens = 0;
};

std::vector<Stretch> stretches_of(const KeyValueCache& cache) {
  const CachePages& pages = cache.pages();
  const CacheDeal deal = pages.deal();
  const std::int64_t page_size = pages.layout().page_size;
  const Span own = pages.sequences();
  std::vector<Stretch> stretches;
  std::int64_t first = 0;  // packed row of the sequence
  for (std::int64_t s = 0; s < pages.layout().sequences; ++s) {
    const std::int64_t length = pages.lengths()[static_cast<std::size_t>(s)];
    const std::int64_t tokens = own.contains(s) ? deal.tokens(length) : 0;
    const std::size_t table = static_cast<std::size_t>((s - own.begin) * pages.max_pages());
    for (std::int64_t token = 0; token < tokens;) {
      const std::int64_t left = std::min(
          {page_size - token % page_size, deal.block - token % deal.block, tokens - token});
      const std::int32_t page =
          pages.page_table()[table + static_cast<std::size_t>(token / page_size)];
      stretches.push_back({first + deal.position(token), page, token % page_size, left});
      token += left;
    }
    first += length;
  }
  return stretches;
}

// What of [tokens, kv_heads, dim] lies on this rank. Stretches follow each other in global order.
Selection selection_of(const KeyValueCache& cache, const std::vector<Stretch>& stretches,
                       const Shape& global, int rank) {
  Selection selection(global);
  std::vector<Span> rows;
  for (const Stretch& stretch : stretches) {
    rows.push_back({stretch.packed, stretch.packed + stretch.tokens});
  }
  const int parts = cache.mesh().size(cache.axes().head);
  const int part = cache.mesh().group_index(rank, cache.axes().head);
  selection.set(0, rows);
  selection.set(1, cache_heads(cache.options().kv_heads, parts)[static_cast<std::size_t>(part)]);
  return selection;
}

// Between the pages and rows [tokens of this rank, kv_heads, dim].
template <typename Move>
void for_each_stretch(const std::vector<Stretch>& stretches, const TensorView& pages,
                      const TensorView& rows, const Move& move) {
  std::int64_t next = 0;
  const Shape& strides = pages.strides;
  for (const Stretch& stretch : stretches) {
    const TensorView place = pages.slice(0, {stretch.page, stretch.page + 1})
                                 .slice(1, {stretch.row, stretch.row + stretch.tokens});
    const TensorView in_page(place.data, place.dtype,
                             Shape{stretch.tokens, pages.shape[2], pages.shape[3]},
                             Shape{strides[1], strides[2], strides[3]}, place.device);
    move(in_page, rows.slice(0, {next, next + stretch.tokens}));
    next += stretch.tokens;
  }
}

std::int64_t sum(std::span<const std::int64_t> values) {
  return std::accumulate(values.begin(), values.end(), std::int64_t{0});
}

// The cache's tensors by their paths: all of the keys' columns, and values of their own.
std::vector<std::pair<const char*, TensorView>> tensors_of(KeyValueCache& cache) {
  std::vector<std::pair<const char*, TensorView>> tensors{{kKey, cache.key()}};
  if (!cache.options().latent) tensors.emplace_back(kValue, cache.value());
  return tensors;
}

std::vector<std::int64_t> read_integers(const Hdf5File& file, const std::string& path,
                                        std::int64_t count) {
  const DatasetInfo info = file.describe(path);
  require(info.shape == Shape{count} && info.type.kind == StoredType::Kind::integer,
          ExitCode::bad_data, "{}: {} is {} {}; expected integers [{}]", file.path(), path,
          info.type.to_string(), info.shape.to_string(), count);
  std::vector<std::int64_t> values(static_cast<std::size_t>(count));
  file.read(info, Selection(info.shape), TensorView(values.data(), DType::i64, info.shape));
  return values;
}

void read_into(const Hdf5File& file, int rank, KeyValueCache& cache) {
  const std::vector<Stretch> stretches = stretches_of(cache);
  std::int64_t tokens = 0;
  for (const Stretch& stretch : stretches) tokens += stretch.tokens;
  for (const auto& [path, pages] : tensors_of(cache)) {
    const DatasetInfo info = file.describe(path);
    const Shape wanted{sum(cache.lengths()), cache.options().kv_heads, pages.shape[3]};
    require(info.shape == wanted && info.type.kind == StoredType::Kind::floating,
            ExitCode::bad_data, "{}: {} is {} {}; expected floats {}", file.path(), path,
            info.type.to_string(), info.shape.to_string(), wanted.to_string());
    Tensor rows(pages.dtype, Shape{tokens, pages.shape[2], pages.shape[3]});
    file.read(info, selection_of(cache, stretches, wanted, rank), rows.view());
    for_each_stretch(stretches, pages, rows.view(),
                     [](const TensorView& in_page, const TensorView& row) { copy(row, in_page); });
  }
}

}  // namespace

void save_cache(Context& context, const std::string& path, KeyValueCache& cache,
                const OutputOptions& options) {
  const std::vector<Stretch> stretches = stretches_of(cache);
  std::int64_t tokens = 0;
  for (const Stretch& stretch : stretches) tokens += stretch.tokens;
  std::vector<Tensor> parts;
  std::vector<OutputDataset> datasets;
  for (const auto& [name, pages] : tensors_of(cache)) {
    const Shape global{sum(cache.lengths()), cache.options().kv_heads, pages.shape[3]};
    Tensor rows(pages.dtype, Shape{tokens, pages.shape[2], pages.shape[3]});
    for_each_stretch(stretches, pages, rows.view(),
                     [](const TensorView& in_page, const TensorView& row) { copy(in_page, row); });
    parts.push_back(std::move(rows));
    datasets.push_back({name, global, pages.dtype,
                        selection_of(cache, stretches, global, context.rank()),
                        std::as_const(parts.back()).view()});
  }
  const Shape sequences{cache.pages().layout().sequences};
  for (const auto& [name, values] :
       {std::pair(kLengths, cache.lengths()), std::pair(kStarts, cache.starts())}) {
    datasets.push_back({name, sequences, DType::i64, Selection(sequences),
                        ConstTensorView(values.data(), DType::i64, sequences)});
  }
  write_checkpoint(context.world(), path, datasets, {}, options);
}

void load_cache(Context& context, const std::string& path, KeyValueCache& cache) {
  require(sum(cache.lengths()) == 0, ExitCode::usage,
          "cache: {} tokens are in it; {} is loaded into an empty one", sum(cache.lengths()), path);
  Hdf5Questions questions{{kKey, kLengths, kStarts}, {}, true};
  if (!cache.options().latent) questions.datasets.push_back(kValue);
  const Hdf5File file(context.world(), path, questions);
  agree(context.world(), [&] {
    const std::int64_t sequences = cache.pages().layout().sequences;
    const std::vector<std::int64_t> lengths = read_integers(file, kLengths, sequences);
    const std::vector<std::int64_t> starts = read_integers(file, kStarts, sequences);
    const std::vector<std::string> paths = file.dataset_paths();
    require(!cache.options().latent || std::find(paths.begin(), paths.end(), kValue) == paths.end(),
            ExitCode::bad_data, "{}: {} is there, and the cache is latent", path, kValue);
    for (std::size_t s = 0; s < starts.size(); ++s) {
      require(0 <= starts[s] && starts[s] <= lengths[s], ExitCode::bad_data,
              "{}: sequence {} starts at {} of {} tokens", path, s, starts[s], lengths[s]);
    }
    cache.append(lengths);
    for (std::size_t s = 0; s < starts.size(); ++s) {
      cache.set_start(static_cast<std::int64_t>(s), starts[s]);
    }
    read_into(file, context.rank(), cache);
  });
}

}  // namespace annulus
