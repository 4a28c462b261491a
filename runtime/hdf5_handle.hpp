#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "kernels/error.hpp"

namespace annulus {

/// Held around every use of HDF5, which is not thread-safe as Debian builds it. While it lives
/// HDF5 prints nothing of its own and loads no plugin. May be nested; never hold it over a
/// collective call.
class Hdf5Guard {
 public:
  Hdf5Guard();
  ~Hdf5Guard();
  Hdf5Guard(const Hdf5Guard&) = delete;
  Hdf5Guard& operator=(const Hdf5Guard&) = delete;

 private:
  std::unique_lock<std::recursive_mutex> lock_;
  int (*printer_)(std::int64_t, void*) = nullptr;
  void* printer_data_ = nullptr;
  unsigned plugins_ = 0;
};

/// In a child process that was forked while its parent's thread held the guard: the lock is of a
/// thread that does not exist here, so a new one takes its place.
void take_hdf5_after_fork();

/// An hid_t that tests as false when there is none.
struct Hdf5Id {
  std::int64_t value = -1;

  Hdf5Id() = default;
  Hdf5Id(std::nullptr_t) {}  // NOLINT(google-explicit-constructor)
  explicit Hdf5Id(std::int64_t id) : value(id) {}
  explicit operator bool() const { return value >= 0; }
  friend bool operator==(const Hdf5Id&, const Hdf5Id&) = default;
};

struct Hdf5Closer {
  using pointer = Hdf5Id;
  int (*close)(std::int64_t) = nullptr;
  void operator()(Hdf5Id id) const noexcept;
};

/// Owns an HDF5 id and the function that closes it.
using Hdf5Handle = std::unique_ptr<Hdf5Id, Hdf5Closer>;

inline Hdf5Handle own(std::int64_t id, int (*close)(std::int64_t)) {
  return {Hdf5Id(id), Hdf5Closer{close}};
}

/// Description of the innermost entry of HDF5's error stack, which is the useful one. To be called
/// before anything else of HDF5.
std::string hdf5_reason();

template <typename Result, typename... Args>
Result checked_hdf5(Result result, ExitCode code, fmt::format_string<Args...> format,
                    Args&&... args) {
  if (result >= 0) return result;
  const std::string reason = hdf5_reason();
  throw Error(code, fmt::format(format, std::forward<Args>(args)...) + ": " + reason);
}

}  // namespace annulus

/// The value of an HDF5 call, when it is not negative; else throws Error(code, message: reason).
#define ANNULUS_CHECK_HDF5(call, ...) ::annulus::checked_hdf5((call), __VA_ARGS__)
