#include "kernels/cudnn_support.hpp"

namespace annulus::kernels::cudnn {

std::span<const AttentionBackend> backends() { return {}; }

const char* version() { return ""; }

}  // namespace annulus::kernels::cudnn
