#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace annulus::kernels::cuda {

/// New rows [tokens, heads, dim] of keys or of values and the pages they go to; strides in
/// elements, dim contiguous in both.
struct AppendTensor {
  const void* from;
  void* to;
  std::int64_t from_token, from_head;
  std::int64_t to_page, to_row, to_head;
  std::int64_t dim;
};

struct AppendParams {
  AppendTensor tensors[2];
  int tensor_count;
  int element_bytes;
  const std::int32_t* query_begin;
  const std::int32_t* page_table;
  const std::int32_t* lengths;
  std::int64_t tokens, sequences, heads, pages, page_size, max_pages;
  std::int64_t deal_block, deal_ranks, deal_rank;
};

void launch_append(const AppendParams& params, cudaStream_t stream);

}  // namespace annulus::kernels::cuda
