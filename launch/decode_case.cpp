#include "launch/decode_case.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/error.hpp"

namespace annulus::launch {
namespace {

constexpr std::int64_t kLatent = 512;
constexpr std::int64_t kRope = 64;

}  // namespace

DecodeCase::DecodeCase(Device device, const DecodeBenchOptions& options, std::string_view cache,
                       const DecodeShape& shape, const CacheDeal& deal)
    : device_(device), shape_(shape), cache_(cache) {
  const std::optional<DType> dtype = parse_dtype(options.dtype);
  require(dtype.has_value(), ExitCode::usage, "bench decode: no dtype {}", options.dtype);
  const bool latent = cache == "mla";
  const std::int64_t heads = latent ? options.mla_heads : options.heads;
  const std::int64_t kv_heads = latent ? 1 : options.kv_heads;
  const std::int64_t head_dim = latent ? kLatent + kRope : options.head_dim;
  const std::int64_t value_dim = latent ? kLatent : options.head_dim;
  const std::int64_t tokens = deal.tokens(shape.seq);
  const std::int64_t page_size =
      cache == "contiguous" ? std::max<std::int64_t>(tokens, 1) : options.page_size;
  const std::int64_t pages = (tokens + page_size - 1) / page_size;
  problem_.q = random(*dtype, Shape{shape.batch, heads, head_dim});
  const Shape keys{shape.batch * pages, page_size, kv_heads, head_dim};
  const Shape values{shape.batch * pages, page_size, kv_heads, value_dim};
  problem_.k = random(*dtype, keys);
  problem_.v = latent ? problem_.k.slice(3, {0, value_dim}) : random(*dtype, values);
  cache_bytes_ = shape.batch * tokens * kv_heads * size_bytes(*dtype) *
                 (latent ? head_dim : head_dim + value_dim);

  std::vector<std::int32_t> table(static_cast<std::size_t>(shape.batch * pages));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), engine_);
  std::vector<std::int32_t> begin(static_cast<std::size_t>(shape.batch + 1));
  std::iota(begin.begin(), begin.end(), 0);
  const std::vector<std::int32_t> lengths(static_cast<std::size_t>(shape.batch),
                                          static_cast<std::int32_t>(shape.seq));
  problem_.page_table = integers(table, Shape{shape.batch, pages});
  problem_.query_begin = integers(begin, Shape{shape.batch + 1});
  problem_.lengths = integers(lengths, Shape{shape.batch});
  problem_.deal = deal;
  problem_.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  problem_.max_rows = 1;
  o_ = tensor(*dtype, Shape{shape.batch, heads, value_dim});
  log_sum_exp_ = tensor(DType::f32, Shape{heads, shape.batch});
}

double DecodeCase::flops() const {
  const auto tokens = static_cast<double>(problem_.deal.tokens(shape_.seq) * shape_.batch);
  return 2.0 * tokens * static_cast<double>(problem_.q_heads()) *
         static_cast<double>(problem_.head_dim() + problem_.value_dim());
}

BenchRow DecodeCase::row(std::string_view name) const {
  BenchRow row;
  row.name = fmt::format("{} {}", name, cache_);
  if (cache_ != "contiguous") row.name += fmt::format(" {}", problem_.page_size());
  row.direction = "decode";
  row.dtype = std::string(annulus::name(problem_.q.dtype));
  row.mask = "full";
  row.batch = shape_.batch;
  row.heads = problem_.q_heads();
  row.kv_heads = problem_.kv_heads();
  row.seq_q = 1;
  row.seq_kv = shape_.seq;
  row.head_dim = problem_.head_dim();
  row.unit = "GB/s";
  return row;
}

TensorView DecodeCase::tensor(DType dtype, const Shape& shape) {
  buffers_.emplace_back(device_, shape.elements() * size_bytes(dtype));
  return {buffers_.back().data(), dtype, shape, device_};
}

// A block is drawn and repeated: drawing gigabytes takes longer than all measurements.
TensorView DecodeCase::random(DType dtype, const Shape& shape) {
  const TensorView view = tensor(dtype, shape);
  std::normal_distribution<float> normal;
  std::vector<float> values(std::size_t{1} << 18);
  for (float& value : values) value = normal(engine_);
  const auto block = static_cast<std::int64_t>(values.size());
  for (std::int64_t begin = 0; begin < shape.elements(); begin += block) {
    const Shape piece{std::min(block, shape.elements() - begin)};
    auto* data = static_cast<std::byte*>(view.data) + begin * size_bytes(dtype);
    copy(ConstTensorView(values.data(), DType::f32, piece),
         TensorView(data, dtype, piece, device_));
  }
  return view;
}

ConstTensorView DecodeCase::integers(const std::vector<std::int32_t>& values, const Shape& shape) {
  const TensorView view = tensor(DType::i32, shape);
  copy(ConstTensorView(values.data(), DType::i32, shape), view);
  return view;
}

}  // namespace annulus::launch
