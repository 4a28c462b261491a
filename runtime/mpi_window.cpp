#include "runtime/mpi_window.hpp"

#include <mpi.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/mpi_check.hpp"

namespace annulus {
namespace {

class MpiWindow final : public Window {
 public:
  MpiWindow(MPI_Comm comm, OperationGroup& group, std::int64_t bytes) {
    const WaitingStep step("window", group, bytes);
    ANNULUS_CHECK_MPI(MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node_));
    ANNULUS_CHECK_MPI(MPI_Comm_set_errhandler(node_, MPI_ERRORS_RETURN));
    node_group_.emplace(world_ranks_of({MPI_Comm_c2f(node_)}));
    allocate(bytes);
    find_peers(comm);
    // One epoch for the window's life: loads and stores are ordered by fence() alone.
    ANNULUS_CHECK_MPI(MPI_Win_lock_all(MPI_MODE_NOCHECK, window_));
  }

  ~MpiWindow() override {
    // Freeing waits for all ranks: not while this one leaves by an exception.
    int finalized = 0;
    static_cast<void>(MPI_Finalized(&finalized));
    if (finalized != 0 || std::uncaught_exceptions() > exceptions_) return;
    const WaitingStep step("window end", *node_group_, 0);
    static_cast<void>(MPI_Win_unlock_all(window_));
    static_cast<void>(MPI_Win_free(&window_));
    static_cast<void>(MPI_Comm_free(&node_));
  }
  MpiWindow(const MpiWindow&) = delete;
  MpiWindow& operator=(const MpiWindow&) = delete;

  void* local() override { return local_; }
  const void* peer(int peer) const override { return peers_.at(static_cast<std::size_t>(peer)); }

  void fence() override {
    const WaitingStep step("fence", *node_group_, 0);
    ANNULUS_CHECK_MPI(MPI_Win_sync(window_));
    ANNULUS_CHECK_MPI(MPI_Barrier(node_));
    ANNULUS_CHECK_MPI(MPI_Win_sync(window_));
  }

 private:
  void allocate(std::int64_t bytes) {
    // Each rank's part on pages of its own: no false sharing, and memory near the rank that
    // touches it first.
    MPI_Info info = MPI_INFO_NULL;
    ANNULUS_CHECK_MPI(MPI_Info_create(&info));
    ANNULUS_CHECK_MPI(MPI_Info_set(info, "alloc_shared_noncontig", "true"));
    // An empty part needs an address too: null means another node.
    ANNULUS_CHECK_MPI(MPI_Win_allocate_shared(std::max<std::int64_t>(bytes, 1), 1, info, node_,
                                              &local_, &window_));
    ANNULUS_CHECK_MPI(MPI_Info_free(&info));
    ANNULUS_CHECK_MPI(MPI_Win_set_errhandler(window_, MPI_ERRORS_RETURN));
  }

  void find_peers(MPI_Comm comm) {
    int size = 0;
    ANNULUS_CHECK_MPI(MPI_Comm_size(comm, &size));
    MPI_Group all = MPI_GROUP_NULL;
    MPI_Group near = MPI_GROUP_NULL;
    ANNULUS_CHECK_MPI(MPI_Comm_group(comm, &all));
    ANNULUS_CHECK_MPI(MPI_Comm_group(node_, &near));
    std::vector<int> ranks(static_cast<std::size_t>(size));
    for (int rank = 0; rank < size; ++rank) ranks[static_cast<std::size_t>(rank)] = rank;
    std::vector<int> node_ranks(ranks.size());
    ANNULUS_CHECK_MPI(MPI_Group_translate_ranks(all, size, ranks.data(), near, node_ranks.data()));
    ANNULUS_CHECK_MPI(MPI_Group_free(&all));
    ANNULUS_CHECK_MPI(MPI_Group_free(&near));
    for (const int node_rank : node_ranks) {
      void* memory = nullptr;
      if (node_rank != MPI_UNDEFINED) {
        MPI_Aint bytes = 0;
        int unit = 0;
        ANNULUS_CHECK_MPI(MPI_Win_shared_query(window_, node_rank, &bytes, &unit, &memory));
      }
      peers_.push_back(memory);
    }
  }

  int exceptions_ = std::uncaught_exceptions();
  MPI_Comm node_ = MPI_COMM_NULL;
  std::optional<OperationGroup> node_group_;
  MPI_Win window_ = MPI_WIN_NULL;
  void* local_ = nullptr;
  std::vector<const void*> peers_;  // of each rank of the communicator
};

}  // namespace

std::unique_ptr<Window> make_mpi_window(MpiHandle handle, OperationGroup& group,
                                        std::int64_t bytes) {
  return std::make_unique<MpiWindow>(MPI_Comm_f2c(handle.fortran), group, bytes);
}

}  // namespace annulus
