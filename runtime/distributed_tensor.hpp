#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <utility>

#include "kernels/types.hpp"
#include "runtime/tensor.hpp"
#include "sharding/tensor_layout.hpp"

namespace annulus {

/// One rank's shard of a global tensor, and the layout that says where the rest lies. All ranks
/// hold the same layout and dtype.
class DistributedTensor {
 public:
  /// The value at a global index.
  using Function = std::function<double(std::span<const std::int64_t> global_index)>;

  DistributedTensor() = default;
  /// Throws bad_data when the shard has not the shape that the layout gives `rank`.
  DistributedTensor(Tensor local, TensorLayout layout, int rank);
  /// Uninitialised.
  DistributedTensor(DType dtype, TensorLayout layout, int rank, Device device = Device::cpu,
                    Stream stream = {});
  /// Every rank computes its own elements.
  static DistributedTensor filled(DType dtype, const TensorLayout& layout, int rank,
                                  const Function& value, Device device = Device::cpu,
                                  Stream stream = {});

  explicit operator bool() const { return static_cast<bool>(local_); }
  TensorView local() { return local_.view(); }
  ConstTensorView local() const { return std::as_const(local_).view(); }
  /// @pre the tensor is present, here and below
  const TensorLayout& layout() const { return *layout_; }
  const NamedSharding& sharding() const { return layout_->sharding(); }
  const Shape& global_shape() const { return layout_->global_shape(); }
  DType dtype() const { return local_.dtype(); }
  Device device() const { return local_.device(); }
  int rank() const { return rank_; }

 private:
  Tensor local_;
  std::optional<TensorLayout> layout_;
  int rank_ = 0;
};

}  // namespace annulus
