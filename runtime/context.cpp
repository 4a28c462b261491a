#include "runtime/context.hpp"

#include <mpi.h>

#include <algorithm>
#include <cstdlib>
#include <exception>

#include "kernels/cuda_support.hpp"
#include "runtime/leak_check.hpp"
#include "runtime/mpi_check.hpp"
#include "runtime/operation_log.hpp"
#include "runtime/watchdog.hpp"

namespace annulus {
namespace {

bool mpi_is_running() {
  int started = 0;
  int ended = 0;
  ANNULUS_CHECK_MPI(MPI_Initialized(&started));
  ANNULUS_CHECK_MPI(MPI_Finalized(&ended));
  require(ended == 0, ExitCode::usage, "context: MPI has already been finalized");
  return started != 0;
}

/// Without a PMI that Open MPI understands, srun starts N programs that each believe to be alone.
/// Under mpirun SLURM's variables describe mpirun's daemons, hence mean nothing here.
void refuse_singletons(int ranks) {
  const char* tasks = std::getenv("SLURM_NTASKS");
  const bool by_srun = std::getenv("SLURM_STEP_ID") && !std::getenv("OMPI_COMM_WORLD_SIZE");
  if (ranks > 1 || tasks == nullptr || !by_srun) return;
  require(std::atoi(tasks) <= 1, ExitCode::usage,
          "context: SLURM started {} tasks but each runs alone; use srun --mpi=pmix", tasks);
}

template <typename Value>
std::vector<Value> gather_from_all(Communicator& communicator, const Value& mine) {
  std::vector<Value> all(static_cast<std::size_t>(communicator.size()));
  communicator.all_gather(std::as_bytes(std::span(&mine, 1)),
                          std::as_writable_bytes(std::span(all)));
  return all;
}

MpiHandle present(MpiHandle handle) {
  require(MPI_Comm_f2c(handle.fortran) != MPI_COMM_NULL, ExitCode::usage,
          "context: MPI_COMM_NULL has no ranks; only members of a communicator make a context");
  return handle;
}

}  // namespace

class Context::MpiLifetime {
 public:
  MpiLifetime() : started_(!mpi_is_running()), exceptions_(std::uncaught_exceptions()) {
    if (!started_) return;
    int provided = 0;
    const LoggedStep step("start of MPI");
    const WaitForStep wait(step);
    ANNULUS_CHECK_MPI(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided));
    require(provided == MPI_THREAD_MULTIPLE, ExitCode::usage,
            "context: this MPI gives thread level {}, MPI_THREAD_MULTIPLE ({}) is needed", provided,
            MPI_THREAD_MULTIPLE);
  }
  ~MpiLifetime() {
    if (!started_ || std::uncaught_exceptions() != exceptions_) return;
    const LoggedStep step("end of MPI");
    const WaitForStep wait(step);
    check_for_leaks();
    static_cast<void>(MPI_Finalize());
  }
  MpiLifetime(const MpiLifetime&) = delete;
  MpiLifetime& operator=(const MpiLifetime&) = delete;

  /// MPI, which ends with this.
  bool started() const { return started_; }

 private:
  bool started_;
  int exceptions_;
};

/// While it lives the ranks' watchdogs, where they were started, speak to each other; in MPI that
/// the context started, until that ends.
class Context::Watch {
 public:
  Watch(MpiHandle ranks, bool until_mpi_ends)
      : until_mpi_ends_(until_mpi_ends), exceptions_(std::uncaught_exceptions()) {
    Watchdog::of_process().connect(ranks);
  }
  ~Watch() {
    if (!until_mpi_ends_ && std::uncaught_exceptions() == exceptions_)
      Watchdog::of_process().disconnect();
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  bool until_mpi_ends_;
  int exceptions_;
};

Context::Context(const MpiOptions& options)
    : lifetime_(std::make_unique<MpiLifetime>()),
      mpi_(MpiHandle{MPI_Comm_c2f(MPI_COMM_WORLD)}),
      watch_(std::make_unique<Watch>(*mpi_, lifetime_->started())),
      world_(make_mpi_communicator(*mpi_, options)) {
  refuse_singletons(world_->size());
  find_nodes();
  choose_device();
}

Context::Context(MpiHandle handle, const MpiOptions& options)
    : mpi_(present(handle)),
      watch_(std::make_unique<Watch>(handle, false)),
      world_(make_mpi_communicator(handle, options)) {
  find_nodes();
  choose_device();
}

Context::Context(Communicator& ranks) : world_(ranks.split(0, ranks.rank())) {
  find_nodes();
  choose_device();
}

Context::~Context() = default;

/// Ranks whose memory can be read in place are on one node: what a node means here.
void Context::find_nodes() {
  const std::unique_ptr<Window> window = world_->expose(1);
  int lowest = 0;
  while (lowest != rank() && window->peer(lowest) == nullptr) ++lowest;
  const std::vector<int> lowest_of = gather_from_all(*world_, lowest);
  std::vector<int> leaders = lowest_of;
  std::sort(leaders.begin(), leaders.end());
  leaders.erase(std::unique(leaders.begin(), leaders.end()), leaders.end());
  nodes_ = static_cast<int>(leaders.size());
  for (const int leader : lowest_of) {
    const auto at = std::lower_bound(leaders.begin(), leaders.end(), leader);
    node_of_.push_back(static_cast<int>(at - leaders.begin()));
  }
  const auto mine = node_of_.begin() + rank();
  local_rank_ = static_cast<int>(std::count(node_of_.begin(), mine, *mine));
  ranks_on_node_ = static_cast<int>(std::count(node_of_.begin(), node_of_.end(), *mine));
}

void Context::choose_device() {
  const int devices = kernels::cuda::device_count();
  const std::vector<int> all = gather_from_all(*world_, devices);
  if (std::any_of(all.begin(), all.end(), [](int count) { return count == 0; })) return;
  device_ = local_rank_ % devices;
  kernels::cuda::use_device(device_);
}

Communicator& Context::along(const Mesh& mesh, const AxisTuple& axes) {
  return group_of(*world_, along_, mesh, axes);
}

Communicator& Context::along(const Mesh& mesh, const AxisTuple& axes, Transport transport) {
  DeviceRanks& ranks = device_ranks_[transport];
  if (!ranks.world) ranks.world = make_device_communicator(*world_, transport, nodes_);
  return group_of(*ranks.world, ranks.along, mesh, axes);
}

Communicator& Context::group_of(Communicator& world, Groups& groups, const Mesh& mesh,
                                const AxisTuple& axes) {
  require(mesh.ranks() == size(), ExitCode::usage, "context: mesh {} has {} ranks, {} run",
          mesh.to_string(), mesh.ranks(), size());
  AxisTuple split_axes;  // axes of size 1 change nothing
  for (const std::string& axis : axes) {
    if (mesh.size(axis) > 1) split_axes.push_back(axis);
  }
  std::unique_ptr<Communicator>& communicator = groups[{mesh.to_string(), split_axes}];
  if (!communicator) {
    const int leader = mesh.group(rank(), split_axes).front();
    communicator = world.split(leader, mesh.group_index(rank(), split_axes));
  }
  return *communicator;
}

std::int64_t Context::bytes_sent() const {
  const auto sum = [](const Groups& groups) {
    std::int64_t bytes = 0;
    for (const auto& [group, communicator] : groups) bytes += communicator->bytes_sent();
    return bytes;
  };
  std::int64_t bytes = world_->bytes_sent() + sum(along_);
  for (const auto& [transport, ranks] : device_ranks_) {
    bytes += ranks.world->bytes_sent() + sum(ranks.along);
  }
  return bytes;
}

void end_all_ranks(ExitCode code) {
  int started = 0;
  int ended = 0;
  static_cast<void>(MPI_Initialized(&started));
  static_cast<void>(MPI_Finalized(&ended));
  if (started != 0 && ended == 0) {
    static_cast<void>(MPI_Abort(MPI_COMM_WORLD, static_cast<int>(code)));
  }
  std::_Exit(static_cast<int>(code));
}

}  // namespace annulus
