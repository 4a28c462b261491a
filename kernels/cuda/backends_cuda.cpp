#include <vector>

#include "kernels/cuda_support.hpp"
#include "kernels/cudnn_support.hpp"

namespace annulus::kernels::cuda {

std::span<const AttentionBackend> backends() {
  static const std::vector<AttentionBackend> all = [] {
    const std::span<const AttentionBackend> vendor = cudnn::backends();
    return std::vector<AttentionBackend>(vendor.begin(), vendor.end());
  }();
  return all;
}

}  // namespace annulus::kernels::cuda
