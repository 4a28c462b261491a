#include "runtime/distributed_tensor.hpp"

#include <utility>
#include <vector>

#include "kernels/error.hpp"

namespace annulus {
namespace {

/// Global indices of one rank's rows of every dimension.
std::vector<std::vector<std::int64_t>> global_indices(const TensorLayout& layout, int rank) {
  std::vector<std::vector<std::int64_t>> indices;
  for (int dim = 0; dim < layout.global_shape().rank(); ++dim) {
    indices.emplace_back();
    for (const Span run : layout.runs(rank, dim)) {
      for (std::int64_t i = run.begin; i < run.end; ++i) indices.back().push_back(i);
    }
  }
  return indices;
}

void fill(TensorView view, const std::vector<std::vector<std::int64_t>>& indices,
          const DistributedTensor::Function& value) {
  auto* out = static_cast<double*>(view.data);
  std::vector<std::int64_t> global(indices.size());
  for (std::int64_t i = 0; i < view.shape.elements(); ++i) {
    std::int64_t rest = i;
    for (int dim = view.rank() - 1; dim >= 0; --dim) {
      const auto d = static_cast<std::size_t>(dim);
      global[d] = indices[d][static_cast<std::size_t>(rest % view.shape[dim])];
      rest /= view.shape[dim];
    }
    out[i] = value(global);
  }
}

}  // namespace

DistributedTensor::DistributedTensor(Tensor local, TensorLayout layout, int rank)
    : local_(std::move(local)), layout_(std::move(layout)), rank_(rank) {
  const Shape expected = layout_->local_shape(rank);
  require(local_.shape() == expected, ExitCode::bad_data,
          "tensor: rank {} holds {} of {}, expected {}", rank, local_.shape().to_string(),
          layout_->to_string(), expected.to_string());
}

DistributedTensor::DistributedTensor(DType dtype, TensorLayout layout, int rank, Device device,
                                     Stream stream)
    : local_(dtype, layout.local_shape(rank), device, stream),
      layout_(std::move(layout)),
      rank_(rank) {}

DistributedTensor DistributedTensor::filled(DType dtype, const TensorLayout& layout, int rank,
                                            const Function& value, Device device, Stream stream) {
  Tensor exact(DType::f64, layout.local_shape(rank));
  fill(exact.view(), global_indices(layout, rank), value);
  if (dtype == DType::f64 && device == Device::cpu) return {std::move(exact), layout, rank};
  DistributedTensor tensor(dtype, layout, rank, device, stream);
  copy(std::as_const(exact).view(), tensor.local(), stream);
  synchronize(device, stream);  // `exact` goes away
  return tensor;
}

}  // namespace annulus
