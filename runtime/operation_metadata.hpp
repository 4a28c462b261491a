#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "kernels/types.hpp"
#include "runtime/context.hpp"
#include "runtime/transport.hpp"
#include "sharding/mesh.hpp"
#include "sharding/partition_manager.hpp"

namespace annulus {

/// Tuning of one operation; none of it changes what is computed.
struct OperationTuning {
  /// Kernel by its name in the backend table; empty: the first that supports the problem.
  std::string kernel;
  /// Ring: neighbouring ranks' rows share a stage until it has so many.
  std::int64_t stage_rows = 1024;
  /// Ranks of a node read each other's keys and values where they lie.
  bool in_place = true;
  /// `auto`: a file of measured rates to choose by; empty: that of the environment's ANNULUS_RATES,
  /// or the defaults of the backend.
  std::string rates;
  friend bool operator==(const OperationTuning&, const OperationTuning&) = default;
};

/// What a program says about its operations; what it leaves out is taken from elsewhere.
struct OperationConfig {
  std::optional<DType> runtime_dtype = std::nullopt;
  std::optional<DType> runtime_softmax_dtype = std::nullopt;
  std::optional<std::string> sequence_axis_name = std::nullopt;
  std::optional<std::string> backend = std::nullopt;
  std::optional<Transport> transport = std::nullopt;
  std::optional<PartitionAxis> partition_axis = std::nullopt;
  std::optional<PartitionManager> partition_manager = std::nullopt;
  std::optional<Mesh> mesh = std::nullopt;
  std::optional<std::map<std::string, OperationTuning>> operation_configs = std::nullopt;
  std::optional<bool> requires_cache = std::nullopt;
  std::optional<float> softmax_scale = std::nullopt;
  std::optional<float> dropout_prob = std::nullopt;
};

/// How operations run. Made by resolve_metadata().
struct OperationMetadata {
  Context* context = nullptr;  // outlives the operations
  Mesh mesh;
  PartitionManager partition_manager;
  /// Queries, keys and values are cast to it.
  DType runtime_dtype = DType::f32;
  /// Softmax is computed in f32 whatever narrower type stands here.
  DType runtime_softmax_dtype = DType::f32;
  std::string sequence_axis_name = "sp";
  std::string backend = "cpu";
  /// Of device tensors; host tensors go by MPI.
  Transport transport = Transport::automatic;
  /// By an operation's registered name.
  std::map<std::string, OperationTuning> operation_configs = {};
  /// None: the operation's own default.
  std::optional<bool> requires_cache = std::nullopt;
  /// None: head_dim^-0.5.
  std::optional<float> softmax_scale = std::nullopt;
  float dropout_prob = 0.0F;
};

/// Each value from `given`, else from `base`, else the default: float32 for both dtypes, "sp", the
/// backend of the mesh (cuda where each rank has a device and the dtype has 16 bits, else cpu), a
/// partition manager over the partition axis. Throws usage without a mesh, for one of other ranks
/// than the context's, and for values that contradict each other.
OperationMetadata resolve_metadata(Context& context, const OperationConfig& given,
                                   const OperationConfig& base = {});

}  // namespace annulus
