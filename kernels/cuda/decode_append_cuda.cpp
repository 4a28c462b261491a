#include "kernels/cuda/decode_append.hpp"
#include "kernels/decode_support.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cuda {
namespace {

AppendTensor append_tensor(const ConstTensorView& from, const TensorView& to) {
  require(from.dtype == to.dtype, ExitCode::bad_data, "decode: new {} rows for a {} cache",
          name(from.dtype), name(to.dtype));
  require(from.device == to.device, ExitCode::bad_data,
          "decode: new rows lie on {}; expected on {}", name(from.device), name(to.device));
  require(from.strides[2] == 1 && to.strides[3] == 1, ExitCode::usage,
          "decode: head_dim strides {} of new rows and {} of the cache; accepted: 1",
          from.strides[2], to.strides[3]);
  return {from.data,     to.data,       from.strides[0], from.strides[1],
          to.strides[0], to.strides[1], to.strides[2],   from.shape[2]};
}

}  // namespace

void append_to_cache(const CacheAppend& call) {
  const auto integers = [](const ConstTensorView& view) {
    return static_cast<const std::int32_t*>(view.data);
  };
  AppendParams params{};
  params.element_bytes = static_cast<int>(size_bytes(call.k.dtype));
  require(params.element_bytes == 2 || params.element_bytes == 4, ExitCode::usage,
          "decode: a {} cache on a device; accepted: f32, f16, bf16", name(call.k.dtype));
  params.tensors[params.tensor_count++] = append_tensor(call.new_k, call.k);
  if (call.new_v) params.tensors[params.tensor_count++] = append_tensor(call.new_v, call.v);
  params.query_begin = integers(call.query_begin);
  params.page_table = integers(call.page_table);
  params.lengths = integers(call.lengths);
  params.tokens = call.new_k.shape[0];
  params.sequences = call.page_table.shape[0];
  params.heads = call.k.shape[2];
  params.pages = call.k.shape[0];
  params.page_size = call.k.shape[1];
  params.max_pages = call.page_table.shape[1];
  params.deal_block = call.deal.block;
  params.deal_ranks = call.deal.ranks;
  params.deal_rank = call.deal.rank;
  require(params.tokens < (std::int64_t{1} << 31), ExitCode::bad_data,
          "decode: {} new rows; accepted: below 2^31", params.tokens);
  launch_append(params, static_cast<cudaStream_t>(call.stream.handle));
}

}  // namespace annulus::kernels::cuda
