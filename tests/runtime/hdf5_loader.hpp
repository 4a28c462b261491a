#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace annulus::test {

/// What fuzzers drive: takes bytes for a file, opens it as `annulus run` does, by the default
/// names, and reads up to a megabyte of each tensor. Errors of annulus are the expected
/// end; anything else escapes. Returns how many datasets could be read.
int load_hostile(std::span<const std::uint8_t> bytes);

}  // namespace annulus::test
