#pragma once

namespace annulus {

/// Open MPI makes shared windows as named files and unlinks them when all ranks have mapped them; a
/// job that ends in between would leave one. Looks up where this job's are, before they are needed.
void find_window_files();

/// Unlinks those of this job on this machine. Async-signal-safe; for a job that ends.
void remove_window_files() noexcept;

}  // namespace annulus
