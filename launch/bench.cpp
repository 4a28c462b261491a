#include "launch/bench.hpp"

#include <array>

#include "launch/bench_decode.hpp"
#include "launch/bench_io.hpp"
#include "launch/bench_kernels.hpp"
#include "launch/bench_ring.hpp"

namespace annulus::launch {
namespace {

constexpr std::array kBenches = {
    Command{"kernels", "attention beside its ceiling and its peer", bench_kernels},
    Command{"ring", "an attention over ranks beside its kernels and its plan", bench_ring},
    Command{"decode", "decode over a cache beside the memory's own rate", bench_decode},
    Command{"io", "reading and writing HDF5 beside plain pread and pwrite", bench_io},
};

}  // namespace

void run_bench(Arguments arguments) { dispatch("annulus bench", kBenches, arguments); }

}  // namespace annulus::launch
