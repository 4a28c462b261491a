#include <mpi.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/error.hpp"
#include "runtime/hdf5_reader.hpp"
#include "runtime/mpi_check.hpp"
#include "runtime/mpi_communicator.hpp"

namespace annulus {
namespace {

// Cuts a box along its outermost dimensions until every piece fits `most_bytes`.
void cut(const Box& box, std::int64_t element_bytes, std::int64_t most_bytes,
         std::vector<Box>& pieces) {
  if (box.extent.elements() * element_bytes <= most_bytes) return pieces.push_back(box);
  int dim = 0;
  while (dim < box.extent.rank() && box.extent[dim] == 1) ++dim;
  if (dim == box.extent.rank()) return pieces.push_back(box);
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

// What a rank reads in a round: bytes of the file, scattered as `type` says from `offset` on.
struct Scattered {
  std::int64_t offset = 0;
  MPI_Datatype type = MPI_BYTE;
  void* data = nullptr;
  std::int64_t bytes = 0;
};

// The bytes of a box: an inner run, repeated with the strides of the outer dimensions.
class BoxType {
 public:
  BoxType(const Box& box, const Shape& byte_strides, std::int64_t element_bytes) {
    const auto run = static_cast<int>(element_bytes);
    ANNULUS_CHECK_MPI(MPI_Type_contiguous(run, MPI_BYTE, &type_));
    for (int dim = box.extent.rank() - 1; dim >= 0; --dim) {
      MPI_Datatype outer = MPI_DATATYPE_NULL;
      ANNULUS_CHECK_MPI(MPI_Type_create_hvector(static_cast<int>(box.extent[dim]), 1,
                                                byte_strides[dim], type_, &outer));
      ANNULUS_CHECK_MPI(MPI_Type_free(&type_));
      type_ = outer;
    }
    ANNULUS_CHECK_MPI(MPI_Type_commit(&type_));
  }
  ~BoxType() { static_cast<void>(MPI_Type_free(&type_)); }
  BoxType(const BoxType&) = delete;
  BoxType& operator=(const BoxType&) = delete;

  MPI_Datatype get() const { return type_; }

 private:
  MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

// A file open on all ranks, which take part in every call.
class CollectiveFile {
 public:
  CollectiveFile(MPI_Comm ranks, const std::string& path, const std::string& what)
      : ranks_(ranks), what_(what) {
    const int code = MPI_File_open(ranks, path.c_str(), MPI_MODE_RDONLY, MPI_INFO_NULL, &file_);
    require(all_well(ranks, code == MPI_SUCCESS), ExitCode::io,
            "{}: cannot be opened by all ranks: {}", path,
            code == MPI_SUCCESS ? "a peer cannot open it" : mpi_error_text(code));
  }
  ~CollectiveFile() {
    if (file_ != MPI_FILE_NULL) static_cast<void>(MPI_File_close(&file_));
  }
  CollectiveFile(const CollectiveFile&) = delete;
  CollectiveFile& operator=(const CollectiveFile&) = delete;

  /// The largest of the ranks' numbers of rounds.
  std::size_t rounds(std::size_t mine) const {
    auto most = static_cast<long long>(mine);
    ANNULUS_CHECK_MPI(MPI_Allreduce(MPI_IN_PLACE, &most, 1, MPI_LONG_LONG, MPI_MAX, ranks_));
    return static_cast<std::size_t>(most);
  }

  /// One round; a rank that is done passes no bytes. `well` of all ranks decides whether it is
  /// begun, so that one that cannot go on takes the others along.
  void read(const Scattered& part, const std::string& problem) {
    require(all_well(ranks_, problem.empty()), ExitCode::bad_data, "{}",
            problem.empty() ? what_ + ": a peer cannot read it" : problem);
    int code = MPI_File_set_view(file_, part.offset, MPI_BYTE, part.type, "native", MPI_INFO_NULL);
    MPI_Status status{};
    const auto bytes = static_cast<int>(part.bytes);
    if (code == MPI_SUCCESS) {
      code = MPI_File_read_all(file_, part.data, bytes, MPI_BYTE, &status);
    }
    int got = 0;
    if (code == MPI_SUCCESS) code = MPI_Get_count(&status, MPI_BYTE, &got);
    const bool well = code == MPI_SUCCESS && got == bytes;
    std::string reason = "a peer failed";
    if (code != MPI_SUCCESS) reason = mpi_error_text(code);
    if (code == MPI_SUCCESS && !well) reason = fmt::format("{} of {} bytes came", got, bytes);
    require(all_well(ranks_, well), ExitCode::io, "{}: collective read failed: {}", what_, reason);
  }

 private:
  MPI_Comm ranks_;
  const std::string& what_;
  MPI_File file_ = MPI_FILE_NULL;
};

void read_contiguous(CollectiveFile& file, const OpenDataset& dataset, const Selection& selection,
                     const TensorView& destination, std::int64_t staging_bytes) {
  const StoredType& type = dataset.info.type;
  const Shape strides = byte_strides(dataset.info.shape, type.bytes);
  std::vector<Box> pieces;
  for_each_box(selection, [&](const Box& box) { cut(box, type.bytes, staging_bytes, pieces); });
  Buffer staging(Device::cpu, std::clamp<std::int64_t>(dataset.info.data_bytes, type.bytes,
                                                       std::max<std::int64_t>(staging_bytes, 8)));
  const std::size_t rounds = file.rounds(pieces.size());
  for (std::size_t round = 0; round < rounds; ++round) {
    if (round >= pieces.size()) {
      file.read({}, "");
      continue;
    }
    const Box& piece = pieces[round];
    const BoxType bytes_of_piece(piece, strides, type.bytes);
    auto* data = static_cast<std::byte*>(staging.data());
    const std::int64_t bytes = piece.extent.elements() * type.bytes;
    std::int64_t offset = dataset.info.file_offset;
    for (int dim = 0; dim < strides.rank(); ++dim) {
      offset += piece.global_begin[dim] * strides[dim];
    }
    file.read({offset, bytes_of_piece.get(), data, bytes}, "");
    exchange_bytes(type, {data, static_cast<std::size_t>(bytes)});
    store_block(dataset, data, byte_strides(piece.extent, type.bytes),
                subview(destination, piece.local_begin, piece.extent));
  }
}

void read_chunked(CollectiveFile& file, const OpenDataset& dataset, const Selection& selection,
                  const TensorView& destination) {
  ChunkDecoder decoder(dataset, selection, destination);
  const std::vector<ChunkDecoder::Wanted> wanted = decoder.wanted();
  const std::size_t rounds = file.rounds(wanted.size());
  std::string problem;
  for (std::size_t round = 0; round < rounds; ++round) {
    const bool mine = round < wanted.size();
    Scattered part;
    if (mine && wanted[round].stored != nullptr) {
      const StoredChunk& chunk = *wanted[round].stored;
      part = {chunk.offset, MPI_BYTE, decoder.room(chunk).data(), chunk.bytes};
    }
    file.read(part, problem);
    try {
      if (mine) decoder.place(wanted[round]);
    } catch (const Error& error) {
      problem = error.what();
    }
  }
  // Whoever failed in the last round says so now.
  file.read({}, problem);
}

}  // namespace

void Hdf5File::read_collectively(const MpiHandle& ranks, const DatasetInfo& info,
                                 const Selection& selection, TensorView destination,
                                 const ReadOptions& options) const {
  const MPI_Comm communicator = MPI_Comm_f2c(ranks.fortran);
  const OpenDataset dataset = open_dataset(info);
  std::string problem;
  try {
    require_selection(dataset, selection, destination);
  } catch (const Error& error) {
    problem = error.what();
  }
  require(all_well(communicator, problem.empty()), ExitCode::bad_data, "{}",
          problem.empty() ? dataset.what + ": a peer cannot read it" : problem);
  if (info.storage == Storage::compact) return read_compact(dataset, selection, destination);
  CollectiveFile file(communicator, path(), dataset.what);
  if (info.storage == Storage::chunked) {
    read_chunked(file, dataset, selection, destination);
  } else {
    read_contiguous(file, dataset, selection, destination, options.staging_bytes);
  }
}

}  // namespace annulus
