#pragma once

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

namespace annulus {

/// To call before MPI_Finalize. In builds with the address sanitizer it reports leaks now instead
/// of at the end of the process: MPI's plugins are still loaded, so that what they themselves leak
/// is told apart by name (tests/sanitizers/leaks.supp). Elsewhere it does nothing.
inline void check_for_leaks() {
#ifdef __SANITIZE_ADDRESS__
  __lsan_do_leak_check();
#endif
}

}  // namespace annulus
