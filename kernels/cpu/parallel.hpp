#pragma once

#include <cstdint>
#include <exception>

#include "kernels/cpu/scratch.hpp"
#include "kernels/error.hpp"
#include "kernels/host_memory.hpp"

namespace annulus::kernels::cpu {

/// Runs task(i, scratch) for i in [0, count) on OpenMP threads, handed out in order of i. The last
/// exception of a task is rethrown once all have ended.
template <typename Task>
void parallel(std::int64_t count, std::int64_t scratch_floats, const Task& task) {
  std::exception_ptr failure;
#pragma omp parallel if (count > 1)
  {
    Scratch& scratch = Scratch::of_this_thread();
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < count; ++i) {
      try {
        // What is available is asked for only then: it costs 30 µs.
        if (!scratch.reserve(scratch_floats)) {
          throw Error(ExitCode::no_memory,
                      fmt::format("memory: {} bytes wanted on the host, {} available",
                                  scratch_floats * 4, available_host_bytes()));
        }
        task(i, scratch);
      } catch (...) {
#pragma omp critical(annulus_cpu_failure)
        failure = std::current_exception();
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace annulus::kernels::cpu
