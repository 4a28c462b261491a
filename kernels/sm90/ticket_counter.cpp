#include "kernels/sm90/ticket_counter.hpp"

#include <map>
#include <mutex>
#include <utility>

#include "kernels/cuda/check.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::sm90 {
namespace {

constexpr std::size_t kChunk = 1024;

/// Counters are handed out from chunks that live as long as the process.
class Counters {
 public:
  unsigned* of_stream(int device, cudaStream_t stream) {
    const std::scoped_lock lock(mutex_);
    std::pair<unsigned*, unsigned*>& counters = by_stream_[{device, stream}];
    if (counters.first == nullptr) counters = {take(device), take(device)};
    std::swap(counters.first, counters.second);
    return counters.first;
  }

  unsigned* fresh(int device) {
    const std::scoped_lock lock(mutex_);
    return take(device);
  }

 private:
  struct Chunk {
    unsigned* data = nullptr;
    std::size_t used = kChunk;
  };

  unsigned* take(int device) {
    Chunk& chunk = chunks_[device];
    if (chunk.used == kChunk) {
      // Allocation is allowed beside a capture only in the relaxed mode.
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      ANNULUS_CHECK_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
      void* data = nullptr;
      ANNULUS_CHECK_CUDA(cudaMalloc(&data, kChunk * sizeof(unsigned)));
      ANNULUS_CHECK_CUDA(cudaMemset(data, 0, kChunk * sizeof(unsigned)));
      ANNULUS_CHECK_CUDA(cudaDeviceSynchronize());
      ANNULUS_CHECK_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
      chunk = {static_cast<unsigned*>(data), 0};
    }
    return chunk.data + chunk.used++;
  }

  std::mutex mutex_;
  std::map<std::pair<int, cudaStream_t>, std::pair<unsigned*, unsigned*>> by_stream_;
  std::map<int, Chunk> chunks_;
};

}  // namespace

unsigned* ticket_counter(cudaStream_t stream) {
  static Counters counters;
  int device = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  cudaStreamCaptureStatus capture{};
  ANNULUS_CHECK_CUDA(cudaStreamIsCapturing(stream, &capture));
  return capture == cudaStreamCaptureStatusNone ? counters.of_stream(device, stream)
                                                : counters.fresh(device);
}

}  // namespace annulus::kernels::sm90
