#include "kernels/sm90/work_tables.hpp"

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>

#include "kernels/cuda/check.hpp"

namespace annulus::kernels::sm90 {
namespace {

constexpr std::size_t kKept = 64;

/// Allows allocation and copies on this thread beside a capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { ANNULUS_CHECK_CUDA(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

template <typename Row>
bool same(const std::vector<Row>& a, const std::vector<Row>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Row)) == 0;
}

struct Kept {
  int device;
  std::vector<TileSlice> slices;
  std::vector<TileEntry> entries;
  void* data = nullptr;
  bool captured = false;

  WorkTables tables() const {
    const auto* first = static_cast<const TileSlice*>(data);
    return {first, reinterpret_cast<const TileEntry*>(first + slices.size())};
  }
};

void* upload(const ForwardWork& work) {
  const std::size_t slice_bytes = work.slices.size() * sizeof(TileSlice);
  const std::size_t entry_bytes = work.entries.size() * sizeof(TileEntry);
  void* data = nullptr;
  cudaStream_t stream = nullptr;
  ANNULUS_CHECK_CUDA(cudaMalloc(&data, slice_bytes + entry_bytes));
  ANNULUS_CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  ANNULUS_CHECK_CUDA(
      cudaMemcpyAsync(data, work.slices.data(), slice_bytes, cudaMemcpyHostToDevice, stream));
  ANNULUS_CHECK_CUDA(cudaMemcpyAsync(static_cast<char*>(data) + slice_bytes, work.entries.data(),
                                     entry_bytes, cudaMemcpyHostToDevice, stream));
  ANNULUS_CHECK_CUDA(cudaStreamSynchronize(stream));
  ANNULUS_CHECK_CUDA(cudaStreamDestroy(stream));
  return data;
}

/// Drops the oldest table that no graph holds; freeing waits for the kernels that read it.
void drop_oldest(std::list<Kept>& kept) {
  const auto oldest =
      std::find_if(kept.rbegin(), kept.rend(), [](const Kept& table) { return !table.captured; });
  if (oldest == kept.rend()) return;
  ANNULUS_CHECK_CUDA(cudaFree(oldest->data));
  kept.erase(std::next(oldest).base());
}

}  // namespace

WorkTables work_tables(const ForwardWork& work, cudaStream_t stream) {
  if (work.entries.empty()) return {};
  static std::mutex mutex;
  static std::list<Kept> kept;  // newest first
  int device = 0;
  cudaStreamCaptureStatus capture{};
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  ANNULUS_CHECK_CUDA(cudaStreamIsCapturing(stream, &capture));

  const std::scoped_lock lock(mutex);
  auto found = std::find_if(kept.begin(), kept.end(), [&](const Kept& table) {
    return table.device == device && same(table.slices, work.slices) &&
           same(table.entries, work.entries);
  });
  if (found == kept.end()) {
    const RelaxedCapture relaxed;
    if (kept.size() >= kKept) drop_oldest(kept);
    kept.push_front({device, work.slices, work.entries, upload(work)});
    found = kept.begin();
  }
  kept.splice(kept.begin(), kept, found);
  found->captured = found->captured || capture != cudaStreamCaptureStatusNone;
  return found->tables();
}

}  // namespace annulus::kernels::sm90
