#include "runtime/cache_call.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "kernels/error.hpp"
#include "runtime/attention_setup.hpp"
#include "runtime/call_tensors.hpp"
#include "runtime/redistribute.hpp"
#include "runtime/stopwatch.hpp"

namespace annulus {
namespace {

using Clock = std::chrono::steady_clock;
using Cache = DecodeOperation::Cache;

// [batch, seq, heads, dim], contiguous, as [tokens, heads, dim].
template <typename View>
View flat(const View& view) {
  const Shape& n = view.shape;
  return View(view.data, view.dtype, Shape{n[0] * n[1], n[2], n[3]}, view.device);
}

std::string in_words(const DistributedTensor* tensor) {
  if (tensor == nullptr || !*tensor) return "absent";
  return fmt::format("{} {}", name(tensor->dtype()), tensor->layout().to_string());
}

std::string in_words(const KeyValueCache* cache) {
  if (cache == nullptr) return "absent";
  const KeyValueCacheOptions& options = cache->options();
  const CacheLayout& layout = cache->pages().layout();
  return fmt::format(
      "{} {} pages of {} tokens in blocks of {}, {} heads of {} and {}, lengths {:x}, starts {:x}",
      name(options.dtype), layout.pages, layout.page_size, layout.block, options.kv_heads,
      options.head_dim, options.value_dim, digest_of(cache->lengths()), digest_of(cache->starts()));
}

}  // namespace

CacheCall::CacheCall(const DecodeOperation& operation, const AttentionInputs& inputs,
                     const AttentionOptions& options, Device device)
    : operation_(operation),
      inputs_(inputs),
      options_(options),
      device_(device),
      context_(*operation.metadata().context),
      rank_(context_.rank()) {
  try {
    setup_ = make_decode_setup(operation, inputs, options);
    dtype_ = operation.metadata().runtime_dtype;
    if (!inputs.decode.cache) return;
    const KeyValueCache& cache = *inputs.decode.cache;
    dtype_ = cache.options().dtype;
    require(cache.device() == device, ExitCode::usage,
            "the cache lies on {}, the operation works on {}", name(cache.device()), name(device));
  } catch (const Error& error) {
    failure_ = Error(error.code(), fmt::format("{}: {}", operation.name(), error.what()));
  }
}

void CacheCall::state(Statement& statement) const {
  const OperationMetadata& metadata = operation_.metadata();
  const CacheInputs& decode = inputs_.decode;
  statement.add("mesh", metadata.mesh.to_string())
      .add("backend", metadata.backend)
      .add("runtime dtype", name(metadata.runtime_dtype))
      .add("kernel", operation_.tuning().kernel)
      .add("causal", options_.causal.value_or(operation_.causal_by_default()))
      .add("scale", options_.scale.value_or(metadata.softmax_scale.value_or(0.0F)))
      .add("soft cap", options_.soft_cap)
      .add("window", fmt::format("{},{}", options_.mask.window_left, options_.mask.window_right))
      .add("order", name(options_.order))
      .add("log_sum_exp", options_.log_sum_exp)
      .add("query", in_words(&inputs_.query))
      .add("key", in_words(&inputs_.key))
      .add("value", in_words(&inputs_.value))
      .add("sinks", in_words(inputs_.sinks))
      .add("query_rope", in_words(decode.query_rope))
      .add("key_rope", in_words(decode.key_rope))
      .add("query_begin", digest_of(decode.query_begin))
      .add("starts", digest_of(decode.starts))
      .add("indexes", digest_of(decode.indexes))
      .add("cache", in_words(decode.cache.get()))
      .add("output dtype", name(options_.output_dtype.value_or(dtype_)));
}

void CacheCall::agree() {
  Statement statement(operation_.name());
  state(statement);
  const Cache kind = operation_.traits().cache;
  const bool appends = kind == Cache::appended || kind == Cache::latent;
  std::vector<std::int64_t> before;
  if (!failure_ && appends) {
    KeyValueCache& cache = *inputs_.decode.cache;
    try {
      const std::vector<std::int64_t> lengths(cache.lengths().begin(), cache.lengths().end());
      cache.append(setup_->rows());
      before = lengths;
    } catch (const Error& error) {
      failure_ = Error(error.code(), fmt::format("{}: {}", operation_.name(), error.what()));
    }
  }
  if (failure_) statement.fail(failure_->code(), failure_->what());
  try {
    static_cast<void>(statement.agree(context_.world()));
  } catch (...) {  // another rank cannot go on: the cache stays as it was
    for (std::size_t s = 0; s < before.size(); ++s) {
      inputs_.decode.cache->truncate(static_cast<std::int64_t>(s), before[s]);
    }
    throw;
  }
  static_cast<void>(context_.along(setup_->mesh, setup_->axes.sequence));
  static_cast<void>(sequence_group());
}

Communicator& CacheCall::sequence_group() const {
  if (device_ == Device::cpu) return context_.along(setup_->mesh, setup_->axes.sequence);
  return context_.along(setup_->mesh, setup_->axes.sequence, operation_.metadata().transport);
}

Tensor CacheCall::bring(const DistributedTensor& from, DimOrder order, const TensorLayout& to,
                        DType dtype) {
  const auto begin = Clock::now();
  const std::int64_t bytes_before = context_.world().bytes_sent();
  ConstTensorView view = in_bthd(from.local(), order);
  const TensorLayout layout = bthd_layout(from.layout(), order);
  Tensor brought = Tensor::borrow(readable(view));
  if (!same_shards(layout, to)) {
    if (size_bytes(dtype) < size_bytes(view.dtype)) {  // narrow first: fewer bytes travel
      brought = Tensor::copy_of(view, dtype);
    }
    DistributedTensor moved =
        redistribute(DistributedTensor(std::move(brought), layout, rank_), to, context_.world());
    brought = Tensor::copy_of(std::as_const(moved).local(), dtype, device_);
  } else if (view.dtype != dtype || view.device != device_ || !view.is_contiguous()) {
    brought = Tensor::copy_of(view, dtype, device_);
  }
  report_.exposed_communication_seconds += seconds_since(begin);
  report_.bytes_sent += context_.world().bytes_sent() - bytes_before;
  return brought;
}

// [latent | rope] of queries or of new keys.
Tensor CacheCall::bring_joined(const DistributedTensor& latent, const DistributedTensor& rope,
                               bool query) {
  const std::int64_t width = setup_->query[3];
  const std::int64_t split = setup_->value_dim;
  const auto layout = [&](std::int64_t dim) {
    return query ? setup_->query_layout(dim) : setup_->new_layout(dim);
  };
  const Tensor first = bring(latent, options_.order, layout(split), dtype_);
  const Tensor second = bring(rope, options_.order, layout(width - split), dtype_);
  Tensor joined(dtype_, layout(width).local_shape(rank_), device_);
  copy(first.view(), joined.view().slice(3, {0, split}));
  copy(second.view(), joined.view().slice(3, {split, width}));
  return joined;
}

DistributedTensor CacheCall::leave(Tensor local, const TensorLayout& working,
                                   const TensorLayout& wanted) {
  const Device home = inputs_.query.device();
  if (local.device() != home) {
    local = Tensor::copy_of(std::as_const(local).view(), std::nullopt, home);
  }
  DistributedTensor result(std::move(local), working, rank_);
  if (same_shards(working, wanted)) return result;
  const auto begin = Clock::now();
  const std::int64_t bytes_before = context_.world().bytes_sent();
  result = redistribute(result, wanted, context_.world());
  report_.exposed_communication_seconds += seconds_since(begin);
  report_.bytes_sent += context_.world().bytes_sent() - bytes_before;
  return result;
}

ConstTensorView CacheCall::integers(const std::vector<std::int64_t>& values) {
  const Shape shape{static_cast<std::int64_t>(values.size())};
  Tensor host(DType::i32, shape);
  std::transform(values.begin(), values.end(), static_cast<std::int32_t*>(host.view().data),
                 [](std::int64_t value) { return static_cast<std::int32_t>(value); });
  tensors_.push_back(device_ == Device::cpu
                         ? std::move(host)
                         : Tensor::copy_of(std::as_const(host).view(), std::nullopt, device_));
  return std::as_const(tensors_.back()).view();
}

void CacheCall::write_new() {
  const bool latent = operation_.traits().cache == Cache::latent;
  const Tensor key =
      latent ? bring_joined(inputs_.key, *inputs_.decode.key_rope, false)
             : bring(inputs_.key, options_.order, setup_->new_layout(setup_->query[3]), dtype_);
  Tensor value;
  if (!latent) {
    value = bring(inputs_.value, options_.order, setup_->new_layout(setup_->value_dim), dtype_);
  }
  const auto begin = Clock::now();
  inputs_.decode.cache->write(problem_.query_begin, flat(key.view()),
                              latent ? ConstTensorView{} : flat(std::as_const(value).view()));
  report_.compute_seconds += seconds_since(begin);
}

// Keys and values that are a cache by themselves: one page a sequence.
void CacheCall::find_problem() {
  const std::shared_ptr<KeyValueCache>& cache = inputs_.decode.cache;
  if (cache) {
    const DecodeProblem places = cache->problem();
    problem_.k = places.k;
    problem_.v = places.v;
    problem_.page_table = places.page_table;
    problem_.lengths = places.lengths;
    problem_.starts = places.starts;
    problem_.deal = places.deal;
    cache_ = CacheView{{}, {}, cache};
    return;
  }
  const std::int64_t seq = bthd_layout(inputs_.key.layout(), options_.order).global_shape()[1];
  const TensorLayout keys = setup_->given_layout(seq, setup_->query[3]);
  const TensorLayout values = setup_->given_layout(seq, setup_->value_dim);
  Tensor key = bring(inputs_.key, options_.order, keys, dtype_);
  Tensor value = bring(inputs_.value, options_.order, values, dtype_);
  problem_.k = std::as_const(key).view();
  problem_.v = std::as_const(value).view();
  if (problem_.k.shape[1] == 0) {  // of no tokens: a page that nobody looks at
    tensors_.emplace_back(dtype_, Shape{1, 1, problem_.k.shape[2], problem_.k.shape[3]}, device_);
    problem_.k = std::as_const(tensors_.back()).view();
    tensors_.emplace_back(dtype_, Shape{1, 1, problem_.v.shape[2], problem_.v.shape[3]}, device_);
    problem_.v = std::as_const(tensors_.back()).view();
  }
  const Span own = setup_->sequences_of(rank_);
  const auto of_own = [&](std::span<const std::int64_t> all, std::int64_t otherwise) {
    std::vector<std::int64_t> part(static_cast<std::size_t>(own.size()), otherwise);
    if (!all.empty()) std::copy_n(all.begin() + own.begin, own.size(), part.begin());
    return part;
  };
  std::vector<std::int64_t> pages(static_cast<std::size_t>(own.size()));
  std::iota(pages.begin(), pages.end(), 0);
  const ConstTensorView table = integers(pages);
  problem_.page_table = {table.data, DType::i32, Shape{own.size(), 1}, device_};
  problem_.lengths = integers(of_own(inputs_.decode.indexes, seq));
  problem_.starts = integers(of_own(inputs_.decode.starts, 0));
  problem_.deal = setup_->given_deal(seq, rank_);
  cache_ = CacheView{DistributedTensor(std::move(key), keys, rank_),
                     DistributedTensor(std::move(value), values, rank_)};
}

OperationOutput CacheCall::run() {
  const Span own = setup_->sequences_of(rank_);
  std::vector<std::int64_t> begin(setup_->query_begin.begin() + own.begin,
                                  setup_->query_begin.begin() + own.end + 1);
  const std::int64_t first = begin.front();
  std::int64_t most = 0;
  for (std::size_t s = 0; s < begin.size(); ++s) {
    begin[s] -= first;
    if (s > 0) most = std::max(most, begin[s] - begin[s - 1]);
  }
  tensors_.reserve(8);  // views into them stay
  problem_.query_begin = integers(begin);
  problem_.max_rows = most;
  const Cache kind = operation_.traits().cache;
  if (kind == Cache::appended || kind == Cache::latent) write_new();
  find_problem();
  Tensor query =
      kind == Cache::latent
          ? bring_joined(inputs_.query, *inputs_.decode.query_rope, true)
          : bring(inputs_.query, options_.order, setup_->query_layout(setup_->query[3]), dtype_);
  tensors_.push_back(std::move(query));
  problem_.q = flat(std::as_const(tensors_.back()).view());
  const OperationMetadata& metadata = operation_.metadata();
  const float usual = 1.0F / std::sqrt(static_cast<float>(setup_->query[3]));
  problem_.scale = options_.scale.value_or(metadata.softmax_scale.value_or(usual));
  problem_.soft_cap = options_.soft_cap;
  problem_.causal = options_.causal.value_or(operation_.causal_by_default());
  problem_.window_left = options_.mask.window_left;
  problem_.window_right = options_.mask.window_right;
  if (inputs_.sinks != nullptr && *inputs_.sinks) {
    tensors_.push_back(bring(*inputs_.sinks, DimOrder::bthd, setup_->sinks(), DType::f32));
    problem_.sinks = std::as_const(tensors_.back()).view();
  }
  return attend();
}

OperationOutput CacheCall::attend() {
  Communicator& ranks = sequence_group();
  const DType dtype = options_.output_dtype.value_or(dtype_);
  const TensorLayout wanted =
      output_layout(bthd_layout(inputs_.query.layout(), options_.order), setup_->value_dim);
  const bool split = ranks.size() > 1 && same_shards(setup_->split_output(), wanted);
  const TensorLayout layout = split ? setup_->split_output() : setup_->output();
  const TensorLayout rows = split ? setup_->split_log_sum_exp() : setup_->log_sum_exp();
  Tensor o(dtype, layout.local_shape(rank_), device_);
  // [heads, tokens] while it is computed, [batch, heads, seq] after.
  const std::int64_t heads = o.shape()[2];
  Tensor statistics(DType::f32, Shape{heads, problem_.tokens()}, device_);
  const std::string& kernel = operation_.tuning().kernel;
  const TensorView log_sum_exp = options_.log_sum_exp ? statistics.view() : TensorView{};
  const auto begin = Clock::now();
  if (ranks.size() == 1) {
    if (problem_.tokens() > 0) {
      decode_forward({problem_, {}, flat(o.view()), log_sum_exp, {}}, kernel);
      synchronize(device_, {});
    }
    report_.compute_seconds += seconds_since(begin);
  } else {
    const Shape shape{1, problem_.tokens(), problem_.q_heads(), setup_->value_dim};
    const Shape row{1, problem_.q_heads(), problem_.tokens()};
    Tensor accumulator(DType::f32, shape, device_);
    Tensor max(DType::f32, row, device_);
    Tensor sum(DType::f32, row, device_);
    const AttentionState state{accumulator.view(), max.view(), sum.view()};
    DecodeProblem local = problem_;
    if (ranks.rank() != 0) local.sinks = {};
    if (problem_.tokens() > 0) {
      decode_forward({local, state, {}, {}, {}}, kernel);
      synchronize(device_, {});
    }
    report_.compute_seconds += seconds_since(begin);
    const auto merging = Clock::now();
    const std::int64_t bytes_before = ranks.bytes_sent();
    merge_over_ranks(ranks, state, flat(o.view()), log_sum_exp,
                     split ? MergedHeads::split : MergedHeads::everywhere);
    report_.bytes_sent += ranks.bytes_sent() - bytes_before;
    report_.exposed_communication_seconds += seconds_since(merging);
  }
  OperationOutput output;
  output.attention_outputs = leave(std::move(o), layout, wanted);
  if (options_.log_sum_exp) {
    const Shape shape = rows.local_shape(rank_);
    Tensor by_batch(DType::f32, shape, device_);
    const Shape strides{shape[2], shape[0] * shape[2], 1};
    copy(ConstTensorView(statistics.view().data, DType::f32, shape, strides, device_),
         by_batch.view());
    output.log_sum_exp = leave(std::move(by_batch), rows,
                               row_layout(bthd_layout(inputs_.query.layout(), options_.order)));
  }
  if (operation_.requires_cache()) output.cache_view = std::move(cache_);
  output.report = report_;
  return output;
}

}  // namespace annulus
