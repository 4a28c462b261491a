#pragma once

#include <cstdint>

namespace annulus::launch {

/// Memory of this process that lies in RAM now; 0 where /proc does not tell.
std::int64_t resident_bytes();
/// The most that did since reset_peak().
std::int64_t peak_resident_bytes();
void reset_peak();
/// Of resident_bytes(), the windows that peers read in place: of this rank or of the others.
enum class Windows : std::uint8_t { own, others };
std::int64_t resident_window_bytes(Windows whose);

}  // namespace annulus::launch
