#include <hdf5.h>
#include <mpi.h>

#include <algorithm>
#include <array>
#include <vector>

#include "kernels/buffer.hpp"
#include "runtime/hdf5_open.hpp"
#include "runtime/mpi_check.hpp"
#include "runtime/mpi_communicator.hpp"

namespace annulus {

#ifdef H5_HAVE_PARALLEL
namespace {

// Cuts a box along its outermost dimensions until every piece fits `most_bytes`.
void cut(const Box& box, std::int64_t element_bytes, std::int64_t most_bytes,
         std::vector<Box>& pieces) {
  if (box.extent.elements() * element_bytes <= most_bytes) return pieces.push_back(box);
  int dim = 0;
  while (box.extent[dim] == 1) ++dim;
  const std::int64_t row_bytes = box.extent.elements() / box.extent[dim] * element_bytes;
  const std::int64_t step = std::max<std::int64_t>(1, most_bytes / row_bytes);
  for (std::int64_t begin = 0; begin < box.extent[dim]; begin += step) {
    Box piece = box;
    piece.global_begin[dim] += begin;
    piece.local_begin[dim] += begin;
    piece.extent[dim] = std::min(step, box.extent[dim] - begin);
    cut(piece, element_bytes, most_bytes, pieces);
  }
}

bool all_well(MPI_Comm ranks, bool here) {
  int well = here ? 1 : 0;
  ANNULUS_CHECK_MPI(MPI_Allreduce(MPI_IN_PLACE, &well, 1, MPI_INT, MPI_MIN, ranks));
  return well != 0;
}

// The same number of reads on every rank: those that are done take part with an empty selection.
class CollectiveReader {
 public:
  CollectiveReader(MPI_Comm ranks, const std::string& path, const std::string& dataset)
      : ranks_(ranks), path_(path) {
    const Hdf5Handle access = own(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
    transfer_ = own(H5Pcreate(H5P_DATASET_XFER), H5Pclose);
    const bool ready = access && transfer_ &&
                       H5Pset_fapl_mpio(access.get().value, ranks, MPI_INFO_NULL) >= 0 &&
                       H5Pset_dxpl_mpio(transfer_.get().value, H5FD_MPIO_COLLECTIVE) >= 0;
    require(all_well(ranks_, ready), ExitCode::internal, "{}: no collective reads", path);
    file_ = own(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get().value), H5Fclose);
    const std::string reason = file_ ? "a peer cannot open it" : hdf5_reason();
    require(all_well(ranks_, static_cast<bool>(file_)), ExitCode::io,
            "{}: cannot be opened by all ranks: {}", path, reason);
    dataset_ = own(H5Dopen2(file_.get().value, dataset.c_str(), H5P_DEFAULT), H5Dclose);
    type_ = own(dataset_ ? H5Dget_type(dataset_.get().value) : -1, H5Tclose);
    require(all_well(ranks_, static_cast<bool>(type_)), ExitCode::io,
            "{}: {} cannot be opened by all ranks", path, dataset);
  }

  void read(const OpenDataset& dataset, const std::vector<Box>& pieces,
            const TensorView& destination, std::int64_t staging_bytes) {
    long long rounds = static_cast<long long>(pieces.size());
    ANNULUS_CHECK_MPI(MPI_Allreduce(MPI_IN_PLACE, &rounds, 1, MPI_LONG_LONG, MPI_MAX, ranks_));
    Buffer staging(Device::cpu,
                   std::min(staging_bytes, std::max<std::int64_t>(dataset.info.data_bytes, 1)));
    for (std::size_t round = 0; round < static_cast<std::size_t>(rounds); ++round) {
      const bool mine = round < pieces.size();
      const bool well = read_piece(mine ? &pieces[round] : nullptr, dataset, staging);
      const std::string reason = well ? "a peer failed" : hdf5_reason();
      require(all_well(ranks_, well), ExitCode::io, "{}: collective read failed: {}", dataset.what,
              reason);
      if (!mine) continue;
      const Box& piece = pieces[round];
      auto* data = static_cast<std::byte*>(staging.data());
      const std::int64_t bytes = piece.extent.elements() * dataset.info.type.bytes;
      exchange_bytes(dataset.info.type, {data, static_cast<std::size_t>(bytes)});
      Shape strides = contiguous_strides(piece.extent);
      for (int dim = 0; dim < strides.rank(); ++dim) strides[dim] *= dataset.info.type.bytes;
      store_block(dataset, data, strides, subview(destination, piece.local_begin, piece.extent));
    }
  }

 private:
  bool read_piece(const Box* piece, const OpenDataset& dataset, const Buffer& staging) {
    const int rank = dataset.info.shape.rank();
    std::array<hsize_t, Shape::kMaxRank> begin{};
    std::array<hsize_t, Shape::kMaxRank> count{};
    for (int dim = 0; dim < rank; ++dim) {
      const auto i = static_cast<std::size_t>(dim);
      begin[i] = piece != nullptr ? static_cast<hsize_t>(piece->global_begin[dim]) : 0;
      count[i] = piece != nullptr ? static_cast<hsize_t>(piece->extent[dim]) : 1;
    }
    const Hdf5Handle memory = own(H5Screate_simple(rank, count.data(), nullptr), H5Sclose);
    const Hdf5Handle space = own(H5Dget_space(dataset_.get().value), H5Sclose);
    if (!memory || !space) return false;
    const bool selected =
        piece != nullptr
            ? H5Sselect_hyperslab(space.get().value, H5S_SELECT_SET, begin.data(), nullptr,
                                  count.data(), nullptr) >= 0
            : H5Sselect_none(space.get().value) >= 0 && H5Sselect_none(memory.get().value) >= 0;
    return selected && H5Dread(dataset_.get().value, type_.get().value, memory.get().value,
                               space.get().value, transfer_.get().value, staging.data()) >= 0;
  }

  MPI_Comm ranks_;
  const std::string& path_;
  Hdf5Handle transfer_;
  Hdf5Handle file_;
  Hdf5Handle dataset_;
  Hdf5Handle type_;
};

}  // namespace

void Hdf5File::read_collectively(const MpiHandle& ranks, const DatasetInfo& dataset,
                                 const Selection& selection, TensorView destination,
                                 const ReadOptions& options) const {
  const MPI_Comm communicator = MPI_Comm_f2c(ranks.fortran);
  const Hdf5Guard guard;
  std::vector<Box> pieces;
  std::optional<OpenDataset> opened;
  std::string problem;
  try {
    opened = open_dataset(dataset.path);
    selection.validate(opened->info.shape, opened->what);
    for_each_box(selection, [&](const Box& box) {
      cut(box, opened->info.type.bytes, options.staging_bytes, pieces);
    });
  } catch (const Error& error) {
    problem = error.what();
  }
  require(all_well(communicator, problem.empty()), ExitCode::bad_data, "{}",
          problem.empty() ? dataset.path + ": a peer cannot read it" : problem);
  CollectiveReader(communicator, path(), dataset.path)
      .read(*opened, pieces, destination, options.staging_bytes);
}

#else

void Hdf5File::read_collectively(const MpiHandle& /*ranks*/, const DatasetInfo& dataset,
                                 const Selection& /*selection*/, TensorView /*destination*/,
                                 const ReadOptions& /*options*/) const {
  throw Error(ExitCode::usage, fmt::format("{}: {}: collective reads need a parallel HDF5; this "
                                           "build has a serial one",
                                           path(), dataset.path));
}

#endif

}  // namespace annulus
