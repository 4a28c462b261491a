#include "kernels/sm90/tensor_map.hpp"

#include <cuda_runtime.h>

#include <string>

#include "kernels/error.hpp"

namespace annulus::kernels::sm90 {
namespace {

/// Through the runtime, so that nothing links against the driver's library.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    require(error == cudaSuccess && found == cudaDriverEntryPointSuccess, ExitCode::usage,
            "sm90: the driver has no cuTensorMapEncodeTiled; needed: CUDA 12 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return function;
}

CUtensorMapDataType map_type(DType dtype) {
  if (dtype == DType::f32) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  return dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

}  // namespace

template <std::size_t kRank>
CUtensorMap make_tensor_map(const void* data, DType dtype, const std::array<MapDim, kRank>& dims,
                            CUtensorMapL2promotion promotion) {
  const std::int64_t bytes = size_bytes(dtype);
  std::array<cuuint64_t, kRank> extents{};
  std::array<cuuint64_t, kRank - 1> strides{};
  std::array<cuuint32_t, kRank> box{};
  std::array<cuuint32_t, kRank> steps{};
  for (std::size_t i = 0; i < kRank; ++i) {
    extents[i] = static_cast<cuuint64_t>(dims[i].extent);
    box[i] = static_cast<cuuint32_t>(dims[i].box);
    steps[i] = 1;
    // A dimension of one element may come with any stride; the encoder wants a multiple of 16.
    if (i > 0) {
      strides[i - 1] = dims[i].extent == 1 ? 16 : static_cast<cuuint64_t>(dims[i].stride * bytes);
    }
  }
  CUtensorMap map{};
  const CUresult result =
      encoder()(&map, map_type(dtype), kRank, const_cast<void*>(data), extents.data(),
                strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
                dims[0].box * bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::string shape;
    for (const MapDim& dim : dims) shape += fmt::format(" {}@{}", dim.extent, dim.stride);
    throw Error(ExitCode::bad_data,
                fmt::format("sm90: no tensor map for extents@strides{} (driver error {})", shape,
                            static_cast<int>(result)));
  }
  return map;
}

template CUtensorMap make_tensor_map<4>(const void*, DType, const std::array<MapDim, 4>&,
                                        CUtensorMapL2promotion);
template CUtensorMap make_tensor_map<5>(const void*, DType, const std::array<MapDim, 5>&,
                                        CUtensorMapL2promotion);

}  // namespace annulus::kernels::sm90
