#pragma once

#include <cstdint>
#include <memory>

#include "runtime/mpi_communicator.hpp"
#include "runtime/operation_log.hpp"

namespace annulus {

/// The windows of one communicator: memory that its ranks on one node share. Memory of a window
/// that has ended is kept for the next one, since to touch new pages costs as much as to copy them.
class MpiWindows {
 public:
  /// `handle` and its `group` outlive the windows.
  MpiWindows(MpiHandle handle, OperationGroup& group);
  ~MpiWindows();
  MpiWindows(const MpiWindows&) = delete;
  MpiWindows& operator=(const MpiWindows&) = delete;

  /// As Communicator::expose. No rank gets memory back before every rank of the node has come here
  /// again, hence is done with reading it.
  std::unique_ptr<Window> expose(std::int64_t bytes, std::int64_t granule);

 private:
  class Node;
  class SharedWindow;
  struct Memory;

  std::shared_ptr<Memory> memory_for(std::int64_t bytes, std::int64_t granule);

  MpiHandle handle_;
  OperationGroup& group_;
  std::unique_ptr<Node> node_;
  std::vector<std::shared_ptr<Memory>> kept_;
};

}  // namespace annulus
