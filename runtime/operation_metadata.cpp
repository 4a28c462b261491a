#include "runtime/operation_metadata.hpp"

#include <algorithm>

#include "kernels/error.hpp"

namespace annulus {
namespace {

template <typename Value>
std::optional<Value> first(const std::optional<Value>& given, const std::optional<Value>& base) {
  return given ? given : base;
}

PartitionManager manager_of(const OperationConfig& given, const OperationConfig& base) {
  if (given.partition_manager) return *given.partition_manager;
  if (given.partition_axis) return PartitionManager(*given.partition_axis);
  if (base.partition_manager) return *base.partition_manager;
  PartitionAxis axis = base.partition_axis.value_or(PartitionAxis{});
  const bool axis_is_default = !base.partition_axis;
  const auto sequence = first(given.sequence_axis_name, base.sequence_axis_name);
  if (axis_is_default && sequence) {
    axis.sequence = axis.query_length = axis.key_length = AxisRule{{*sequence}};
  }
  return PartitionManager(axis);
}

/// The sequence group is both what the partition says and what the name says.
void check_sequence_axis(const OperationMetadata& metadata) {
  const AxisTuple& axes = metadata.partition_manager.axis().query_length.train;
  const std::string& name = metadata.sequence_axis_name;
  require(
      std::find(axes.begin(), axes.end(), name) != axes.end(), ExitCode::usage,
      "metadata: sequence_axis_name is '{}' but the partition axis splits query_length along {}",
      name, PartitionSpec({axes}).to_string());
}

void check_dtypes(const OperationMetadata& metadata) {
  const DType dtype = metadata.runtime_dtype;
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, ExitCode::usage,
          "metadata: runtime_dtype {} is not f32, f16 or bf16", name(dtype));
  const DType softmax = metadata.runtime_softmax_dtype;
  require(softmax == DType::f32 || softmax == DType::f16 || softmax == DType::bf16, ExitCode::usage,
          "metadata: runtime_softmax_dtype {} is not f32, f16 or bf16; softmax is "
          "computed in f32",
          name(softmax));
}

}  // namespace

OperationMetadata resolve_metadata(Context& context, const OperationConfig& given,
                                   const OperationConfig& base) {
  const std::optional<Mesh> mesh = first(given.mesh, base.mesh);
  require(mesh.has_value(), ExitCode::usage,
          "metadata: pass a mesh, such as Mesh::parse(\"sp={}\", {})", context.size(),
          context.size());
  require(mesh->ranks() == context.size(), ExitCode::usage,
          "metadata: mesh {} has {} ranks, {} run", mesh->to_string(), mesh->ranks(),
          context.size());
  const OperationMetadata defaults{
      .context = &context, .mesh = *mesh, .partition_manager = PartitionManager()};
  OperationMetadata metadata = defaults;
  metadata.partition_manager = manager_of(given, base);
  metadata.runtime_dtype =
      first(given.runtime_dtype, base.runtime_dtype).value_or(defaults.runtime_dtype);
  metadata.runtime_softmax_dtype = first(given.runtime_softmax_dtype, base.runtime_softmax_dtype)
                                       .value_or(defaults.runtime_softmax_dtype);
  const AxisTuple& split = metadata.partition_manager.axis().query_length.train;
  const auto named = first(given.sequence_axis_name, base.sequence_axis_name);
  require(!named || mesh->has(*named), ExitCode::usage,
          "metadata: sequence_axis_name is '{}', which mesh {} has not", named.value_or(""),
          mesh->to_string());
  metadata.sequence_axis_name =
      named.value_or(split.empty() ? defaults.sequence_axis_name : split.front());
  // Devices have no kernels for f32.
  const Device usual = metadata.runtime_dtype == DType::f32 ? Device::cpu : context.device();
  metadata.backend = first(given.backend, base.backend).value_or(std::string(name(usual)));
  metadata.transport = first(given.transport, base.transport).value_or(defaults.transport);
  metadata.operation_configs =
      first(given.operation_configs, base.operation_configs).value_or(defaults.operation_configs);
  metadata.requires_cache = first(given.requires_cache, base.requires_cache);
  metadata.softmax_scale = first(given.softmax_scale, base.softmax_scale);
  metadata.dropout_prob =
      first(given.dropout_prob, base.dropout_prob).value_or(defaults.dropout_prob);
  if (!split.empty()) check_sequence_axis(metadata);
  check_dtypes(metadata);
  return metadata;
}

}  // namespace annulus
