#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sharding/communicator.hpp"

namespace annulus {

/// Windows of device memory which all ranks of one device read in place: mapped into each other's
/// processes, ordered by events between their streams. Those of all ranks lie at equal distances in
/// memory of the first. They are kept for the next use; to make and map one takes longer than many
/// a kernel.
class PeerWindows {
 public:
  /// @pre the ranks of `host` are on one device
  explicit PeerWindows(Communicator& host);
  ~PeerWindows();
  PeerWindows(const PeerWindows&) = delete;
  PeerWindows& operator=(const PeerWindows&) = delete;

  /// Collective, as begin_writes() needs: every rank's end_reads() of the same memory came before.
  std::unique_ptr<Window> expose(std::int64_t bytes, std::int64_t granule);
  /// Closes all mappings. Collective: no rank frees its memory before that.
  void close();
  /// Forgets all memory without freeing it.
  void leak() noexcept;

 private:
  struct Memory;
  class SharedWindow;

  Communicator& host_;
  std::unique_ptr<Communicator> turns_;  // carries the word whose turn it is, and nothing else
  std::vector<std::shared_ptr<Memory>> kept_;
};

}  // namespace annulus
