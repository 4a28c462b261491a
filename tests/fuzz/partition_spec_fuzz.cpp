// Any text as a partition spec: it reads as one that prints and reads back to itself, or is refused;
// what was read is corrected for a shape on a mesh without leaving either.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "kernels/error.hpp"
#include "sharding/stable_sharding.hpp"
#include "sharding/partition_spec.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const annulus::PartitionSpec spec = annulus::PartitionSpec::parse(text);
    if (!(annulus::PartitionSpec::parse(spec.to_string()) == spec)) std::abort();
    const annulus::Mesh mesh = annulus::Mesh::parse("sp=4,tp=2", 8);
    const annulus::Shape shape{2, 8, 6, 64};
    if (annulus::corrected_spec(shape, spec, mesh).size() > 4) std::abort();
  } catch (const annulus::Error&) {
  }
  return 0;
}
