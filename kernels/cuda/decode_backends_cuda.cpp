#include "kernels/decode_support.hpp"
#include "kernels/sm90/decode_launch.hpp"

namespace annulus::kernels::cuda {

std::span<const DecodeBackend> decode_backends() { return sm90::decode_backends(); }

}  // namespace annulus::kernels::cuda
