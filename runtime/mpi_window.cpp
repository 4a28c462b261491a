#include "runtime/mpi_window.hpp"

#include <mpi.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <numeric>
#include <optional>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/checked_gather.hpp"
#include "runtime/mpi_check.hpp"
#include "runtime/shared_memory.hpp"

namespace annulus {
namespace {

bool mpi_has_ended() {
  int finalized = 0;
  static_cast<void>(MPI_Finalized(&finalized));
  return finalized != 0;
}

std::int64_t round_up(std::int64_t bytes, std::int64_t to) { return (bytes + to - 1) / to * to; }

/// Bytes from one rank's memory to the next's: a multiple of the granule where that does not double
/// them, on huge pages where they are worth it.
std::int64_t stride_for(std::int64_t bytes, std::int64_t granule) {
  constexpr std::int64_t kPage = 4096;
  constexpr std::int64_t kHugePage = std::int64_t{2} << 20;
  constexpr std::int64_t kLittle = std::int64_t{1} << 20;  // of addresses, not of memory
  constexpr std::int64_t kLargestGranule = std::int64_t{1} << 30;
  std::int64_t alignment = bytes >= kHugePage ? kHugePage : kPage;
  if (granule <= kLargestGranule) {
    for (const std::int64_t page : {alignment, kPage}) {
      const std::int64_t both = std::lcm(page, granule);
      if (both <= std::max(bytes, kLittle)) return round_up(bytes, both);
    }
  }
  return round_up(bytes, alignment);
}

}  // namespace

/// The ranks that share this one's node.
class MpiWindows::Node {
 public:
  explicit Node(MPI_Comm all) {
    ANNULUS_CHECK_MPI(MPI_Comm_split_type(all, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &comm_));
    ANNULUS_CHECK_MPI(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN));
    ANNULUS_CHECK_MPI(MPI_Comm_rank(comm_, &rank_));
    ANNULUS_CHECK_MPI(MPI_Comm_size(comm_, &size_));
    group_.emplace(world_ranks_of({MPI_Comm_c2f(comm_)}));
    find_peers(all);
  }
  ~Node() {
    if (!mpi_has_ended()) static_cast<void>(MPI_Comm_free(&comm_));
  }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  MPI_Comm comm() const { return comm_; }
  OperationGroup& group() { return *group_; }
  int rank() const { return rank_; }
  int size() const { return size_; }
  /// Of a rank of the whole communicator; -1: on another node.
  int node_rank(int peer) const { return node_ranks_.at(static_cast<std::size_t>(peer)); }
  int peers() const { return static_cast<int>(node_ranks_.size()); }

  void barrier() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    ANNULUS_CHECK_MPI(MPI_Barrier(comm_));
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }

 private:
  void find_peers(MPI_Comm all) {
    int size = 0;
    ANNULUS_CHECK_MPI(MPI_Comm_size(all, &size));
    MPI_Group everybody = MPI_GROUP_NULL;
    MPI_Group near = MPI_GROUP_NULL;
    ANNULUS_CHECK_MPI(MPI_Comm_group(all, &everybody));
    ANNULUS_CHECK_MPI(MPI_Comm_group(comm_, &near));
    std::vector<int> ranks(static_cast<std::size_t>(size));
    std::iota(ranks.begin(), ranks.end(), 0);
    node_ranks_.resize(ranks.size());
    ANNULUS_CHECK_MPI(
        MPI_Group_translate_ranks(everybody, size, ranks.data(), near, node_ranks_.data()));
    ANNULUS_CHECK_MPI(MPI_Group_free(&everybody));
    ANNULUS_CHECK_MPI(MPI_Group_free(&near));
    std::replace(node_ranks_.begin(), node_ranks_.end(), MPI_UNDEFINED, -1);
  }

  MPI_Comm comm_ = MPI_COMM_NULL;
  std::optional<OperationGroup> group_;
  int rank_ = 0;
  int size_ = 0;
  std::vector<int> node_ranks_;  // of each rank of the whole communicator
};

/// Memory of every rank of the node: shared by ourselves or, where processes cannot reach each
/// other's descriptors, by MPI.
struct MpiWindows::Memory {
  Memory(Node& node, std::int64_t stride) : stride(stride) {
    own.emplace(stride);
    std::vector<SharedMemory::Ticket> tickets(static_cast<std::size_t>(node.size()));
    const SharedMemory::Ticket mine = own->ticket();
    checked_all_gather(MpiHandle{MPI_Comm_c2f(node.comm())}, mine, std::span(tickets));
    const int mapped = own->map(tickets, static_cast<std::size_t>(node.rank())) ? 1 : 0;
    std::vector<int> mapped_by_all(tickets.size());
    checked_all_gather(MpiHandle{MPI_Comm_c2f(node.comm())}, mapped, std::span(mapped_by_all));
    own->close();
    if (std::count(mapped_by_all.begin(), mapped_by_all.end(), 1) == node.size()) {
      for (std::size_t rank = 0; rank < tickets.size(); ++rank) parts.push_back(own->at(rank));
      return;
    }
    own.reset();
    share_by_mpi(node);
  }
  ~Memory() {
    // Freeing waits for all ranks: not while this one leaves by an exception.
    if (window == MPI_WIN_NULL || mpi_has_ended() || std::uncaught_exceptions() > 0) return;
    static_cast<void>(MPI_Win_unlock_all(window));
    static_cast<void>(MPI_Win_free(&window));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void share_by_mpi(Node& node) {
    void* local = nullptr;
    ANNULUS_CHECK_MPI(
        MPI_Win_allocate_shared(stride, 1, MPI_INFO_NULL, node.comm(), &local, &window));
    ANNULUS_CHECK_MPI(MPI_Win_set_errhandler(window, MPI_ERRORS_RETURN));
    for (int rank = 0; rank < node.size(); ++rank) {
      MPI_Aint bytes = 0;
      int unit = 0;
      void* part = nullptr;
      ANNULUS_CHECK_MPI(MPI_Win_shared_query(window, rank, &bytes, &unit, &part));
      parts.push_back(static_cast<std::byte*>(part));
    }
    // One epoch for the window's life: loads and stores are ordered by fences alone.
    ANNULUS_CHECK_MPI(MPI_Win_lock_all(MPI_MODE_NOCHECK, window));
  }

  std::int64_t stride;
  std::optional<SharedMemory> own;
  MPI_Win window = MPI_WIN_NULL;
  std::vector<std::byte*> parts;  // of each rank of the node
  bool in_use = false;
};

class MpiWindows::SharedWindow final : public Window {
 public:
  SharedWindow(Node& node, std::shared_ptr<Memory> memory)
      : node_(node), memory_(std::move(memory)) {
    memory_->in_use = true;
  }
  ~SharedWindow() override { memory_->in_use = false; }
  SharedWindow(const SharedWindow&) = delete;
  SharedWindow& operator=(const SharedWindow&) = delete;

  void* local() override { return memory_->parts[static_cast<std::size_t>(node_.rank())]; }
  const void* peer(int peer) const override {
    const int rank = node_.node_rank(peer);
    return rank < 0 ? nullptr : memory_->parts[static_cast<std::size_t>(rank)];
  }
  std::int64_t stride() const override { return memory_->own ? memory_->stride : 0; }
  void expect(std::int64_t begin, std::int64_t end) override {
    if (memory_->own) memory_->own->populate(begin, end);
  }
  void fence(Stream /*stream*/) override {
    const WaitingStep step("fence", node_.group(), 0);
    node_.barrier();
  }

 private:
  Node& node_;
  std::shared_ptr<Memory> memory_;
};

MpiWindows::MpiWindows(MpiHandle handle, OperationGroup& group) : handle_(handle), group_(group) {}

MpiWindows::~MpiWindows() = default;

std::unique_ptr<Window> MpiWindows::expose(std::int64_t bytes, std::int64_t granule) {
  const WaitingStep step("window", group_, bytes);
  if (node_ == nullptr) node_ = std::make_unique<Node>(MPI_Comm_f2c(handle_.fortran));
  // An empty part needs an address too: null means another node.
  using Wanted = std::array<std::int64_t, 2>;
  std::vector<Wanted> of_all(static_cast<std::size_t>(node_->size()));
  checked_all_gather(MpiHandle{MPI_Comm_c2f(node_->comm())},
                     Wanted{std::max<std::int64_t>(bytes, 1), granule}, std::span(of_all));
  Wanted most{};
  for (const Wanted& one : of_all) {
    most = {std::max(most[0], one[0]), std::max(most[1], one[1])};
  }
  return std::make_unique<SharedWindow>(*node_, memory_for(most[0], most[1]));
}

/// The same choice on all ranks of the node: they came with the same sizes to the same windows.
std::shared_ptr<MpiWindows::Memory> MpiWindows::memory_for(std::int64_t bytes,
                                                           std::int64_t granule) {
  const std::int64_t wanted = stride_for(bytes, granule);
  const bool in_granules = wanted % granule == 0;
  for (const std::shared_ptr<Memory>& memory : kept_) {
    const bool fits = memory->stride >= bytes && (!in_granules || memory->stride % granule == 0);
    if (!memory->in_use && fits) return memory;
  }
  // What is too small for this one is given back before more is taken.
  std::erase_if(kept_, [](const auto& memory) { return !memory->in_use; });
  return kept_.emplace_back(std::make_shared<Memory>(*node_, wanted));
}

}  // namespace annulus
