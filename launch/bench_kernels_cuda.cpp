#include <cmath>
#include <memory>
#include <random>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"
#include "kernels/cuda_support.hpp"
#include "kernels/cudnn_support.hpp"
#include "kernels/error.hpp"
#include "launch/bench_cuda.hpp"
#include "launch/cublas_cuda.hpp"
#include "launch/device_timer.hpp"

namespace annulus::launch {
namespace {

constexpr std::int64_t kGemm = 8192;

/// Normal values; a block is drawn on the host and repeated, for drawing gigabytes takes longer
/// than all measurements. Zeros would run faster than real data.
Buffer random_buffer(std::int64_t elements, DType dtype) {
  static std::mt19937 random(2024);
  const std::int64_t block = std::min<std::int64_t>(elements, std::int64_t{1} << 20);
  std::vector<float> values(static_cast<std::size_t>(block));
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random);
  Buffer buffer(Device::cuda, elements * size_bytes(dtype));
  for (std::int64_t begin = 0; begin < elements; begin += block) {
    const Shape shape{std::min(block, elements - begin)};
    auto* data = static_cast<std::byte*>(buffer.data()) + begin * size_bytes(dtype);
    copy(ConstTensorView(values.data(), DType::f32, shape),
         TensorView(data, dtype, shape, Device::cuda));
  }
  return buffer;
}

void check(cublasStatus_t status, const char* call) {
  require(status == CUBLAS_STATUS_SUCCESS, ExitCode::internal, "cublas: {} failed: {}", call,
          Cublas::library().status_text(status));
}

/// The ceiling of the tensor cores: a square product in bf16 with fp32 sums.
class Gemm {
 public:
  Gemm()
      : a_(random_buffer(kGemm * kGemm, DType::bf16)),
        b_(random_buffer(kGemm * kGemm, DType::bf16)),
        c_(Device::cuda, kGemm * kGemm * 2) {
    check(cublas_.create(&handle_), "cublasCreate");
  }
  ~Gemm() { cublas_.destroy(handle_); }
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  void run() const {
    const float one = 1.0F;
    const float zero = 0.0F;
    const int n = static_cast<int>(kGemm);
    check(cublas_.gemm(handle_, CUBLAS_OP_N, CUBLAS_OP_N, n, n, n, &one, a_.data(), CUDA_R_16BF, n,
                       b_.data(), CUDA_R_16BF, n, &zero, c_.data(), CUDA_R_16BF, n,
                       CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
          "cublasGemmEx");
  }
  static double flops() { return 2.0 * static_cast<double>(kGemm * kGemm * kGemm); }

 private:
  const Cublas& cublas_ = Cublas::library();
  cublasHandle_t handle_ = nullptr;
  Buffer a_;
  Buffer b_;
  Buffer c_;
};

struct MaskCase {
  std::string name;
  AttentionMask mask;
};

std::vector<MaskCase> mask_cases() {
  std::vector<MaskCase> cases(2);
  cases[0].name = "full";
  cases[1].name = "causal";
  cases[1].mask.causal = true;
  return cases;
}

/// One attention on the device and its output.
class Attention {
 public:
  Attention(const CudaBenchOptions& options, std::int64_t seq, std::int64_t head_dim,
            const AttentionMask& mask)
      : batch_(options.tokens / seq),
        seq_(seq),
        heads_(options.width / head_dim),
        kv_heads_(heads_ / options.group),
        head_dim_(head_dim),
        slices_(make_slices(mask, batch_, seq, seq)) {
    const DType dtype = *parse_dtype(options.dtype);
    const Shape q_shape{batch_, seq, heads_, head_dim};
    const Shape kv_shape{batch_, seq, kv_heads_, head_dim};
    q_ = random_buffer(q_shape.elements(), dtype);
    k_ = random_buffer(kv_shape.elements(), dtype);
    v_ = random_buffer(kv_shape.elements(), dtype);
    o_ = Buffer(Device::cuda, q_shape.elements() * size_bytes(dtype));
    lse_ = Buffer(Device::cuda, batch_ * heads_ * seq * 4);
    call_.problem.q = {q_.data(), dtype, q_shape, Device::cuda};
    call_.problem.k = {k_.data(), dtype, kv_shape, Device::cuda};
    call_.problem.v = {v_.data(), dtype, kv_shape, Device::cuda};
    call_.problem.mask = slices_.view();
    call_.problem.scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
    call_.o = {o_.data(), dtype, q_shape, Device::cuda};
    call_.log_sum_exp = {lse_.data(), DType::f32, Shape{batch_, heads_, seq}, Device::cuda};
  }

  void run(std::string_view backend) const { attention_forward(call_, backend); }
  bool served_by(const AttentionBackend& backend) const {
    return backend.unsupported(call_.problem, Direction::forward).empty();
  }
  double flops() const {
    return 4.0 * static_cast<double>(slices_.area(0) * batch_ * heads_ * head_dim_);
  }
  BenchRow row() const {
    BenchRow row;
    row.name = "kernels";
    row.direction = "forward";
    row.batch = batch_;
    row.heads = heads_;
    row.kv_heads = kv_heads_;
    row.seq_q = seq_;
    row.seq_kv = seq_;
    row.head_dim = head_dim_;
    return row;
  }

 private:
  std::int64_t batch_;
  std::int64_t seq_;
  std::int64_t heads_;
  std::int64_t kv_heads_;
  std::int64_t head_dim_;
  MaskSlices slices_;
  Buffer q_;
  Buffer k_;
  Buffer v_;
  Buffer o_;
  Buffer lse_;
  ForwardCall call_;
};

BenchRow measure(const Attention& attention, const Gemm& gemm, int repeats) {
  std::vector<std::function<void()>> functions{[&] { attention.run({}); }, [&] { gemm.run(); }};
  const std::span<const AttentionBackend> vendor = kernels::cudnn::backends();
  if (!vendor.empty() && attention.served_by(vendor.front())) {
    functions.push_back([&] { attention.run("cudnn"); });
  }
  const std::vector<double> ms = alternating_medians_ms(functions, repeats);
  const auto tera = [](double flops, double milliseconds) { return flops / milliseconds * 1e-9; };
  BenchRow row = attention.row();
  row.seconds = ms[0] * 1e-3;
  row.rate = tera(attention.flops(), ms[0]);
  row.unit = "TFLOP/s";
  row.ceiling = tera(Gemm::flops(), ms[1]);
  if (ms.size() > 2) row.peer = tera(attention.flops(), ms[2]);
  return row;
}

}  // namespace

std::vector<BenchRow> bench_cuda_kernels(const CudaBenchOptions& options) {
  require(kernels::cuda::device_count() > 0, ExitCode::usage, "bench kernels: no CUDA device here");
  const Gemm gemm;
  std::vector<BenchRow> rows;
  for (const std::int64_t head_dim : options.head_dims) {
    for (const std::int64_t seq : options.seqs) {
      for (const MaskCase& mask : mask_cases()) {
        const Attention attention(options, seq, head_dim, mask.mask);
        rows.push_back(measure(attention, gemm, options.repeats));
        rows.back().dtype = options.dtype;
        rows.back().mask = mask.name;
      }
    }
  }
  return rows;
}

}  // namespace annulus::launch
