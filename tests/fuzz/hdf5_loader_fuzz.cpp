// Any bytes as an input file: read or refused, within the memory that the file could hold.

#include <cstddef>
#include <cstdint>

#include "runtime/hdf5_loader.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  annulus::test::load_hostile({data, size});
  return 0;
}
