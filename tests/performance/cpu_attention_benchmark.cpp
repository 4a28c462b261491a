// Google Benchmark programs of the CPU kernels: attention against the FMA peak of a loop in
// registers. OMP_NUM_THREADS=1 taskset -c 0 ./performance --benchmark_filter=cpu
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/cpu/peak.hpp"

namespace {

using namespace annulus;

std::vector<float> normal_values(std::int64_t count) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// B=1 H=8 in f32, with everything that both directions need.
struct Tensors {
  Shape shape;
  std::vector<float> q, k, v, grad_o;
  std::vector<float> o, grad_q, grad_k, grad_v, log_sum_exp, delta;
  MaskSlices slices;
  AttentionProblem problem;

  Tensors(std::int64_t seq, std::int64_t head_dim, bool causal)
      : shape{1, seq, 8, head_dim},
        q(normal_values(shape.elements())),
        k(q.rbegin(), q.rend()),
        v(k.begin() + 1, k.end()),
        grad_o(q),
        o(q.size()),
        grad_q(q.size()),
        grad_k(q.size()),
        grad_v(q.size()),
        log_sum_exp(static_cast<std::size_t>(8 * seq)),
        delta(static_cast<std::size_t>(8 * seq)) {
    v.push_back(0.0F);
    AttentionMask mask;
    mask.causal = causal;
    slices = make_slices(mask, 1, seq, seq);
    problem.q = ConstTensorView(q.data(), DType::f32, shape);
    problem.k = ConstTensorView(k.data(), DType::f32, shape);
    problem.v = ConstTensorView(v.data(), DType::f32, shape);
    problem.mask = slices.view();
    problem.scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
  }

  TensorView rows(std::vector<float>& data) const { return {data.data(), DType::f32, shape}; }
  TensorView statistic(std::vector<float>& data) const {
    return {data.data(), DType::f32, Shape{1, 8, shape[1]}};
  }
  void forward() {
    attention_forward({problem, {}, ForwardCall::Start::fresh, rows(o), statistic(log_sum_exp), {}},
                      "cpu");
  }
  void backward() {
    attention_backward({problem,
                        ConstTensorView(grad_o.data(), DType::f32, shape),
                        statistic(log_sum_exp),
                        statistic(delta),
                        rows(grad_q),
                        rows(grad_k),
                        rows(grad_v),
                        {},
                        true,
                        {}},
                       "cpu");
  }
  double flops() const { return 4.0 * static_cast<double>(slices.area(0) * 8 * shape[3]); }
};

void report(benchmark::State& state, double flops) {
  state.counters["FLOP/s"] = benchmark::Counter(
      flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}

void cpu_forward(benchmark::State& state) {
  Tensors tensors(state.range(0), state.range(1), state.range(2) != 0);
  for (auto _ : state) tensors.forward();
  report(state, tensors.flops());
}

void cpu_backward(benchmark::State& state) {
  Tensors tensors(state.range(0), state.range(1), state.range(2) != 0);
  tensors.forward();
  for (auto _ : state) tensors.backward();
  report(state, 2.5 * tensors.flops());
}

void cpu_multiply_add_peak(benchmark::State& state) {
  double operations = 0.0;
  for (auto _ : state) operations = kernels::cpu::multiply_add_rounds(1'000'000);
  report(state, operations);
}

BENCHMARK(cpu_multiply_add_peak)->Unit(benchmark::kMillisecond);
BENCHMARK(cpu_forward)
    ->ArgNames({"seq", "head_dim", "causal"})
    ->ArgsProduct({{1024, 4096}, {64, 128}, {0, 1}})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(cpu_backward)
    ->ArgNames({"seq", "head_dim", "causal"})
    ->ArgsProduct({{1024, 4096}, {64, 128}, {0, 1}})
    ->Unit(benchmark::kMillisecond);

}  // namespace
