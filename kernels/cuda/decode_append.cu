#include "kernels/cuda/check.hpp"
#include "kernels/cuda/decode_append.hpp"

/// Writes new tokens into a paged cache: a thread block a token.
namespace annulus::kernels::cuda {
namespace {

constexpr int kThreads = 128;

/// Where a new token goes; page -1: nowhere on this rank.
struct Place {
  std::int64_t page, row;
};

__device__ Place place_of(const AppendParams& p, std::int64_t token) {
  // The last sequence that begins at or before the token; empty ones before it begin there too.
  std::int64_t s = 0;
  std::int64_t end = p.sequences;
  while (end - s > 1) {
    const std::int64_t middle = (s + end) / 2;
    if (p.query_begin[middle] <= token) {
      s = middle;
    } else {
      end = middle;
    }
  }
  if (token < p.query_begin[s] || token >= p.query_begin[s + 1]) return {-1, 0};
  const std::int64_t position = p.lengths[s] - (p.query_begin[s + 1] - token);
  if (position < 0 || position / p.deal_block % p.deal_ranks != p.deal_rank) return {-1, 0};
  const std::int64_t local =
      position / (p.deal_block * p.deal_ranks) * p.deal_block + position % p.deal_block;
  if (local / p.page_size >= p.max_pages) return {-1, 0};
  const std::int64_t page = p.page_table[s * p.max_pages + local / p.page_size];
  return {page < p.pages ? page : -1, local % p.page_size};
}

template <typename Word>
__global__ void append_kernel(const AppendParams p) {
  const std::int64_t token = blockIdx.x;
  const Place place = place_of(p, token);
  if (place.page < 0) return;
  for (int i = 0; i < p.tensor_count; ++i) {
    const AppendTensor& t = p.tensors[i];
    const Word* from = static_cast<const Word*>(t.from) + token * t.from_token;
    Word* to = static_cast<Word*>(t.to) + place.page * t.to_page + place.row * t.to_row;
    for (std::int64_t at = threadIdx.x; at < p.heads * t.dim; at += kThreads) {
      const std::int64_t head = at / t.dim;
      to[head * t.to_head + at % t.dim] = from[head * t.from_head + at % t.dim];
    }
  }
}

}  // namespace

void launch_append(const AppendParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.sequences == 0) return;
  const auto blocks = static_cast<unsigned>(params.tokens);
  if (params.element_bytes == 2) {
    append_kernel<std::uint16_t><<<blocks, kThreads, 0, stream>>>(params);
  } else {
    append_kernel<std::uint32_t><<<blocks, kThreads, 0, stream>>>(params);
  }
  ANNULUS_CHECK_CUDA(cudaGetLastError());
}

}  // namespace annulus::kernels::cuda
