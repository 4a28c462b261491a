#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>

#include "kernels/attention.hpp"

/// What the device side provides; no_cuda.cpp stands in for it in a build without CUDA.
namespace annulus::kernels::cuda {

int device_count();
/// What tells the calling thread's device from all others of the machine.
using DeviceIdentity = std::array<char, 16>;
DeviceIdentity device_identity();
/// Makes `device` current for this thread.
void use_device(int device);
void* allocate(std::int64_t bytes, Stream stream);
void release(void* data, Stream stream) noexcept;
void fill_bytes(void* data, int value, std::int64_t bytes, Stream stream);
void copy(ConstTensorView from, TensorView to, Stream stream);
/// into += from; f32, from any dtype, on the device.
void accumulate(ConstTensorView from, TensorView into, Stream stream);
void synchronize(Stream stream);
void merge(const AttentionState& from, const AttentionState& into, Stream stream);
void finish(const AttentionState& state, TensorView o, TensorView log_sum_exp, Stream stream);
void delta(ConstTensorView o, ConstTensorView grad_o, TensorView delta, Stream stream);
void sink_gradient(ConstTensorView sinks, ConstTensorView log_sum_exp, ConstTensorView delta,
                   TensorView grad_sinks, Stream stream);

/// Keys and values in one place and the slices over them, in the segment's own key indices. Where
/// `ready` is given they are read once *ready has reached ready_value.
struct KvSegment {
  ConstTensorView k;
  ConstTensorView v;
  SliceList mask;
  const std::uint32_t* ready = nullptr;
  std::uint32_t ready_value = 0;
};
/// The most segments of one launch.
inline constexpr std::size_t kMaxSegments = 8;
/// Whether one launch can go over segments of such a problem; `backend` as in attention_forward.
bool takes_segments(const AttentionProblem& problem, std::string_view backend);
/// One launch over all segments; the call's own keys, values and mask are not read.
/// @pre takes_segments() holds for each
void forward_segments(const ForwardCall& call, std::span<const KvSegment> segments);
/// kMaxSegments words of device memory, this thread's own, and a value that none of them has had.
struct ReadyWords {
  std::uint32_t* words;
  std::uint32_t value;
};
ReadyWords next_ready_words();
/// Lets a kernel end that waits for what will not come: all words get their value, behind nothing.
void release_words(const ReadyWords& ready) noexcept;
/// A stream of this thread that runs beside all others.
Stream side_stream();
/// `later` goes on when all that `earlier` holds now is done.
void order(Stream earlier, Stream later);
/// One of the ready words gets `value` when all that `stream` holds now is done; no kernel is
/// needed for it.
void write_word(std::uint32_t* word, std::uint32_t value, Stream stream);

/// A point of a stream, whose time is known once the stream has passed it.
class StreamMark {
 public:
  /// After all that `stream` holds now.
  explicit StreamMark(Stream stream);
  /// Nanoseconds of the host's steady clock, to some microseconds; waits for the point.
  std::int64_t wait_ns() const;

 private:
  struct Point;
  std::shared_ptr<const Point> point_;
};

/// Backends for device tensors, in order of preference.
std::span<const AttentionBackend> backends();

}  // namespace annulus::kernels::cuda
