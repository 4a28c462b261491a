#include "kernels/sm90/scratch.hpp"

#include <map>
#include <mutex>
#include <tuple>

#include "kernels/cuda/check.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::sm90 {
namespace {

// The counters lie first and take the same room in every launch: nothing else is written there.
constexpr std::int64_t kCounterBytes = 16384;

struct Block {
  char* data = nullptr;
  std::int64_t bytes = 0;
};

/// Allowed beside a capture only in the relaxed mode; waits for what still uses the old memory.
Block grown(const Block& old, std::int64_t bytes) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  ANNULUS_CHECK_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
  void* data = nullptr;
  cudaStream_t stream = nullptr;
  ANNULUS_CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  ANNULUS_CHECK_CUDA(cudaFree(old.data));
  ANNULUS_CHECK_CUDA(cudaMalloc(&data, static_cast<std::size_t>(bytes)));
  ANNULUS_CHECK_CUDA(cudaMemsetAsync(data, 0, static_cast<std::size_t>(bytes), stream));
  ANNULUS_CHECK_CUDA(cudaStreamSynchronize(stream));
  ANNULUS_CHECK_CUDA(cudaStreamDestroy(stream));
  ANNULUS_CHECK_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
  return {static_cast<char*>(data), bytes};
}

/// The memory of one stream, or of one capture from it.
Block& memory_of(cudaStream_t stream, bool& captured) {
  using Key = std::tuple<int, cudaStream_t, unsigned long long>;
  static std::map<Key, Block> memories;
  int device = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  cudaStreamCaptureStatus status{};
  unsigned long long capture = 0;
  ANNULUS_CHECK_CUDA(cudaStreamGetCaptureInfo(stream, &status, &capture));
  captured = status == cudaStreamCaptureStatusActive;
  return memories[{device, stream, captured ? capture : 0}];
}

}  // namespace

Scratch scratch(cudaStream_t stream, int arrivals, std::int64_t bytes) {
  static std::mutex mutex;
  const std::scoped_lock lock(mutex);
  require(arrivals * std::int64_t{sizeof(unsigned)} <= kCounterBytes, ExitCode::internal,
          "sm90: {} counters of arrivals; accepted: at most {}", arrivals,
          kCounterBytes / std::int64_t{sizeof(unsigned)});
  bool captured = false;
  Block& memory = memory_of(stream, captured);
  if (memory.bytes < kCounterBytes + bytes) {
    // Launches recorded earlier in the capture keep pointing to what they got.
    memory = grown(captured ? Block{} : memory, kCounterBytes + bytes);
  }
  return {reinterpret_cast<unsigned*>(memory.data), memory.data + kCounterBytes};
}

}  // namespace annulus::kernels::sm90
