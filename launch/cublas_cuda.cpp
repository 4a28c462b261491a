#include "launch/cublas_cuda.hpp"

#include <dlfcn.h>

#include <string>

#include "kernels/error.hpp"

namespace annulus::launch {
namespace {

template <typename Function>
Function find(void* library, const char* name) {
  void* const symbol = dlsym(library, name);
  require(symbol != nullptr, ExitCode::usage, "bench: cuBLAS has no {}", name);
  return reinterpret_cast<Function>(symbol);
}

Cublas load() {
  const std::string name = fmt::format("libcublas.so.{}", CUBLAS_VER_MAJOR);
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  require(library != nullptr, ExitCode::usage, "bench: {} cannot be loaded: {}", name, dlerror());
  return {find<decltype(&cublasCreate_v2)>(library, "cublasCreate_v2"),
          find<decltype(&cublasDestroy_v2)>(library, "cublasDestroy_v2"),
          find<Cublas::Gemm>(library, "cublasGemmEx"),
          find<decltype(&cublasGetStatusString)>(library, "cublasGetStatusString")};
}

}  // namespace

const Cublas& Cublas::library() {
  static const Cublas functions = load();
  return functions;
}

}  // namespace annulus::launch
