#include <fmt/format.h>

#include <algorithm>
#include <random>

#include "kernels/cuda/stream.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/error.hpp"
#include "launch/bench_decode.hpp"
#include "launch/decode_case.hpp"
#include "launch/device_timer.hpp"

namespace annulus::launch {
namespace {

constexpr int kBurst = 8;  // runs in a row, so that what a launch costs the host is hidden

/// Copying a gigabyte: what memory gives for reading and writing, counted together.
class DeviceCopy {
 public:
  DeviceCopy() : from_(Device::cuda, kBytes), to_(Device::cuda, kBytes) {
    std::mt19937 engine(2024);
    std::vector<float> block(std::size_t{1} << 20);
    for (float& value : block) value = static_cast<float>(engine());
    const Shape shape{static_cast<std::int64_t>(block.size())};
    for (std::int64_t begin = 0; begin < kBytes; begin += 4 * shape[0]) {
      copy(ConstTensorView(block.data(), DType::f32, shape),
           TensorView(static_cast<std::byte*>(from_.data()) + begin, DType::f32, shape,
                      Device::cuda));
    }
  }
  void run() const {
    ANNULUS_CHECK_CUDA(
        cudaMemcpyAsync(to_.data(), from_.data(), kBytes, cudaMemcpyDeviceToDevice, nullptr));
  }
  static double bytes() { return 2.0 * static_cast<double>(kBytes); }

 private:
  static constexpr std::int64_t kBytes = std::int64_t{1} << 30;
  Buffer from_;
  Buffer to_;
};

BenchRow measure(const DecodeBenchOptions& options, const DeviceCopy& memory,
                 const std::string& cache, const DecodeShape& shape) {
  const DecodeCase decode(Device::cuda, options, cache, shape);
  const auto run = [&] {
    for (int i = 0; i < kBurst; ++i) {
      decode_forward({decode.problem(), {}, decode.o(), decode.log_sum_exp(), {}});
    }
  };
  const std::vector<double> ms =
      alternating_medians_ms({run, [&] { memory.run(); }}, options.repeats);
  BenchRow row = decode.row(select_backend(decode.problem()).name);
  row.seconds = ms[0] * 1e-3 / kBurst;
  row.rate = static_cast<double>(decode.cache_bytes()) / row.seconds * 1e-9;
  row.ceiling = DeviceCopy::bytes() / ms[1] * 1e-6;
  return row;
}

}  // namespace

std::vector<BenchRow> bench_cuda_decode(const DecodeBenchOptions& options) {
  require(kernels::cuda::device_count() > 0, ExitCode::usage, "bench decode: no CUDA device here");
  const DeviceCopy memory;
  std::vector<BenchRow> rows;
  for (const std::string& cache : options.caches) {
    for (const DecodeShape& shape : options.shapes) {
      rows.push_back(measure(options, memory, cache, shape));
    }
  }
  return rows;
}

}  // namespace annulus::launch
