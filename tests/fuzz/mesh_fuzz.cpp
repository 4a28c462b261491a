// Any text as a mesh: it reads as one that prints and reads back to itself, or is refused.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "kernels/error.hpp"
#include "sharding/mesh.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const int ranks = data[0];
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    const annulus::Mesh mesh = annulus::Mesh::parse(text, ranks);
    if (!(annulus::Mesh::parse(mesh.to_string(), ranks) == mesh)) std::abort();
  } catch (const annulus::Error&) {
  }
  return 0;
}
