#pragma once

#include <cublas_v2.h>

namespace annulus::launch {

/// The functions of cuBLAS that benchmarks measure a ceiling with. The library is loaded on first
/// use: linked, it would take 150 MiB of every process. Throws usage where it is not installed.
struct Cublas {
  // cublasGemmEx is overloaded in C++.
  using Gemm = cublasStatus_t (*)(cublasHandle_t handle, cublasOperation_t op_a,
                                  cublasOperation_t op_b, int m, int n, int k, const void* alpha,
                                  const void* a, cudaDataType a_type, int lda, const void* b,
                                  cudaDataType b_type, int ldb, const void* beta, void* c,
                                  cudaDataType c_type, int ldc, cublasComputeType_t compute_type,
                                  cublasGemmAlgo_t algorithm);

  decltype(&cublasCreate_v2) create;
  decltype(&cublasDestroy_v2) destroy;
  Gemm gemm;
  decltype(&cublasGetStatusString) status_text;

  static const Cublas& library();
};

}  // namespace annulus::launch
