#include <cuda.h>

#include <map>
#include <vector>

#include "kernels/cuda/stream.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "kernels/sm90/attention_sm90.hpp"

// What lets a kernel start before the keys of its later segments are there.
namespace annulus::kernels::cuda {
namespace {

static_assert(kMaxSegments == static_cast<std::size_t>(sm90::kMaxSegments));

cudaStream_t handle_of(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

/// Of this thread's current device.
struct Words {
  std::uint32_t* data = nullptr;
  std::uint32_t value = 0;
  OwnedStream spare;  // behind which nothing is ever queued but words
};

Words& words_of_device() {
  thread_local std::map<int, Words> all;
  int device = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  return all[device];
}

decltype(&cuStreamWriteValue32) word_writer() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &entry,
                                                               12000, cudaEnableDefault, &found);
    require(error == cudaSuccess && found == cudaDriverEntryPointSuccess, ExitCode::usage,
            "cuda: the driver has no cuStreamWriteValue32; needed: CUDA 12 or later");
    return reinterpret_cast<decltype(&cuStreamWriteValue32)>(entry);
  }();
  return function;
}

}  // namespace

bool takes_segments(const AttentionProblem& problem, std::string_view backend) {
  const AttentionBackend& own = sm90::backends().front();
  return (backend.empty() || backend == own.name) &&
         own.unsupported(problem, Direction::forward).empty();
}

void forward_segments(const ForwardCall& call, std::span<const KvSegment> segments) {
  std::vector<sm90::ForwardSegment> list;
  for (const KvSegment& segment : segments) {
    list.push_back({segment.k, segment.v, segment.mask, segment.ready, segment.ready_value});
  }
  sm90::forward_segments(call, list);
}

ReadyWords next_ready_words() {
  Words& words = words_of_device();
  if (words.data == nullptr) {
    // Of a plain allocation: the driver refuses to write words into those of a stream's pool.
    void* data = nullptr;
    words.spare = make_transfer_stream();
    ANNULUS_CHECK_CUDA(cudaMalloc(&data, kMaxSegments * sizeof(std::uint32_t)));
    ANNULUS_CHECK_CUDA(cudaMemset(data, 0, kMaxSegments * sizeof(std::uint32_t)));
    ANNULUS_CHECK_CUDA(cudaDeviceSynchronize());
    words.data = static_cast<std::uint32_t*>(data);
  }
  return {words.data, ++words.value};
}

void release_words(const ReadyWords& ready) noexcept {
  try {
    const Stream spare{words_of_device().spare.get()};
    for (std::size_t i = 0; i < kMaxSegments; ++i) write_word(ready.words + i, ready.value, spare);
  } catch (const Error&) {
    // The device has failed, and nothing waits on it any more.
  }
}

Stream side_stream() {
  thread_local std::map<int, OwnedStream> streams;
  int device = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  OwnedStream& stream = streams[device];
  if (stream == nullptr) stream = make_transfer_stream();
  return {stream.get()};
}

void order(Stream earlier, Stream later) { order(handle_of(earlier), {handle_of(later)}); }

void write_word(std::uint32_t* word, std::uint32_t value, Stream stream) {
  const CUresult result = word_writer()(handle_of(stream), reinterpret_cast<CUdeviceptr>(word),
                                        value, CU_STREAM_WRITE_VALUE_DEFAULT);
  require(result == CUDA_SUCCESS, ExitCode::internal, "cuda: cuStreamWriteValue32 failed: error {}",
          static_cast<int>(result));
}

}  // namespace annulus::kernels::cuda
