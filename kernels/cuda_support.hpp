#pragma once

#include <cstdint>
#include <span>

#include "kernels/attention.hpp"

/// What the device side provides; no_cuda.cpp stands in for it in a build without CUDA.
namespace annulus::kernels::cuda {

int device_count();
/// Makes `device` current for this thread.
void use_device(int device);
void* allocate(std::int64_t bytes, Stream stream);
void release(void* data, Stream stream) noexcept;
void fill_bytes(void* data, int value, std::int64_t bytes, Stream stream);
void copy(ConstTensorView from, TensorView to, Stream stream);
/// into += from; f32 on the device.
void accumulate(ConstTensorView from, TensorView into, Stream stream);
void synchronize(Stream stream);
void merge(const AttentionState& from, const AttentionState& into, Stream stream);
void finish(const AttentionState& state, TensorView o, TensorView log_sum_exp, Stream stream);
void delta(ConstTensorView o, ConstTensorView grad_o, TensorView delta, Stream stream);
void sink_gradient(ConstTensorView sinks, ConstTensorView log_sum_exp, ConstTensorView delta,
                   TensorView grad_sinks, Stream stream);
/// Backends for device tensors, in order of preference.
std::span<const AttentionBackend> backends();

}  // namespace annulus::kernels::cuda
