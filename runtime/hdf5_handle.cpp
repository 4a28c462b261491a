#include "runtime/hdf5_handle.hpp"

#include <hdf5.h>

#include <new>
#include <type_traits>

namespace annulus {
namespace {

static_assert(std::is_same_v<hid_t, std::int64_t>, "headers pass HDF5's ids as int64_t");
static_assert(std::is_same_v<herr_t, int>, "headers pass HDF5's status as int");

std::recursive_mutex& library_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

herr_t take_first(unsigned /*depth*/, const H5E_error2_t* entry, void* data) {
  auto& reason = *static_cast<std::string*>(data);
  if (entry->desc != nullptr) reason = entry->desc;
  if (reason.empty() && entry->func_name != nullptr) reason = entry->func_name;
  return 1;  // ends the walk
}

}  // namespace

Hdf5Guard::Hdf5Guard() : lock_(library_mutex()) {
  H5E_auto2_t printer = nullptr;
  if (H5Eget_auto2(H5E_DEFAULT, &printer, &printer_data_) >= 0) printer_ = printer;
  require(H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0 &&
              H5PLget_loading_state(&plugins_) >= 0 && H5PLset_loading_state(0) >= 0,
          ExitCode::internal, "HDF5: its printing and plugins cannot be turned off");
}

// Failures to restore have no one to go to: the library then stays silent and without plugins.
Hdf5Guard::~Hdf5Guard() {
  static_cast<void>(H5PLset_loading_state(plugins_));
  static_cast<void>(H5Eset_auto2(H5E_DEFAULT, printer_, printer_data_));
}

void take_hdf5_after_fork() { new (&library_mutex()) std::recursive_mutex; }

void Hdf5Closer::operator()(Hdf5Id id) const noexcept {
  const std::lock_guard<std::recursive_mutex> lock(library_mutex());
  if (close != nullptr) static_cast<void>(close(id.value));
}

std::string hdf5_reason() {
  std::string reason;
  if (H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_first, &reason) < 0 || reason.empty()) {
    return "HDF5 gives no reason";
  }
  return printable(reason);
}

}  // namespace annulus
