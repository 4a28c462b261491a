#pragma once

#include <cudnn_frontend.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "kernels/cudnn/band_pieces.hpp"
#include "kernels/types.hpp"

namespace annulus::kernels::cudnn {

/// A tensor of the graph as [batch, heads, seq, dim]; all zero: absent.
struct TensorLayout {
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> strides{};

  bool present() const { return shape[1] != 0; }
  friend auto operator<=>(const TensorLayout&, const TensorLayout&) = default;
};

/// [batch, seq, heads, dim] as cuDNN's [batch, heads, seq, dim].
TensorLayout rows_layout(const ConstTensorView& view);
/// [batch, heads, seq_q, seq_kv].
TensorLayout pairs_layout(const ConstTensorView& view);
/// [batch, heads, seq].
TensorLayout statistics_layout(const ConstTensorView& view);

cudnn_frontend::DataType_t data_type(DType dtype);
cudnn_frontend::graph::Tensor_attributes attributes(const char* name, std::int64_t uid,
                                                    const TensorLayout& layout);
/// Gives an output of the graph its place and type.
void set_output(cudnn_frontend::graph::Tensor_attributes& tensor, std::int64_t uid,
                const TensorLayout& layout, DType dtype);

template <typename Options>
void set_band(Options& options, const BandForm& band, std::int64_t seq_kv) {
  namespace fe = cudnn_frontend;
  if (band.diagonal != Diagonal::none) {
    options.set_diagonal_alignment(band.diagonal == Diagonal::top_left
                                       ? fe::DiagonalAlignment_t::TOP_LEFT
                                       : fe::DiagonalAlignment_t::BOTTOM_RIGHT);
  }
  if (band.causal) {
    options.set_diagonal_band_right_bound(0);
  } else if (band.left_bound > 0) {  // cuDNN bounds the left only beside the right
    options.set_diagonal_band_right_bound(static_cast<int>(seq_kv));
  }
  if (band.left_bound > 0) {
    options.set_diagonal_band_left_bound(static_cast<int>(band.left_bound));
  }
}

/// A compiled graph, or why there is none.
struct Plan {
  cudnn_frontend::graph::Graph graph;
  std::string refusal;
  std::int64_t workspace_bytes = 0;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  void set_types(DType dtype);
  void compile(int device);
};

/// Plans by what they depend on; compiling one takes about half a second.
template <typename Descriptor>
class PlanCache {
 public:
  using Build = std::unique_ptr<Plan> (*)(const Descriptor&);

  Plan& find(const Descriptor& descriptor, Build build) {
    const std::scoped_lock lock(mutex_);
    std::unique_ptr<Plan>& plan = plans_[descriptor];
    if (plan == nullptr) plan = build(descriptor);
    return *plan;
  }

 private:
  std::mutex mutex_;
  std::map<Descriptor, std::unique_ptr<Plan>> plans_;
};

/// Runs a plan over device memory by uid. Throws usage where cuDNN refused the graph.
void execute(Plan& plan, int device, std::unordered_map<std::int64_t, void*>& memory,
             cudaStream_t stream);

}  // namespace annulus::kernels::cudnn
