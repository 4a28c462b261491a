#include "tests/runtime/decode_checks.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/element.hpp"
#include "tests/runtime/operation_case.hpp"

namespace annulus::testing {
namespace {

// Rows of a tensor [rows, ..] in a new order.
Tensor take_rows(const ConstTensorView& from, const std::vector<std::int64_t>& rows) {
  Shape shape = from.shape;
  shape[0] = static_cast<std::int64_t>(rows.size());
  Tensor taken(from.dtype, shape);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i);
    copy(from.slice(0, {rows[i], rows[i] + 1}), taken.view().slice(0, {row, row + 1}));
  }
  return taken;
}

// Columns [begin, end) of the last dimension, as a tensor of its own.
Tensor columns_of(const Tensor& from, std::int64_t begin, std::int64_t end) {
  return Tensor::copy_of(from.view().slice(from.shape().rank() - 1, {begin, end}));
}

// Keys or values [sequences, longest, heads, dim] as packed rows [sequences · longest, heads, dim].
ConstTensorView packed(const HostTensor& tensor) {
  const ConstTensorView view = tensor.view();
  const Shape& n = view.shape;
  return {view.data, view.dtype, Shape{n[0] * n[1], n[2], n[3]}};
}

Device device_of(const DecodePlace& place) {
  return place.backend == "cuda" ? Device::cuda : Device::cpu;
}

class Placer {
 public:
  Placer(Context& context, const OperationMetadata& metadata, const DecodePlace& place)
      : context_(context), metadata_(metadata), place_(place) {}

  /// Whole on every rank, or cut by heads where wanted and possible.
  DistributedTensor operator()(const Tensor& whole, int head_dim = -1) const {
    std::vector<AxisTuple> spec(static_cast<std::size_t>(whole.shape().rank()));
    if (place_.split_queries && head_dim >= 0) {
      spec[static_cast<std::size_t>(head_dim)] = {"tp", "sp"};
    }
    const TensorLayout layout(whole.shape(), NamedSharding(metadata_.mesh, PartitionSpec(spec)));
    const Tensor own = shard_of(whole, layout, context_.rank());
    return {Tensor::copy_of(own.view(), std::nullopt, device_of(place_)), layout, context_.rank()};
  }

 private:
  Context& context_;
  const OperationMetadata& metadata_;
  const DecodePlace& place_;
};

std::vector<double> values_of(const Tensor& tensor) {
  std::vector<double> values(static_cast<std::size_t>(tensor.shape().elements()));
  const Tensor host = Tensor::copy_of(tensor.view(), std::nullopt, Device::cpu);
  const Tensor wide = Tensor::copy_of(host.view(), DType::f32);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<double>(static_cast<const float*>(wide.view().data)[i]);
  }
  return values;
}

// Results of some tokens, put where they stand among all.
class Collected {
 public:
  explicit Collected(const DecodeCase& of)
      : of_(of), o_(of.o.size(), std::nan("")), lse_(of.log_sum_exp.size(), std::nan("")) {}

  /// O [1, tokens, heads, dim] or [batch, rows, ..]; LSE [1, heads, tokens] or [batch, heads,
  /// rows].
  void put(const GatheredOutput& output, const std::vector<std::int64_t>& tokens) {
    const std::vector<double> o = values_of(output.attention_outputs);
    const std::vector<double> lse = values_of(output.log_sum_exp);
    const std::int64_t row = of_.options.q_heads * of_.options.value_dim;
    const std::int64_t rows = output.log_sum_exp.shape()[2];
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      std::copy_n(o.begin() + at * row, row, o_.begin() + tokens[i] * row);
      for (std::int64_t head = 0; head < of_.options.q_heads; ++head) {
        lse_[static_cast<std::size_t>(head * of_.options.tokens() + tokens[i])] =
            lse[static_cast<std::size_t>((at / rows * of_.options.q_heads + head) * rows +
                                         at % rows)];
      }
    }
  }
  void expect() const { of_.expect(o_, lse_); }

 private:
  const DecodeCase& of_;
  std::vector<double> o_;
  std::vector<double> lse_;
};

AttentionOptions options_for(const DecodeCase& of) {
  AttentionOptions options;
  options.causal = of.options.causal;
  options.mask.window_left = of.options.window_left;
  options.mask.window_right = of.options.window_right;
  options.soft_cap = of.options.soft_cap;
  return options;
}

// Some rows of each sequence, the number of which goes up to what is left.
std::vector<std::int64_t> next_rows(const DecodeOptions& options,
                                    std::span<const std::int64_t> lengths, int step,
                                    std::mt19937_64& random) {
  std::vector<std::int64_t> rows;
  for (std::size_t s = 0; s < options.sequences.size(); ++s) {
    const std::int64_t left = options.sequences[s].length - lengths[s];
    // Two rounds of chunks, some sequences waiting, then tokens one at a time near the end.
    const std::int64_t chunk = std::max<std::int64_t>(left - 3, 1);
    const std::int64_t wanted = step < 2
                                    ? std::uniform_int_distribution<std::int64_t>(0, chunk)(random)
                                    : (left > 3 ? left - 3 : 1);
    rows.push_back(std::min(left, wanted));
  }
  return rows;
}

struct Step {
  std::vector<std::int64_t> tokens;  // among the case's query rows
  std::vector<std::int64_t> places;  // among sequences · longest
  std::vector<std::int64_t> query_begin{0};
};

Step step_of(const DecodeOptions& options, std::span<const std::int64_t> lengths,
             const std::vector<std::int64_t>& rows) {
  Step step;
  std::int64_t first = 0;
  for (std::size_t s = 0; s < rows.size(); ++s) {
    for (std::int64_t i = 0; i < rows[s]; ++i) {
      step.tokens.push_back(first + lengths[s] + i);
      step.places.push_back(static_cast<std::int64_t>(s) * options.longest() + lengths[s] + i);
    }
    step.query_begin.push_back(static_cast<std::int64_t>(step.tokens.size()));
    first += options.sequences[s].length;
  }
  return step;
}

// New tokens written by the caller, for operations that only read.
void append_and_write(KeyValueCache& cache, const Step& step, const std::vector<std::int64_t>& rows,
                      const Tensor& key, const Tensor& value, Context& context) {
  cache.append(rows);
  const Span own = cache.pages().sequences();
  std::vector<std::int32_t> begin;
  const std::int64_t first = step.query_begin[static_cast<std::size_t>(own.begin)];
  for (std::int64_t s = own.begin; s <= own.end; ++s) {
    begin.push_back(
        static_cast<std::int32_t>(step.query_begin[static_cast<std::size_t>(s)] - first));
  }
  const Span tokens{first, first + begin.back()};
  const int part = cache.mesh().group_index(context.rank(), cache.axes().head);
  const Span heads =
      cache_heads(cache.options().kv_heads,
                  cache.mesh().size(cache.axes().head))[static_cast<std::size_t>(part)]
          .front();
  const auto placed = [&](const ConstTensorView& view) {
    return Tensor::copy_of(view, std::nullopt, cache.device());
  };
  const Tensor offsets = placed({begin.data(), DType::i32, Shape{own.size() + 1}});
  const Tensor new_key = placed(key.view().slice(0, tokens).slice(1, heads));
  const Tensor new_value = placed(value.view().slice(0, tokens).slice(1, heads));
  cache.write(offsets.view(), new_key.view(), new_value.view());
}

Tensor with_batch(const ConstTensorView& view, std::int64_t batch) {
  const Shape& n = view.shape;
  return Tensor::copy_of(
      ConstTensorView(view.data, view.dtype, Shape{batch, n[0] / batch, n[1], n[2]}));
}

}  // namespace

std::vector<DecodePlace> decode_places(int ranks) {
  switch (ranks) {
    case 1:
      return {{"sp=1"}};
    case 2:
      return {{"sp=2"}, {"tp=2", true, 16}, {"dp=2", false, 1}};
    case 4:
      return {{"sp=4", true, 4, 3}, {"sp=2,tp=2", true, 16}, {"dp=2,sp=2", false, 4, 8}, {"tp=4"}};
    default:
      return {{fmt::format("sp={}", ranks), false, 4, 2}};
  }
}

OperationMetadata decode_metadata(Context& context, const DecodePlace& place, DType dtype) {
  OperationConfig config{.backend = place.backend, .transport = place.transport};
  config.runtime_dtype = dtype;
  config.mesh = Mesh::parse(place.mesh, context.size());
  return resolve_metadata(context, config);
}

std::shared_ptr<KeyValueCache> cache_for(const OperationMetadata& metadata,
                                         const DecodePlace& place, const DecodeCase& of,
                                         std::int64_t spare) {
  KeyValueCacheOptions options;
  options.sequences = static_cast<std::int64_t>(of.options.sequences.size());
  options.kv_heads = of.options.kv_heads;
  options.head_dim = of.options.head_dim;
  options.value_dim = of.options.value_dim;
  options.latent = of.options.latent;
  options.dtype = of.options.dtype;
  options.page_size = place.page_size;
  options.block = place.block;
  options.pages = spare;
  for (const DecodeSequence& sequence : of.options.sequences) {
    options.pages += sequence.length / place.page_size + 1;
  }
  auto cache = std::make_shared<KeyValueCache>(metadata, options);
  // Pages that hold nothing hold NaN.
  for (const TensorView& view : {cache->key(), cache->value()}) {
    Tensor nan(view.dtype, view.shape);
    const float one = std::nanf("");
    copy(ConstTensorView(&one, DType::f32, view.shape, Shape{0, 0, 0, 0}), nan.view());
    copy(std::as_const(nan).view(), view);
  }
  return cache;
}

void expect_chunks(Context& context, const std::string& operation, const DecodePlace& place,
                   const DecodeCase& expected, std::uint64_t seed) {
  const DecodeOptions& options = expected.options;
  const OperationMetadata metadata = decode_metadata(context, place, options.dtype);
  const Placer placed(context, metadata, place);
  const auto attend = OperationRegistry::create(operation, metadata);
  const auto cache = cache_for(metadata, place, expected, 0);
  const bool reads = operation == "ragged_page_attention_v2" || operation == "unified_attention";
  std::mt19937_64 random(seed);
  Collected collected(expected);
  for (int round = 0; round < 12; ++round) {
    const std::vector<std::int64_t> lengths(cache->lengths().begin(), cache->lengths().end());
    const std::vector<std::int64_t> rows = next_rows(options, lengths, round, random);
    const Step step = step_of(options, lengths, rows);
    if (step.tokens.empty()) continue;
    const Tensor query = take_rows(expected.q.view(), step.tokens);
    const Tensor key = take_rows(packed(expected.k), step.places);
    const Tensor value = options.latent ? columns_of(key, 0, options.value_dim)
                                        : take_rows(packed(expected.v), step.places);
    AttentionOptions call = options_for(expected);
    call.order = DimOrder::thd;
    call.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(options.head_dim)));
    const DistributedTensor none;
    DistributedTensor q, k, v, q_rope, k_rope, sinks;
    if (options.latent) {
      q = placed(columns_of(query, 0, options.value_dim), 1);
      q_rope = placed(columns_of(query, options.value_dim, options.head_dim));
      k = placed(value);
      k_rope = placed(columns_of(key, options.value_dim, options.head_dim));
    } else {
      q = placed(query, 1);
      k = placed(key);
      v = placed(value);
    }
    if (options.sinks) sinks = placed(Tensor::copy_of(expected.sinks.view()));
    if (reads) append_and_write(*cache, step, rows, key, value, context);
    AttentionInputs inputs{.query = q, .key = reads ? none : k, .value = reads ? none : v};
    inputs.sinks = options.sinks ? &sinks : nullptr;
    inputs.decode.cache = cache;
    inputs.decode.query_begin = step.query_begin;
    inputs.decode.query_rope = options.latent ? &q_rope : nullptr;
    inputs.decode.key_rope = options.latent ? &k_rope : nullptr;
    const OperationOutput output = (*attend)(inputs, call);
    ASSERT_TRUE(output.cache_view.has_value());
    EXPECT_EQ(output.cache_view->pages, cache);
    EXPECT_EQ(output.attention_outputs.dtype(), options.dtype);
    collected.put(output.gather(context), step.tokens);
  }
  for (std::size_t s = 0; s < options.sequences.size(); ++s) {
    ASSERT_EQ(cache->lengths()[s], options.sequences[s].length);
  }
  collected.expect();
}

void expect_autoregressive(Context& context, const DecodePlace& place, const DecodeCase& expected) {
  const DecodeOptions& options = expected.options;
  const OperationMetadata metadata = decode_metadata(context, place, options.dtype);
  const Placer placed(context, metadata, place);
  const auto attend = OperationRegistry::create("autoregressive_decodeattn", metadata);
  EXPECT_TRUE(attend->requires_cache());
  const auto batch = static_cast<std::int64_t>(options.sequences.size());
  const DistributedTensor query = placed(with_batch(expected.q.view(), batch), 2);
  const DistributedTensor key = placed(Tensor::copy_of(expected.k.view()));
  const DistributedTensor value = placed(Tensor::copy_of(expected.v.view()));
  std::vector<std::int64_t> starts, indexes, tokens;
  for (const DecodeSequence& sequence : options.sequences) {
    tokens.push_back(static_cast<std::int64_t>(tokens.size()));
    starts.push_back(sequence.start);
    indexes.push_back(sequence.length);
  }
  AttentionInputs inputs{.query = query, .key = key, .value = value};
  inputs.decode.starts = starts;
  inputs.decode.indexes = indexes;
  const OperationOutput output = (*attend)(inputs, options_for(expected));
  ASSERT_TRUE(output.cache_view && output.cache_view->key);
  Collected collected(expected);
  collected.put(output.gather(context), tokens);
  collected.expect();
}

void expect_paged_flash(Context& context, const DecodePlace& place, const DecodeCase& expected) {
  const DecodeOptions& options = expected.options;
  const OperationMetadata metadata = decode_metadata(context, place, options.dtype);
  const Placer placed(context, metadata, place);
  const auto attend = OperationRegistry::create("paged_flash_attention", metadata);
  const auto cache = cache_for(metadata, place, expected, 0);
  std::vector<std::int64_t> rows, tokens;
  for (const DecodeSequence& sequence : options.sequences) rows.push_back(sequence.length);
  const std::vector<std::int64_t> none(rows.size(), 0);
  const Step step = step_of(options, none, rows);
  append_and_write(*cache, step, rows, take_rows(packed(expected.k), step.places),
                   take_rows(packed(expected.v), step.places), context);
  for (std::int64_t token = 0; token < options.tokens(); ++token) tokens.push_back(token);
  const auto batch = static_cast<std::int64_t>(rows.size());
  const DistributedTensor query = placed(with_batch(expected.q.view(), batch), 2);
  const DistributedTensor absent;
  AttentionInputs inputs{.query = query, .key = absent, .value = absent};
  inputs.decode.cache = cache;
  Collected collected(expected);
  collected.put((*attend)(inputs, options_for(expected)).gather(context), tokens);
  collected.expect();
}

}  // namespace annulus::testing
