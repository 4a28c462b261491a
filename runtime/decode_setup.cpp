#include "runtime/decode_setup.hpp"

#include <algorithm>

#include "kernels/error.hpp"
#include "runtime/attention_setup.hpp"
#include "sharding/named_sharding.hpp"

namespace annulus {
namespace {

void check_rope(const AttentionInputs& inputs, DimOrder order, const Shape& query,
                std::int64_t rope) {
  for (const auto& [tensor, what, heads] :
       {std::tuple(inputs.decode.query_rope, "query_rope", query[2]),
        std::tuple(inputs.decode.key_rope, "key_rope", std::int64_t{1})}) {
    require(tensor != nullptr, ExitCode::usage, "{} is absent", what);
    const Shape found = bthd_shape(*tensor, order, what);
    const Shape wanted{query[0], query[1], heads, rope};
    require(found == wanted, ExitCode::bad_data, "{} is {}, expected {}", what, found.to_string(),
            wanted.to_string());
  }
}

// First rows of all sequences of the cache; those beyond what was given have none.
std::vector<std::int64_t> packed_begin(std::span<const std::int64_t> given, std::int64_t tokens,
                                       std::int64_t sequences) {
  require(!given.empty() && static_cast<std::int64_t>(given.size()) <= sequences + 1,
          ExitCode::usage,
          "query_begin has {} entries for packed queries over {} sequences; expected one more than "
          "sequences",
          given.size(), sequences);
  std::vector<std::int64_t> begin(given.begin(), given.end());
  require(
      begin.front() == 0 && begin.back() == tokens && std::is_sorted(begin.begin(), begin.end()),
      ExitCode::bad_data, "query_begin goes from {} to {}; expected to rise from 0 to {}",
      begin.front(), begin.back(), tokens);
  begin.resize(static_cast<std::size_t>(sequences + 1), tokens);
  return begin;
}

void check_cache(const KeyValueCache& cache, const DecodeSetup& setup, const Shape& query,
                 const DecodeOperation& operation) {
  require(cache.mesh() == operation.metadata().mesh, ExitCode::usage,
          "the cache lies on mesh {}, the operation on {}", cache.mesh().to_string(),
          operation.metadata().mesh.to_string());
  const bool latent = operation.traits().cache == DecodeOperation::Cache::latent;
  require(cache.options().latent == latent, ExitCode::usage,
          "takes a cache of {}, this is one of {}", latent ? "latent keys" : "keys and values",
          cache.options().latent ? "latent keys" : "keys and values");
  require(query[3] == cache.options().head_dim, ExitCode::bad_data,
          "head_dim {} of query, {} of the cache differ", query[3], cache.options().head_dim);
  require(setup.packed || query[0] == cache.options().sequences, ExitCode::bad_data,
          "query has {} batch rows, the cache {} sequences", query[0], cache.options().sequences);
}

void check_options(const AttentionInputs& inputs, const AttentionOptions& options) {
  require(inputs.bias == nullptr && inputs.mask == nullptr, ExitCode::usage,
          "takes no bias and no dense mask");
  const AttentionMask& mask = options.mask;
  require(mask.q_segments.empty() && mask.kv_segments.empty() && mask.prefix_lengths.empty() &&
              mask.block_q == 0,
          ExitCode::usage, "takes no segments, no prefixes and no blocks; a window is its mask");
  require(!options.attention_weights && !options.reproducible && !options.deal, ExitCode::usage,
          "forms no attention_weights, is not reproducible, and rows are dealt as the cache is");
}

void check_heads(const DecodeSetup& setup) {
  const std::int64_t heads = setup.query[2];
  require(heads > 0 && heads % setup.kv_heads == 0, ExitCode::bad_data,
          "{} query heads do not group over {} KV heads; the KV heads must divide the query heads",
          heads, setup.kv_heads);
  const int parts = setup.mesh.size(setup.axes.head);
  static_cast<void>(cache_heads(setup.kv_heads, parts));
  require(heads % parts == 0, ExitCode::usage,
          "{} query heads over {} ranks along the head axes; accepted: a multiple", heads, parts);
}

}  // namespace

std::vector<std::int64_t> DecodeSetup::rows() const {
  std::vector<std::int64_t> counts;
  for (std::size_t s = 0; s + 1 < query_begin.size(); ++s) {
    counts.push_back(query_begin[s + 1] - query_begin[s]);
  }
  return counts;
}

Span DecodeSetup::sequences_of(int rank) const {
  return split_evenly(sequences(), mesh.size(axes.batch), mesh.group_index(rank, axes.batch));
}

Span DecodeSetup::rows_of(int rank) const {
  const Span own = sequences_of(rank);
  return {query_begin[static_cast<std::size_t>(own.begin)],
          query_begin[static_cast<std::size_t>(own.end)]};
}

TensorLayout DecodeSetup::tokens_by_heads(std::int64_t heads, std::int64_t dim) const {
  const Shape shape{query[0], query[1], heads, dim};
  const AxisTuple head_axes = heads == 1 && query[2] != 1 ? AxisTuple{} : axes.head;
  if (!packed) {
    return TensorLayout(shape, NamedSharding(mesh, PartitionSpec({axes.batch, {}, head_axes, {}})));
  }
  std::vector<Runs> runs;
  const int parts = mesh.size(axes.batch);
  for (int part = 0; part < parts; ++part) {
    const Span own = split_evenly(sequences(), parts, part);
    runs.push_back({{query_begin[static_cast<std::size_t>(own.begin)],
                     query_begin[static_cast<std::size_t>(own.end)]}});
  }
  return TensorLayout(shape, NamedSharding(mesh, PartitionSpec({{}, axes.batch, head_axes, {}})))
      .with_runs(1, runs);
}

TensorLayout DecodeSetup::query_layout(std::int64_t dim) const {
  return tokens_by_heads(query[2], dim);
}

TensorLayout DecodeSetup::new_layout(std::int64_t dim) const {
  const TensorLayout layout = tokens_by_heads(kv_heads, dim);
  const int parts = mesh.size(axes.head);
  if (parts == 1 || layout.sharding().spec()[2].empty()) return layout;
  return layout.with_runs(2, cache_heads(kv_heads, parts));
}

CacheDeal DecodeSetup::given_deal(std::int64_t seq, int rank) const {
  const std::int64_t ranks = mesh.size(axes.sequence);
  return {std::max<std::int64_t>((seq + ranks - 1) / ranks, 1), ranks,
          mesh.group_index(rank, axes.sequence)};
}

TensorLayout DecodeSetup::given_layout(std::int64_t seq, std::int64_t dim) const {
  const AxisTuple head_axes = kv_heads == 1 ? AxisTuple{} : axes.head;
  TensorLayout layout(
      Shape{query[0], seq, kv_heads, dim},
      NamedSharding(mesh, PartitionSpec({axes.batch, axes.sequence, head_axes, {}})));
  const CacheDeal deal = given_deal(seq, 0);
  std::vector<Runs> runs;
  for (std::int64_t rank = 0; rank < deal.ranks; ++rank) {
    runs.push_back({{std::min(rank * deal.block, seq), std::min((rank + 1) * deal.block, seq)}});
  }
  layout = layout.with_runs(1, runs);
  const int parts = mesh.size(axes.head);
  return head_axes.empty() ? layout : layout.with_runs(2, cache_heads(kv_heads, parts));
}

TensorLayout DecodeSetup::output() const { return query_layout(value_dim); }

TensorLayout DecodeSetup::log_sum_exp() const { return row_layout(output()); }

TensorLayout DecodeSetup::sinks() const {
  return TensorLayout(Shape{query[2]}, NamedSharding(mesh, PartitionSpec({axes.head})));
}

TensorLayout DecodeSetup::split_output() const {
  AxisTuple both = axes.head;
  both.insert(both.end(), axes.sequence.begin(), axes.sequence.end());
  const TensorLayout whole = output();
  const PartitionSpec& spec = whole.sharding().spec();
  TensorLayout split(whole.global_shape(),
                     NamedSharding(mesh, PartitionSpec({spec[0], spec[1], both, {}})));
  if (packed) {
    std::vector<Runs> runs;
    for (int part = 0; part < mesh.size(axes.batch); ++part) {
      runs.push_back(whole.runs_of_part(1, part));
    }
    split = split.with_runs(1, runs);
  }
  std::vector<Runs> heads;
  const int parts = mesh.size(axes.head);
  const int ranks = mesh.size(axes.sequence);
  for (int part = 0; part < parts * ranks; ++part) {
    const Span own = split_evenly(query[2], parts, part / ranks);
    const Span share = split_evenly(own.size(), ranks, part % ranks);
    heads.push_back({{own.begin + share.begin, own.begin + share.end}});
  }
  return split.with_runs(2, heads);
}

TensorLayout DecodeSetup::split_log_sum_exp() const { return row_layout(split_output()); }

DecodeSetup make_decode_setup(const DecodeOperation& operation, const AttentionInputs& inputs,
                              const AttentionOptions& options) {
  using Cache = DecodeOperation::Cache;
  const Cache kind = operation.traits().cache;
  const KeyValueCache* cache = inputs.decode.cache.get();
  require(cache != nullptr || kind == Cache::given, ExitCode::usage,
          "needs a cache of pages; pass it in AttentionInputs::decode");
  check_options(inputs, options);
  check_output_dtype(options);
  check_tensors(inputs, operation.metadata().mesh);
  require(options.dropout.value_or(operation.metadata().dropout_prob) == 0.0F, ExitCode::usage,
          "takes no dropout");
  Shape query = bthd_shape(inputs.query, options.order, "query");
  DecodeSetup setup{
      .query = query, .mesh = operation.metadata().mesh, .axes = cache_axes(operation.metadata())};
  setup.packed = options.order == DimOrder::thd;
  if (cache != nullptr) {
    const std::int64_t latent = cache->options().value_dim;
    if (kind == Cache::latent) {
      require(query[3] == latent, ExitCode::bad_data, "query has {} latent columns, the cache {}",
              query[3], latent);
      check_rope(inputs, options.order, query, cache->options().head_dim - latent);
      query[3] = setup.query[3] = cache->options().head_dim;
    }
    check_cache(*cache, setup, query, operation);
    setup.kv_heads = cache->options().kv_heads;
    setup.value_dim = cache->options().value_dim;
  } else {
    require(!setup.packed, ExitCode::usage, "packed queries need a cache of pages");
    const AttentionShape shape = shape_of(inputs, options.order);
    setup.kv_heads = shape.kv_heads;
    setup.value_dim = shape.value_dim;
  }
  check_heads(setup);
  if (setup.packed) {
    setup.query_begin =
        packed_begin(inputs.decode.query_begin, query[1], cache->options().sequences);
  } else {
    for (std::int64_t b = 0; b <= query[0]; ++b) setup.query_begin.push_back(b * query[1]);
  }
  const std::vector<std::int64_t> rows = setup.rows();
  const std::int64_t most = rows.empty() ? 0 : *std::max_element(rows.begin(), rows.end());
  require(operation.traits().most_rows == 0 || most <= operation.traits().most_rows,
          ExitCode::usage, "takes one query token of each sequence, not {}", most);
  if (kind != Cache::appended && kind != Cache::latent) return setup;
  const Shape key = bthd_shape(inputs.key, options.order, "key");
  const Shape wanted{query[0], query[1], setup.kv_heads,
                     kind == Cache::latent ? setup.value_dim : query[3]};
  require(key == wanted, ExitCode::bad_data, "new keys are {}, expected {}", key.to_string(),
          wanted.to_string());
  if (kind == Cache::latent) return setup;
  const Shape value = bthd_shape(inputs.value, options.order, "value");
  const Shape values{query[0], query[1], setup.kv_heads, setup.value_dim};
  require(value == values, ExitCode::bad_data, "new values are {}, expected {}", value.to_string(),
          values.to_string());
  return setup;
}

}  // namespace annulus
