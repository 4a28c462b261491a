#include "launch/bench_cpu.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <random>

#include "kernels/attention.hpp"
#include "kernels/buffer.hpp"
#include "kernels/cpu/peak.hpp"
#include "kernels/error.hpp"

namespace annulus::launch {
namespace {

using kernels::cpu::bf16_dot_rounds;
using kernels::cpu::multiply_add_rounds;
using kernels::cpu::tile_product_rounds;

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Host memory of a shape, normal values or zeros.
class HostTensor {
 public:
  HostTensor(DType dtype, const Shape& shape, bool random)
      : buffer_(Device::cpu, shape.elements() * size_bytes(dtype)),
        view_(buffer_.data(), dtype, shape) {
    fill_bytes(buffer_.data(), Device::cpu, 0, buffer_.bytes());
    if (!random) return;
    static std::mt19937 engine(2024);
    std::normal_distribution<float> normal;
    std::vector<float> values(1U << 16U);
    for (float& value : values) value = normal(engine);
    const auto block = static_cast<std::int64_t>(values.size());
    for (std::int64_t begin = 0; begin < shape.elements(); begin += block) {
      const Shape piece{std::min(block, shape.elements() - begin)};
      auto* data = static_cast<std::byte*>(buffer_.data()) + begin * size_bytes(dtype);
      copy(ConstTensorView(values.data(), DType::f32, piece), TensorView(data, dtype, piece));
    }
  }
  const TensorView& view() const { return view_; }

 private:
  Buffer buffer_;
  TensorView view_;
};

// sgemm of OpenBLAS, found when the program runs; annulus does not link it.
class Sgemm {
 public:
  Sgemm()
      : a_(DType::f32, Shape{kSize, kSize}, true),
        b_(DType::f32, Shape{kSize, kSize}, true),
        c_(DType::f32, Shape{kSize, kSize}, false) {
    void* library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return;
    multiply_ = reinterpret_cast<Multiply>(dlsym(library, "cblas_sgemm"));
    const auto set_threads =
        reinterpret_cast<void (*)(int)>(dlsym(library, "openblas_set_num_threads"));
    if (set_threads != nullptr) set_threads(kernels::cpu::threads());
  }

  /// Operations a second; 0 without OpenBLAS.
  double rate() const {
    if (multiply_ == nullptr) return 0.0;
    constexpr int kRowMajor = 101;
    constexpr int kNoTranspose = 111;
    const double seconds = seconds_of([&] {
      multiply_(kRowMajor, kNoTranspose, kNoTranspose, kSize, kSize, kSize, 1.0F,
                static_cast<const float*>(a_.view().data), kSize,
                static_cast<const float*>(b_.view().data), kSize, 0.0F,
                static_cast<float*>(c_.view().data), kSize);
    });
    return 2.0 * std::pow(static_cast<double>(kSize), 3.0) / seconds;
  }

 private:
  static constexpr int kSize = 1536;
  using Multiply = void (*)(int, int, int, int, int, int, float, const float*, int, const float*,
                            int, float, float*, int);
  Multiply multiply_ = nullptr;
  HostTensor a_;
  HostTensor b_;
  HostTensor c_;
};

double rate_of_loop(const std::function<double(std::int64_t)>& loop) {
  constexpr std::int64_t kRounds = 1'000'000;
  double operations = 0.0;
  const double seconds = seconds_of([&] { operations = loop(kRounds); });
  return operations / seconds;
}

// All tensors of one attention and the calls that are timed.
struct AttentionCase {
  Shape rows, keys;
  HostTensor q, k, v, o, log_sum_exp;
  MaskSlices slices;
  AttentionProblem problem;

  AttentionCase(DType dtype, const Shape& rows_, const Shape& keys_, const AttentionMask& mask)
      : rows(rows_),
        keys(keys_),
        q(dtype, rows, true),
        k(dtype, keys, true),
        v(dtype, keys, true),
        o(dtype, rows, false),
        log_sum_exp(DType::f32, Shape{rows[0], rows[2], rows[1]}, false),
        slices(make_slices(mask, rows[0], rows[1], keys[1])) {
    problem.q = q.view();
    problem.k = k.view();
    problem.v = v.view();
    problem.mask = slices.view();
    problem.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(rows[3])));
  }

  void forward() const {
    attention_forward({problem, {}, ForwardCall::Start::fresh, o.view(), log_sum_exp.view(), {}},
                      "cpu");
  }
  double flops() const {
    double pairs = 0.0;
    for (std::int64_t b = 0; b < rows[0]; ++b) pairs += static_cast<double>(slices.area(b));
    return 4.0 * pairs * static_cast<double>(rows[2] * rows[3]);
  }
};

std::function<void()> backward_of(const AttentionCase& attention) {
  const Shape& rows = attention.rows;
  struct Gradients {
    HostTensor grad_o, delta, grad_q, grad_k, grad_v;
  };
  const auto tensors = std::make_shared<Gradients>(
      Gradients{HostTensor(attention.q.view().dtype, rows, true),
                HostTensor(DType::f32, Shape{rows[0], rows[2], rows[1]}, false),
                HostTensor(DType::f32, rows, false), HostTensor(DType::f32, attention.keys, false),
                HostTensor(DType::f32, attention.keys, false)});
  attention.forward();
  attention_delta(attention.o.view(), tensors->grad_o.view(), tensors->delta.view());
  return [&attention, tensors] {
    attention_backward({attention.problem,
                        tensors->grad_o.view(),
                        attention.log_sum_exp.view(),
                        tensors->delta.view(),
                        tensors->grad_q.view(),
                        tensors->grad_k.view(),
                        tensors->grad_v.view(),
                        {},
                        true,
                        {}},
                       "cpu");
  };
}

struct Measured {
  double seconds = 0.0;
  double ceiling = 0.0;
  double peer = 0.0;
};

// Work, ceiling and peer in turn.
Measured measure(int repeats, const std::function<void()>& work,
                 const std::function<double()>& ceiling, const std::function<double()>& peer) {
  work();
  std::vector<double> seconds;
  std::vector<double> ceilings;
  std::vector<double> peers;
  for (int i = 0; i < repeats; ++i) {
    ceilings.push_back(ceiling());
    seconds.push_back(seconds_of(work));
    peers.push_back(peer());
  }
  return {median(seconds), median(ceilings), median(peers)};
}

// The loop in registers that is the ceiling of a dtype, and its name.
struct Ceiling {
  std::string name;
  double (*rounds)(std::int64_t) = multiply_add_rounds;
};

Ceiling ceiling_of(DType dtype) {
  const std::string vectors = kernels::cpu::vector_target();
  if (dtype != DType::bf16) return {vectors};
  if (tile_product_rounds(1) > 0.0) return {vectors + " AMX", tile_product_rounds};
  if (bf16_dot_rounds(1) > 0.0) return {vectors + " bf16", bf16_dot_rounds};
  return {vectors};
}

BenchRow row_of(const AttentionCase& attention, const std::string& direction,
                const std::string& mask) {
  BenchRow row;
  row.name =
      fmt::format("cpu {} x{}", ceiling_of(attention.q.view().dtype).name, kernels::cpu::threads());
  row.direction = direction;
  row.dtype = name(attention.q.view().dtype);
  row.mask = mask;
  row.batch = attention.rows[0];
  row.heads = attention.rows[2];
  row.kv_heads = attention.keys[2];
  row.seq_q = attention.rows[1];
  row.seq_kv = attention.keys[1];
  row.head_dim = attention.rows[3];
  return row;
}

BenchRow bench_attention(const CpuBenchOptions& options, const AttentionCase& attention,
                         const std::string& direction, const std::string& mask,
                         const Sgemm& sgemm) {
  const bool backward = direction == "backward";
  const Ceiling ceiling = ceiling_of(attention.q.view().dtype);
  const std::function<void()> work =
      backward ? backward_of(attention) : [&attention] { attention.forward(); };
  const Measured measured = measure(
      options.repeats, work, [&] { return rate_of_loop(ceiling.rounds); },
      [&] { return ceiling.rounds == multiply_add_rounds ? sgemm.rate() : 0.0; });
  BenchRow row = row_of(attention, direction, mask);
  row.seconds = measured.seconds;
  row.rate = attention.flops() * (backward ? 2.5 : 1.0) / measured.seconds * 1e-9;
  row.unit = "GFLOP/s";
  row.ceiling = measured.ceiling * 1e-9;
  row.peer = measured.peer * 1e-9;
  return row;
}

// One query of 32 heads against 64k keys of 8: the bytes of K and V a second.
BenchRow bench_decode(const CpuBenchOptions& options, DType dtype) {
  const AttentionCase attention(dtype, Shape{1, 1, 32, 128}, Shape{1, 65536, 8, 128}, {});
  const HostTensor memory(DType::f32, Shape{std::int64_t{1} << 26}, true);
  const auto read = [&] {
    const auto* data = static_cast<const float*>(memory.view().data);
    volatile float sum = 0.0F;
    const std::int64_t floats = memory.view().shape.elements();
    const double seconds = seconds_of([&] { sum = kernels::cpu::read_floats(data, floats); });
    return 4.0 * static_cast<double>(floats) / seconds;
  };
  const Measured measured = measure(
      options.repeats, [&] { attention.forward(); }, read, [] { return 0.0; });
  BenchRow row = row_of(attention, "decode", "full");
  row.seconds = measured.seconds;
  row.rate = 2.0 * static_cast<double>(attention.keys.elements() * size_bytes(dtype)) /
             measured.seconds * 1e-9;
  row.unit = "GB/s";
  row.ceiling = measured.ceiling * 1e-9;
  return row;
}

AttentionMask mask_of(const std::string& name) {
  AttentionMask mask;
  mask.causal = name == "causal";
  if (name == "window") {
    mask.window_left = 511;
    mask.window_right = 0;
  }
  return mask;
}

}  // namespace

std::vector<BenchRow> bench_cpu_kernels(const CpuBenchOptions& options) {
  const Sgemm sgemm;
  std::vector<BenchRow> rows;
  for (const std::string& direction : options.directions) {
    for (const std::string& dtype_name : options.dtypes) {
      const std::optional<DType> dtype = parse_dtype(dtype_name);
      require(dtype.has_value(), ExitCode::usage, "bench kernels: no dtype {}", dtype_name);
      if (direction == "decode") {
        rows.push_back(bench_decode(options, *dtype));
        continue;
      }
      for (const std::int64_t head_dim : options.head_dims) {
        for (const std::string& mask : options.masks) {
          for (const std::int64_t seq : options.seqs) {
            const std::int64_t tokens = mask == "window" ? 16384 : seq;
            if (mask == "window" && seq != options.seqs.front()) continue;
            const AttentionCase attention(*dtype, Shape{1, tokens, options.heads, head_dim},
                                          Shape{1, tokens, options.heads / options.group, head_dim},
                                          mask_of(mask));
            rows.push_back(bench_attention(options, attention, direction, mask, sgemm));
          }
        }
      }
    }
  }
  return rows;
}

}  // namespace annulus::launch
