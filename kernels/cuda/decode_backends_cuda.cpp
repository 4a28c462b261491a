#include "kernels/decode_support.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cuda {

std::span<const DecodeBackend> decode_backends() { return {}; }

void append_to_cache(const CacheAppend& /*call*/) {
  throw Error(ExitCode::usage, "decode: caches on a device are not written yet");
}

}  // namespace annulus::kernels::cuda
