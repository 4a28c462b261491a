#include "runtime/hdf5_driver.hpp"

#include <hdf5.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <limits>

#include "runtime/posix_file.hpp"

namespace annulus {
namespace {

// HDF5 keeps a copy of these bytes in the property list.
struct DriverInfo {
  DriverTarget* target = nullptr;
};

// What HDF5 holds of an open file; its public part comes first.
struct DriverFile {
  H5FD_t base{};
  DriverTarget* target = nullptr;
  haddr_t allocated = 0;
  haddr_t written = 0;
};

DriverFile& self(H5FD_t* file) { return *reinterpret_cast<DriverFile*>(file); }
const DriverFile& self(const H5FD_t* file) { return *reinterpret_cast<const DriverFile*>(file); }

H5FD_t* open_file(const char* /*name*/, unsigned /*flags*/, hid_t properties, haddr_t /*largest*/) {
  const auto* info = static_cast<const DriverInfo*>(H5Pget_driver_info(properties));
  if (info == nullptr) return nullptr;
  auto* file = new (std::nothrow) DriverFile;
  if (file == nullptr) return nullptr;
  file->target = info->target;
  file->written = static_cast<haddr_t>(info->target->existing_bytes);
  return &file->base;
}

herr_t close_file(H5FD_t* file) {
  delete &self(file);
  return 0;
}

int compare(const H5FD_t* a, const H5FD_t* b) { return a == b ? 0 : (a < b ? -1 : 1); }

herr_t query(const H5FD_t* /*file*/, unsigned long* flags) {
  if (flags != nullptr) *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA;
  return 0;
}

haddr_t allocated(const H5FD_t* file, H5FD_mem_t /*type*/) { return self(file).allocated; }

herr_t set_allocated(H5FD_t* file, H5FD_mem_t /*type*/, haddr_t address) {
  self(file).allocated = address;
  return 0;
}

haddr_t written(const H5FD_t* file, H5FD_mem_t /*type*/) { return self(file).written; }

bool note_placeholder(DriverTarget& target, const void* data, haddr_t address, std::size_t bytes) {
  if (data != target.placeholder) return false;
  target.placed_at = static_cast<std::int64_t>(address);
  target.placed_bytes = static_cast<std::int64_t>(bytes);
  return true;
}

// Notes the first failure and tells HDF5 that all is well: a file whose close fails stays half open
// in HDF5's tables, and the library crashes over it later. The owner of the target looks there.
template <typename Action>
void noting_failure(DriverTarget& target, const Action& action) {
  if (!target.failure.empty()) return;
  try {
    action();
  } catch (const std::exception& error) {
    target.failure = error.what();
  }
}

herr_t read_file(H5FD_t* file, H5FD_mem_t /*type*/, hid_t /*transfer*/, haddr_t address,
                 std::size_t bytes, void* data) {
  DriverFile& opened = self(file);
  if (note_placeholder(*opened.target, data, address, bytes)) return 0;
  std::memset(data, 0, bytes);
  if (address >= opened.written) return 0;
  const haddr_t there = opened.written - address;
  const std::size_t count = bytes < there ? bytes : static_cast<std::size_t>(there);
  noting_failure(*opened.target, [&] {
    read_exactly(opened.target->descriptor, data, static_cast<std::int64_t>(count),
                 static_cast<std::int64_t>(address), opened.target->path);
  });
  return 0;
}

herr_t write_file(H5FD_t* file, H5FD_mem_t /*type*/, hid_t /*transfer*/, haddr_t address,
                  std::size_t bytes, const void* data) {
  DriverFile& opened = self(file);
  if (note_placeholder(*opened.target, data, address, bytes)) return 0;
  noting_failure(*opened.target, [&] {
    write_exactly(opened.target->descriptor, data, static_cast<std::int64_t>(bytes), nullptr, 0,
                  static_cast<std::int64_t>(address), opened.target->path);
  });
  opened.written = std::max(opened.written, address + bytes);
  return 0;
}

herr_t truncate_file(H5FD_t* file, hid_t /*transfer*/, hbool_t /*closing*/) {
  DriverFile& opened = self(file);
  if (opened.written == opened.allocated) return 0;
  noting_failure(*opened.target, [&] {
    resize_file(opened.target->descriptor, static_cast<std::int64_t>(opened.allocated),
                opened.target->path);
  });
  opened.written = opened.allocated;
  return 0;
}

const H5FD_class_t& driver_class() {
  static const H5FD_class_t driver = [] {
    constexpr H5FD_mem_t kMap[H5FD_MEM_NTYPES] = H5FD_FLMAP_SINGLE;
    H5FD_class_t c{};
#if H5_VERSION_GE(1, 13, 0)
    c.version = H5FD_CLASS_VERSION;
    c.value = static_cast<H5FD_class_value_t>(510);  // of the range left to unregistered drivers
#endif
    c.name = "annulus";
    c.maxaddr = static_cast<haddr_t>(std::numeric_limits<std::int64_t>::max());
    c.fc_degree = H5F_CLOSE_STRONG;
    c.fapl_size = sizeof(DriverInfo);
    c.open = open_file;
    c.close = close_file;
    c.cmp = compare;
    c.query = query;
    c.get_eoa = allocated;
    c.set_eoa = set_allocated;
    c.get_eof = written;
    c.read = read_file;
    c.write = write_file;
    c.truncate = truncate_file;
    std::copy(std::begin(kMap), std::end(kMap), std::begin(c.fl_map));
    return c;
  }();
  return driver;
}

// Registered once for the process, as the library itself is.
hid_t driver_id() {
  static hid_t id = H5I_INVALID_HID;
  if (id < 0 || H5Iget_type(id) != H5I_VFL) id = H5FDregister(&driver_class());
  return ANNULUS_CHECK_HDF5(id, ExitCode::internal, "output: HDF5 refused the driver");
}

}  // namespace

Hdf5Handle driver_properties(DriverTarget& target) {
  const DriverInfo info{&target};
  Hdf5Handle properties =
      own(ANNULUS_CHECK_HDF5(H5Pcreate(H5P_FILE_ACCESS), ExitCode::internal, "output"), H5Pclose);
  ANNULUS_CHECK_HDF5(H5Pset_driver(properties.get().value, driver_id(), &info), ExitCode::internal,
                     "output: HDF5 refused the driver");
  return properties;
}

}  // namespace annulus
