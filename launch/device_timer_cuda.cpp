#include <algorithm>

#include "kernels/cuda/stream.hpp"
#include "launch/device_timer.hpp"

namespace annulus::launch {
namespace {

double milliseconds(const std::function<void()>& function) {
  const kernels::cuda::OwnedEvent begin = kernels::cuda::make_event(cudaEventDefault);
  const kernels::cuda::OwnedEvent end = kernels::cuda::make_event(cudaEventDefault);
  ANNULUS_CHECK_CUDA(cudaEventRecord(begin.get()));
  function();
  ANNULUS_CHECK_CUDA(cudaEventRecord(end.get()));
  ANNULUS_CHECK_CUDA(cudaEventSynchronize(end.get()));
  float elapsed = 0.0F;
  ANNULUS_CHECK_CUDA(cudaEventElapsedTime(&elapsed, begin.get(), end.get()));
  return static_cast<double>(elapsed);
}

}  // namespace

std::vector<double> alternating_medians_ms(const std::vector<std::function<void()>>& functions,
                                           int repeats) {
  constexpr int kWarmUps = 3;
  std::vector<std::vector<double>> times(functions.size());
  for (int i = -kWarmUps; i < repeats; ++i) {
    for (std::size_t f = 0; f < functions.size(); ++f) {
      const double elapsed = milliseconds(functions[f]);
      if (i >= 0) times[f].push_back(elapsed);
    }
  }
  std::vector<double> medians;
  for (std::vector<double>& of_function : times) {
    std::sort(of_function.begin(), of_function.end());
    medians.push_back(of_function[of_function.size() / 2]);
  }
  return medians;
}

}  // namespace annulus::launch
