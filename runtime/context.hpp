#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/mpi_communicator.hpp"
#include "runtime/transport.hpp"
#include "sharding/communicator.hpp"
#include "sharding/mesh.hpp"

namespace annulus {

/// The ranks of one program: MPI's lifetime, who shares a node and which device is whose, and a
/// communicator for every mesh axis and tuple of axes. All constructors are collective.
class Context {
 public:
  /// Over MPI_COMM_WORLD. Starts MPI with MPI_THREAD_MULTIPLE unless it runs already, and ends it
  /// in the destructor if it started it. Throws usage when SLURM asked for several ranks and this
  /// one runs alone, as srun without a matching PMI lets happen.
  explicit Context(const MpiOptions& options = {});
  /// Over a duplicate of the caller's communicator; MPI stays the caller's. Throws usage for
  /// MPI_COMM_NULL.
  explicit Context(MpiHandle handle, const MpiOptions& options = {});
  /// Over any group of ranks, such as threads.
  explicit Context(Communicator& ranks);
  /// Ends MPI if the context started it, but not while an exception passes: the other ranks would
  /// wait; end_all_ranks() is what comes then.
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  Communicator& world() const { return *world_; }
  int rank() const { return world_->rank(); }
  int size() const { return world_->size(); }

  /// Nodes are numbered by their lowest rank; ranks of one node can read each other's windows.
  int nodes() const { return nodes_; }
  int node_of(int rank) const { return node_of_.at(static_cast<std::size_t>(rank)); }
  int node() const { return node_of(rank()); }
  int local_rank() const { return local_rank_; }
  int ranks_on_node() const { return ranks_on_node_; }

  /// cuda where every rank has a device, else cpu. Ranks of a node take its devices in turn.
  Device device() const { return device_ >= 0 ? Device::cuda : Device::cpu; }
  /// The CUDA device of this rank; -1 where device() is cpu.
  int device_index() const { return device_; }

  /// The ranks that differ from this one along `axes` only, ordered by Mesh::group_index. The first
  /// use of an axis or tuple is collective over all ranks. Throws usage when the mesh's ranks are
  /// not the context's.
  Communicator& along(const Mesh& mesh, const AxisTuple& axes);
  /// The same ranks for device memory. @pre device() is cuda
  Communicator& along(const Mesh& mesh, const AxisTuple& axes, Transport transport);

  /// Payload bytes this rank has sent over the communicators of this context.
  std::int64_t bytes_sent() const;

  /// The communicator underneath, for libraries that take one; absent when it is not MPI.
  std::optional<MpiHandle> mpi() const { return mpi_; }

 private:
  class MpiLifetime;
  class Watch;

  void find_nodes();
  void choose_device();

  std::unique_ptr<MpiLifetime> lifetime_;  // outlives the communicators
  std::optional<MpiHandle> mpi_;
  std::unique_ptr<Watch> watch_;
  std::unique_ptr<Communicator> world_;
  // Key: the mesh and those of the axes that have several ranks.
  using Groups = std::map<std::pair<std::string, AxisTuple>, std::unique_ptr<Communicator>>;
  struct DeviceRanks {
    std::unique_ptr<Communicator> world;
    Groups along;
  };

  Communicator& group_of(Communicator& world, Groups& groups, const Mesh& mesh,
                         const AxisTuple& axes);

  Groups along_;
  std::map<Transport, DeviceRanks> device_ranks_;
  std::vector<int> node_of_;
  int nodes_ = 1;
  int local_rank_ = 0;
  int ranks_on_node_ = 1;
  int device_ = -1;
};

/// Ends every rank of the job with `code`, also those inside MPI calls. Without a running MPI ends
/// this process.
[[noreturn]] void end_all_ranks(ExitCode code);

}  // namespace annulus
