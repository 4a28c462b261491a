#pragma once

#include <cstddef>
#include <span>

#include "runtime/mpi_communicator.hpp"

namespace annulus {

/// MPI_Allgather of equal contributions with a digest of each: throws peer, naming the rank, when
/// one arrived damaged. `all` may be any place for ranks × mine bytes, `stride` apart.
void checked_all_gather(MpiHandle comm, std::span<const std::byte> mine, std::byte* all,
                        std::size_t stride);

/// The same for one value of each rank, in rank order.
template <typename Value>
void checked_all_gather(MpiHandle comm, const Value& mine, std::span<Value> all) {
  checked_all_gather(comm, std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(all).data(),
                     sizeof(Value));
}

/// Throws peer unless the digest behind `bytes` of data is that of the data.
void check_arrived(const std::byte* data, std::size_t bytes, int from, const char* operation);
/// Writes the digest of `bytes` of data behind them.
void put_digest(std::byte* data, std::size_t bytes);
inline constexpr std::size_t kDigestBytes = 8;

}  // namespace annulus
