#include "kernels/cudnn/graph.hpp"

#include "kernels/buffer.hpp"
#include "kernels/cudnn_support.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cudnn {
namespace {

namespace fe = cudnn_frontend;

void check(cudnnStatus_t status, const char* call) {
  require(status == CUDNN_STATUS_SUCCESS, ExitCode::internal, "cudnn: {} failed: {}", call,
          cudnnGetErrorString(status));
}

struct HandleDeleter {
  void operator()(cudnnHandle_t handle) const { cudnnDestroy(handle); }
};

/// A handle belongs to one thread and one device.
cudnnHandle_t handle_of(int device) {
  thread_local std::map<int, std::unique_ptr<cudnnContext, HandleDeleter>> handles;
  std::unique_ptr<cudnnContext, HandleDeleter>& handle = handles[device];
  if (handle == nullptr) {
    cudnnHandle_t created = nullptr;
    check(cudnnCreate(&created), "cudnnCreate");
    handle.reset(created);
  }
  return handle.get();
}

}  // namespace

TensorLayout rows_layout(const ConstTensorView& view) {
  return {{view.shape[0], view.shape[2], view.shape[1], view.shape[3]},
          {view.strides[0], view.strides[2], view.strides[1], view.strides[3]}};
}

TensorLayout pairs_layout(const ConstTensorView& view) {
  if (!view) return {};
  return {{view.shape[0], view.shape[1], view.shape[2], view.shape[3]},
          {view.strides[0], view.strides[1], view.strides[2], view.strides[3]}};
}

TensorLayout statistics_layout(const ConstTensorView& view) {
  if (!view) return {};
  return {{view.shape[0], view.shape[1], view.shape[2], 1},
          {view.strides[0], view.strides[1], view.strides[2], 1}};
}

fe::DataType_t data_type(DType dtype) {
  if (dtype == DType::f32) return fe::DataType_t::FLOAT;
  return dtype == DType::f16 ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16;
}

fe::graph::Tensor_attributes attributes(const char* name, std::int64_t uid,
                                        const TensorLayout& layout) {
  return fe::graph::Tensor_attributes()
      .set_name(name)
      .set_uid(uid)
      .set_dim({layout.shape.begin(), layout.shape.end()})
      .set_stride({layout.strides.begin(), layout.strides.end()});
}

void set_output(fe::graph::Tensor_attributes& tensor, std::int64_t uid, const TensorLayout& layout,
                DType dtype) {
  tensor.set_output(true)
      .set_uid(uid)
      .set_data_type(data_type(dtype))
      .set_dim({layout.shape.begin(), layout.shape.end()})
      .set_stride({layout.strides.begin(), layout.strides.end()});
}

void Plan::set_types(DType dtype) {
  graph.set_io_data_type(data_type(dtype))
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
}

void Plan::compile(int device) {
  fe::error_t error = graph.build(handle_of(device), {fe::HeurMode_t::A});
  if (error.is_bad()) refusal = error.get_message();
  if (error.is_good()) workspace_bytes = graph.get_workspace_size();
}

void execute(Plan& plan, int device, std::unordered_map<std::int64_t, void*>& memory,
             cudaStream_t stream) {
  require(plan.refusal.empty(), ExitCode::usage, "cudnn: {}", plan.refusal);
  cudnnHandle_t handle = handle_of(device);
  check(cudnnSetStream(handle, stream), "cudnnSetStream");
  const Buffer workspace(Device::cuda, plan.workspace_bytes, {stream});
  fe::error_t error = plan.graph.execute(handle, memory, workspace.data());
  require(error.is_good(), ExitCode::internal, "cudnn: execution failed: {}", error.get_message());
}

const char* version() {
  static const std::string text = [] {
    const std::size_t number = cudnnGetVersion();
    return fmt::format("{}.{}.{}", number / 10000, number / 100 % 100, number % 100);
  }();
  return text.c_str();
}

}  // namespace annulus::kernels::cudnn
