#include "kernels/cuda_support.hpp"

namespace annulus::kernels::cuda {

std::span<const AttentionBackend> backends() { return {}; }

}  // namespace annulus::kernels::cuda
