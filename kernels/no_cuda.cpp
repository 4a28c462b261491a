#include "kernels/cuda_support.hpp"
#include "kernels/decode_support.hpp"
#include "kernels/error.hpp"

namespace annulus::kernels::cuda {
namespace {

[[noreturn]] void absent() {
  throw Error(ExitCode::usage,
              "cuda: this build of annulus has no CUDA; configure with -DANNULUS_CUDA=ON");
}

}  // namespace

int device_count() { return 0; }
DeviceIdentity device_identity() { absent(); }
void use_device(int /*device*/) { absent(); }
void* allocate(std::int64_t /*bytes*/, Stream /*stream*/) { absent(); }
void release(void* /*data*/, Stream /*stream*/) noexcept {}
void fill_bytes(void* /*data*/, int /*value*/, std::int64_t /*bytes*/, Stream /*stream*/) {
  absent();
}
void copy(ConstTensorView /*from*/, TensorView /*to*/, Stream /*stream*/) { absent(); }
void accumulate(ConstTensorView /*from*/, TensorView /*into*/, Stream /*stream*/) { absent(); }
void synchronize(Stream /*stream*/) { absent(); }
void merge(const AttentionState& /*from*/, const AttentionState& /*into*/, Stream /*stream*/) {
  absent();
}
void finish(const AttentionState& /*state*/, TensorView /*o*/, TensorView /*log_sum_exp*/,
            Stream /*stream*/) {
  absent();
}
void delta(ConstTensorView /*o*/, ConstTensorView /*grad_o*/, TensorView /*delta*/,
           Stream /*stream*/) {
  absent();
}
void sink_gradient(ConstTensorView /*sinks*/, ConstTensorView /*log_sum_exp*/,
                   ConstTensorView /*delta*/, TensorView /*grad_sinks*/, Stream /*stream*/) {
  absent();
}
bool takes_segments(const AttentionProblem& /*problem*/, std::string_view /*backend*/) {
  return false;
}
void forward_segments(const ForwardCall& /*call*/, std::span<const KvSegment> /*segments*/) {
  absent();
}
ReadyWords next_ready_words() { absent(); }
void release_words(const ReadyWords& /*ready*/) noexcept {}
Stream side_stream() { absent(); }
void order(Stream /*earlier*/, Stream /*later*/) { absent(); }
void write_word(std::uint32_t* /*word*/, std::uint32_t /*value*/, Stream /*stream*/) { absent(); }
struct StreamMark::Point {};
StreamMark::StreamMark(Stream /*stream*/) { absent(); }
std::int64_t StreamMark::wait_ns() const { absent(); }
std::span<const AttentionBackend> backends() { return {}; }
std::span<const DecodeBackend> decode_backends() { return {}; }
void append_to_cache(const CacheAppend& /*call*/) { absent(); }

}  // namespace annulus::kernels::cuda
