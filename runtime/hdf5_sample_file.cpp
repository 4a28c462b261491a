#include "runtime/hdf5_sample_file.hpp"

#include <hdf5.h>

#include <array>

#include "runtime/hdf5_handle.hpp"
#include "runtime/hdf5_type.hpp"

namespace annulus {

void make_contiguous_file(const std::string& path, const std::string& dataset, const Shape& shape,
                          DType dtype) {
  const Hdf5Guard guard;
  const auto check = [&](auto result) {
    return ANNULUS_CHECK_HDF5(result, ExitCode::io, "{}: cannot be made", path);
  };
  const Hdf5Handle file =
      own(check(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT)), H5Fclose);
  std::array<hsize_t, Shape::kMaxRank> dims{};
  for (int dim = 0; dim < shape.rank(); ++dim) {
    dims[static_cast<std::size_t>(dim)] = static_cast<hsize_t>(shape[dim]);
  }
  const Hdf5Handle space =
      own(check(H5Screate_simple(shape.rank(), dims.data(), nullptr)), H5Sclose);
  const Hdf5Handle storage = own(check(H5Pcreate(H5P_DATASET_CREATE)), H5Pclose);
  check(H5Pset_alloc_time(storage.get().value, H5D_ALLOC_TIME_EARLY));
  check(H5Pset_fill_time(storage.get().value, H5D_FILL_TIME_NEVER));
  const Hdf5Handle type = output_type(dtype);
  const Hdf5Handle made =
      own(check(H5Dcreate2(file.get().value, dataset.c_str(), type.get().value, space.get().value,
                           H5P_DEFAULT, storage.get().value, H5P_DEFAULT)),
          H5Dclose);
  check(H5Fflush(file.get().value, H5F_SCOPE_GLOBAL));
}

}  // namespace annulus
