#include "runtime/checked_gather.hpp"

#include <mpi.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/message_digest.hpp"
#include "runtime/mpi_check.hpp"

namespace annulus {

void put_digest(std::byte* data, std::size_t bytes) {
  const std::uint64_t digest = message_digest(data, static_cast<std::int64_t>(bytes));
  static_assert(sizeof digest == kDigestBytes);
  std::memcpy(data + bytes, &digest, sizeof digest);
}

void check_arrived(const std::byte* data, std::size_t bytes, int from, const char* operation) {
  std::uint64_t digest = 0;
  std::memcpy(&digest, data + bytes, sizeof digest);
  require(digest == message_digest(data, static_cast<std::int64_t>(bytes)), ExitCode::peer,
          "{}: {} bytes from rank {} arrived damaged", operation, bytes, from);
}

void checked_all_gather(MpiHandle handle, std::span<const std::byte> mine, std::byte* all,
                        std::size_t stride) {
  const MPI_Comm comm = MPI_Comm_f2c(handle.fortran);
  int ranks = 1;
  ANNULUS_CHECK_MPI(MPI_Comm_size(comm, &ranks));
  const std::size_t width = mine.size() + kDigestBytes;
  std::vector<std::byte> own(width);
  std::vector<std::byte> parts(width * static_cast<std::size_t>(ranks));
  if (!mine.empty()) std::memcpy(own.data(), mine.data(), mine.size());
  put_digest(own.data(), mine.size());
  const int count = static_cast<int>(width);
  ANNULUS_CHECK_MPI(
      MPI_Allgather(own.data(), count, MPI_BYTE, parts.data(), count, MPI_BYTE, comm));
  for (int rank = 0; rank < ranks; ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    check_arrived(parts.data() + at * width, mine.size(), rank, "all_gather");
    if (!mine.empty()) std::memcpy(all + at * stride, parts.data() + at * width, mine.size());
  }
}

}  // namespace annulus
