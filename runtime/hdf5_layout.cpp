#include "runtime/hdf5_layout.hpp"

#include <hdf5.h>

#include <array>

#include "runtime/hdf5_driver.hpp"
#include "runtime/hdf5_handle.hpp"
#include "runtime/hdf5_type.hpp"

namespace annulus {
namespace {

// Chunks start on pages: two ranks never write to one page.
constexpr hsize_t kAlignment = 4096;
constexpr hsize_t kAlignedFrom = 65536;
constexpr const char* kGroup = "output";

// Builds the file; every failure quotes HDF5, or the write under it.
class LayoutWriter {
 public:
  LayoutWriter(int descriptor, const std::string& path) {
    target_.descriptor = descriptor;
    target_.path = path;
    target_.placeholder = &placeholder_;
    const Hdf5Handle properties = driver_properties(target_);
    const hid_t id = properties.get().value;
    check(H5Pset_alignment(id, kAlignedFrom, kAlignment));
    check(H5Pset_libver_bounds(id, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST));
    file_ = own(check(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, id)), H5Fclose);
  }

  std::vector<std::int64_t> add(const LayoutRequest& request) {
    const Hdf5Handle dataset = create(request);
    std::vector<std::int64_t> offsets;
    for (std::int64_t chunk = 0; chunk < request.chunks; ++chunk) {
      offsets.push_back(place(request, dataset.get().value, chunk));
    }
    close(dataset);
    return offsets;
  }

  void annotate(std::span<const OutputAttribute> attributes) {
    const Hdf5Handle group = own(
        check(H5Lexists(file_.get().value, kGroup, H5P_DEFAULT)) > 0
            ? check(H5Gopen2(file_.get().value, kGroup, H5P_DEFAULT))
            : check(H5Gcreate2(file_.get().value, kGroup, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT)),
        H5Gclose);
    for (const OutputAttribute& attribute : attributes) annotate(group.get().value, attribute);
    close(group);
  }

  void finish() {
    check(H5Fflush(file_.get().value, H5F_SCOPE_LOCAL));
    close(file_);
  }

 private:
  template <typename Result>
  Result check(Result result) {
    require(target_.failure.empty(), ExitCode::io, "{}", target_.failure);
    return ANNULUS_CHECK_HDF5(result, ExitCode::io, "{}: HDF5 cannot write it", target_.path);
  }

  // Closes now and checks: a lost write shows in a close, not in a destructor.
  void close(const Hdf5Handle& handle) {
    auto& owner = const_cast<Hdf5Handle&>(handle);
    const auto closer = owner.get_deleter().close;
    check(closer(owner.release().value));
  }

  Hdf5Handle create(const LayoutRequest& request) {
    std::array<hsize_t, Shape::kMaxRank> dims{};
    std::array<hsize_t, Shape::kMaxRank> chunk{};
    for (int dim = 0; dim < request.shape.rank(); ++dim) {
      const auto i = static_cast<std::size_t>(dim);
      dims[i] = static_cast<hsize_t>(request.shape[dim]);
      chunk[i] = static_cast<hsize_t>(request.chunk.rank() > 0 ? request.chunk[dim] : 1);
    }
    const Hdf5Handle space =
        own(check(H5Screate_simple(request.shape.rank(), dims.data(), nullptr)), H5Sclose);
    const Hdf5Handle storage = own(check(H5Pcreate(H5P_DATASET_CREATE)), H5Pclose);
    check(H5Pset_fill_time(storage.get().value, H5D_FILL_TIME_NEVER));
    if (request.chunks > 0) {
      check(H5Pset_chunk(storage.get().value, request.shape.rank(), chunk.data()));
      check(H5Pset_fletcher32(storage.get().value));
    }
    const Hdf5Handle links = own(check(H5Pcreate(H5P_LINK_CREATE)), H5Pclose);
    check(H5Pset_create_intermediate_group(links.get().value, 1));
    const Hdf5Handle type = output_type(request.dtype);
    return own(
        check(H5Dcreate2(file_.get().value, request.path.c_str(), type.get().value,
                         space.get().value, links.get().value, storage.get().value, H5P_DEFAULT)),
        H5Dclose);
  }

  std::int64_t place(const LayoutRequest& request, hid_t dataset, std::int64_t chunk) {
    std::array<hsize_t, Shape::kMaxRank> offset{};
    for (int dim = request.shape.rank() - 1; dim >= 0; --dim) {
      const std::int64_t extent = request.chunk[dim];
      const std::int64_t grid = (request.shape[dim] + extent - 1) / extent;
      offset[static_cast<std::size_t>(dim)] = static_cast<hsize_t>(chunk % grid * extent);
      chunk /= grid;
    }
    const std::int64_t bytes =
        request.chunk.elements() * size_bytes(request.dtype) + kChunkTailBytes;
    target_.placed_at = -1;
    check(H5Dwrite_chunk(dataset, H5P_DEFAULT, 0, offset.data(), static_cast<std::size_t>(bytes),
                         &placeholder_));
    require(target_.placed_at >= 0, ExitCode::internal,
            "{}: HDF5 did not hand its chunks to the driver", target_.path);
    return target_.placed_at;
  }

  void annotate(hid_t group, const OutputAttribute& attribute) {
    const auto write = [&](hid_t type, const void* value) {
      const Hdf5Handle space = own(check(H5Screate(H5S_SCALAR)), H5Sclose);
      const Hdf5Handle written = own(check(H5Acreate2(group, attribute.name.c_str(), type,
                                                      space.get().value, H5P_DEFAULT, H5P_DEFAULT)),
                                     H5Aclose);
      check(H5Awrite(written.get().value, type, value));
      close(written);
    };
    if (const auto* text = std::get_if<std::string>(&attribute.value)) {
      const Hdf5Handle type = own(check(H5Tcopy(H5T_C_S1)), H5Tclose);
      check(H5Tset_size(type.get().value, text->size() + 1));
      check(H5Tset_cset(type.get().value, H5T_CSET_UTF8));
      write(type.get().value, text->c_str());
    } else if (const auto* integer = std::get_if<std::int64_t>(&attribute.value)) {
      write(H5T_NATIVE_INT64, integer);
    } else {
      write(H5T_NATIVE_DOUBLE, std::get_if<double>(&attribute.value));
    }
  }

  DriverTarget target_;
  std::byte placeholder_{};
  Hdf5Handle file_;
};

}  // namespace

std::vector<std::vector<std::int64_t>> lay_out(int descriptor, const std::string& path,
                                               std::span<const LayoutRequest> datasets,
                                               std::span<const OutputAttribute> attributes) {
  const Hdf5Guard guard;
  LayoutWriter writer(descriptor, path);
  std::vector<std::vector<std::int64_t>> offsets;
  for (const LayoutRequest& dataset : datasets) offsets.push_back(writer.add(dataset));
  writer.annotate(attributes);
  writer.finish();
  return offsets;
}

}  // namespace annulus
