#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace annulus::test {

/// What fuzzers drive: takes bytes for a file, opens it as `annulus run` would (default names, then
/// every dataset there is) and reads up to a megabyte of each. Errors of annulus are the expected
/// end; anything else escapes.
void load_hostile(std::span<const std::uint8_t> bytes);

}  // namespace annulus::test
