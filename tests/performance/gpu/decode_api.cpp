#include <cstdint>
#include <cstdio>

#include "kernels/decode_attention.hpp"
#include "kernels/error.hpp"

// The decode kernel behind a C function, so that a Python script can time it beside its peers in
// one process. Dense tensors; the i32 tensors lie on the device.
extern "C" {

struct AnnulusDecode {
  const void *q, *k, *v;  // v equal to k: a latent cache
  void* o;
  float* lse;                              // null: not wanted
  float *accumulator, *row_max, *row_sum;  // where o is null
  const std::int32_t *query_begin, *page_table, *lengths;
  std::int64_t tokens, sequences, pages, page_size, max_pages, max_rows;
  std::int64_t q_heads, kv_heads, head_dim, value_dim;
  std::int64_t f16;
  double scale;
  void* stream;
};

/// 0, or 1 after printing why not.
int annulus_decode(const AnnulusDecode* args);
}

namespace {

using annulus::Device;
using annulus::DType;
using annulus::Shape;

annulus::DecodeCall call_of(const AnnulusDecode& a) {
  const DType dtype = a.f16 != 0 ? DType::f16 : DType::bf16;
  const auto integers = [](const std::int32_t* data, const Shape& shape) {
    return annulus::ConstTensorView(data, DType::i32, shape, Device::cuda);
  };
  annulus::DecodeCall call;
  annulus::DecodeProblem& problem = call.problem;
  problem.q = {a.q, dtype, Shape{a.tokens, a.q_heads, a.head_dim}, Device::cuda};
  const Shape pages{a.pages, a.page_size, a.kv_heads, a.head_dim};
  problem.k = {a.k, dtype, pages, Device::cuda};
  if (a.v == a.k) {
    problem.v = problem.k.slice(3, {0, a.value_dim});
  } else {
    problem.v = {a.v, dtype, Shape{a.pages, a.page_size, a.kv_heads, a.value_dim}, Device::cuda};
  }
  problem.query_begin = integers(a.query_begin, Shape{a.sequences + 1});
  problem.page_table = integers(a.page_table, Shape{a.sequences, a.max_pages});
  problem.lengths = integers(a.lengths, Shape{a.sequences});
  problem.max_rows = a.max_rows;
  problem.scale = static_cast<float>(a.scale);
  if (a.o != nullptr) {
    call.o = {a.o, dtype, Shape{a.tokens, a.q_heads, a.value_dim}, Device::cuda};
    if (a.lse != nullptr)
      call.log_sum_exp = {a.lse, DType::f32, Shape{a.q_heads, a.tokens}, Device::cuda};
  } else {
    const Shape statistics{1, a.q_heads, a.tokens};
    call.state = {
        {a.accumulator, DType::f32, Shape{1, a.tokens, a.q_heads, a.value_dim}, Device::cuda},
        {a.row_max, DType::f32, statistics, Device::cuda},
        {a.row_sum, DType::f32, statistics, Device::cuda}};
  }
  call.stream.handle = a.stream;
  return call;
}

}  // namespace

int annulus_decode(const AnnulusDecode* args) {
  try {
    annulus::decode_forward(call_of(*args), "sm90");
    return 0;
  } catch (const annulus::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
