#include "runtime/key_value_cache.hpp"

#include <algorithm>
#include <limits>

#include "kernels/error.hpp"
#include "sharding/named_sharding.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kMostPageSize = 256;

void check(const KeyValueCacheOptions& options) {
  require(options.kv_heads > 0 && options.head_dim > 0 && options.value_dim > 0, ExitCode::usage,
          "cache: {} KV heads of {} columns, {} of values; accepted: 1 or more", options.kv_heads,
          options.head_dim, options.value_dim);
  require(!options.latent || (options.kv_heads == 1 && options.value_dim <= options.head_dim),
          ExitCode::usage,
          "cache: a latent cache of {} KV heads, {} columns and {} of values; accepted: one head "
          "whose values are among its columns",
          options.kv_heads, options.head_dim, options.value_dim);
  require(
      options.dtype == DType::f32 || options.dtype == DType::f16 || options.dtype == DType::bf16,
      ExitCode::usage, "cache: dtype {}; accepted: f32, f16, bf16", name(options.dtype));
  require(options.contiguous_tokens >= 0 && options.block >= 0, ExitCode::usage,
          "cache: {} contiguous tokens, blocks of {}; accepted: 0 or more",
          options.contiguous_tokens, options.block);
  require(options.contiguous_tokens > 0 ||
              (1 <= options.page_size && options.page_size <= kMostPageSize),
          ExitCode::usage, "cache: pages of {} tokens; accepted: 1 to {}", options.page_size,
          kMostPageSize);
}

CacheLayout layout_of(const KeyValueCacheOptions& options, const Mesh& mesh,
                      const CacheAxes& axes) {
  check(options);
  const int parts = mesh.size(axes.batch);
  const int ranks = mesh.size(axes.sequence);
  if (options.contiguous_tokens > 0) {
    return CacheLayout::contiguous(options.sequences, options.contiguous_tokens, parts, ranks);
  }
  return {options.sequences,
          options.page_size,
          options.pages,
          options.block > 0 ? options.block : options.page_size,
          parts,
          ranks};
}

}  // namespace

CacheAxes cache_axes(const OperationMetadata& metadata) {
  const auto present = [&](AxisTuple axes) {
    std::erase_if(axes, [&](const std::string& axis) { return !metadata.mesh.has(axis); });
    return axes;
  };
  const PartitionManager& manager = metadata.partition_manager;
  return {present(manager.axes_of("batch", Mode::decode)),
          present(manager.axes_of("key_length", Mode::decode)),
          present(manager.axes_of("head", Mode::decode))};
}

std::vector<Runs> cache_heads(std::int64_t kv_heads, int parts) {
  require(kv_heads % parts == 0 || parts % kv_heads == 0, ExitCode::usage,
          "cache: {} KV heads over {} ranks; accepted: one count divides the other", kv_heads,
          parts);
  std::vector<Runs> heads;
  for (int part = 0; part < parts; ++part) {
    const std::int64_t begin = part * kv_heads / parts;
    heads.push_back({{begin, begin + std::max<std::int64_t>(kv_heads / parts, 1)}});
  }
  return heads;
}

KeyValueCache::KeyValueCache(const OperationMetadata& metadata, const KeyValueCacheOptions& options)
    : options_(options),
      mesh_(metadata.mesh),
      axes_(cache_axes(metadata)),
      pages_(layout_of(options, mesh_, axes_),
             mesh_.group_index(metadata.context->rank(), axes_.batch),
             mesh_.group_index(metadata.context->rank(), axes_.sequence)) {
  const int rank = metadata.context->rank();
  const bool on_device = metadata.backend == "cuda" || metadata.backend == "cudnn";
  const Device device = on_device ? Device::cuda : Device::cpu;
  const std::vector<Runs> heads = cache_heads(options.kv_heads, mesh_.size(axes_.head));
  const Runs& own = heads[static_cast<std::size_t>(mesh_.group_index(rank, axes_.head))];
  const CacheLayout& layout = pages_.layout();
  Shape shape{layout.pages, layout.page_size, own.front().size(), options.head_dim};
  key_ = Tensor(options.dtype, shape, device);
  shape[3] = options.value_dim;
  if (!options.latent) value_ = Tensor(options.dtype, shape, device);
  starts_.assign(static_cast<std::size_t>(options.sequences), 0);
  local_starts_.assign(static_cast<std::size_t>(pages_.sequences().size()), 0);
}

void KeyValueCache::truncate(std::int64_t sequence, std::int64_t length) {
  pages_.truncate(sequence, length);
  if (length == 0) set_start(sequence, 0);
}

void KeyValueCache::set_start(std::int64_t sequence, std::int64_t start) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  require(0 <= sequence && sequence < options_.sequences && 0 <= start && start <= kMost,
          ExitCode::bad_data,
          "cache: sequence {} cannot start at {}; accepted: 0 to {} of {} sequences", sequence,
          start, kMost, options_.sequences);
  starts_[static_cast<std::size_t>(sequence)] = start;
  const Span own = pages_.sequences();
  if (own.contains(sequence)) {
    local_starts_[static_cast<std::size_t>(sequence - own.begin)] =
        static_cast<std::int32_t>(start);
  }
}

TensorView KeyValueCache::value() {
  return options_.latent ? key_.view().slice(3, {0, options_.value_dim}) : value_.view();
}

ConstTensorView KeyValueCache::integers(std::span<const std::int32_t> values, const Shape& shape,
                                        Tensor& on_device) const {
  static constexpr std::int32_t kNone = 0;  // no sequences: a view needs an address all the same
  const ConstTensorView host(values.empty() ? &kNone : values.data(), DType::i32, shape);
  if (device() == Device::cpu) return host;
  on_device = Tensor::copy_of(host, std::nullopt, device());
  return std::as_const(on_device).view();
}

DecodeProblem KeyValueCache::problem() const {
  const std::int64_t sequences = pages_.sequences().size();
  DecodeProblem problem;
  problem.k = key_.view();
  problem.v = const_cast<KeyValueCache*>(this)->value();
  problem.page_table = integers(pages_.page_table(), Shape{sequences, pages_.max_pages()}, table_);
  problem.lengths = integers(pages_.local_lengths(), Shape{sequences}, lengths_);
  problem.starts = integers(local_starts_, Shape{sequences}, device_starts_);
  problem.deal = pages_.deal();
  return problem;
}

void KeyValueCache::write(const ConstTensorView& query_begin, const ConstTensorView& new_k,
                          const ConstTensorView& new_v) {
  const DecodeProblem places = problem();
  CacheAppend append;
  append.new_k = new_k;
  append.new_v = new_v;
  append.query_begin = query_begin;
  append.k = key();
  append.v = value();
  append.page_table = places.page_table;
  append.lengths = places.lengths;
  append.deal = places.deal;
  append_to_cache(append);
  synchronize(device(), append.stream);
}

}  // namespace annulus
