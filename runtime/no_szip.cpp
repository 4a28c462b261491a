#include "kernels/error.hpp"
#include "runtime/szip_filter.hpp"

namespace annulus {

void require_szip(const ChunkFilter& /*filter*/, const std::string& what) {
  throw Error(ExitCode::bad_data,
              what + ": this build has no szip; build where libaec is, or rewrite with h5repack");
}

void decode_szip(const ChunkFilter& /*filter*/, std::size_t /*most_bytes*/,
                 const std::vector<std::byte>& /*from*/, std::vector<std::byte>& /*to*/) {
  throw Error(ExitCode::internal, "szip: not in this build");
}

}  // namespace annulus
