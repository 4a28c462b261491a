#include <vector>

#include "kernels/cuda_support.hpp"
#include "kernels/cudnn_support.hpp"
#include "kernels/sm90/attention_sm90.hpp"

namespace annulus::kernels::cuda {

std::span<const AttentionBackend> backends() {
  static const std::vector<AttentionBackend> all = [] {
    const std::span<const AttentionBackend> vendor = cudnn::backends();
    const std::span<const AttentionBackend> own = sm90::backends();
    std::vector<AttentionBackend> list(own.begin(), own.end());
    list.insert(list.end(), vendor.begin(), vendor.end());
    return list;
  }();
  return all;
}

}  // namespace annulus::kernels::cuda
