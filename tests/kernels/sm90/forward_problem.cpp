#include "forward_problem.hpp"

#include "kernels/sm90/attention_sm90.hpp"

namespace annulus {
namespace {

struct Reference {
  std::vector<double> o, lse;
};

Reference reference(const AttentionProblem& problem, const Shape& o_shape, const Shape& lse_shape) {
  Reference result{std::vector<double>(static_cast<std::size_t>(o_shape.elements())),
                   std::vector<double>(static_cast<std::size_t>(lse_shape.elements()))};
  ForwardCall call;
  call.problem = problem;
  call.o = {result.o.data(), DType::f64, o_shape};
  call.log_sum_exp = {result.lse.data(), DType::f64, lse_shape};
  attention_forward(call, "reference");
  return result;
}

Span part_of(std::int64_t length, int i, int parts) {
  return {length * i / parts, length * (i + 1) / parts};
}

void run_segments(const ForwardProblem& problem, const ForwardCase& c) {
  std::vector<std::vector<Slice>> slices;
  std::vector<kernels::sm90::ForwardSegment> segments;
  for (int i = 0; i < c.segments; ++i) {
    slices.push_back(problem.slices_of(part_of(c.seq_kv, i, c.segments)));
  }
  for (int i = 0; i < c.segments; ++i) {
    const Span keys = part_of(c.seq_kv, i, c.segments);
    segments.push_back({problem.k.view.slice(1, keys),
                        problem.v.view.slice(1, keys),
                        {slices[static_cast<std::size_t>(i)], {}}});
  }
  kernels::sm90::forward_segments(problem.on_device(), segments);
}

void run_ring(const ForwardProblem& problem, const ForwardCase& c) {
  const DeviceFloats accumulator(problem.o_shape), max(problem.lse_shape), sum(problem.lse_shape);
  for (int i = 0; i < c.segments; ++i) {
    const Span keys = part_of(c.seq_kv, i, c.segments);
    const std::vector<Slice> slices = problem.slices_of(keys);
    ForwardCall call = problem.on_device();
    call.problem.k = problem.k.view.slice(1, keys);
    call.problem.v = problem.v.view.slice(1, keys);
    call.problem.mask = {slices, {}};
    call.state = {accumulator.view(), max.view(), sum.view()};
    call.start = i == 0 ? ForwardCall::Start::fresh : ForwardCall::Start::resume;
    call.chained = c.chained;
    if (i + 1 < c.segments) {
      call.o = {};
      call.log_sum_exp = {};
    }
    attention_forward(call, "sm90");
  }
}

}  // namespace

ForwardProblem::ForwardProblem(const ForwardCase& c, std::vector<Slice> slices,
                               std::mt19937& random)
    : case_(c),
      q(Shape{c.batch, c.seq_q, c.q_heads, c.head_dim}, c.dtype, random),
      k(Shape{c.batch, c.seq_kv, c.kv_heads, c.head_dim}, c.dtype, random),
      v(Shape{c.batch, c.seq_kv, c.kv_heads, c.value_dim}, c.dtype, random),
      o_shape{c.batch, c.seq_q, c.q_heads, c.value_dim},
      lse_shape{c.batch, c.q_heads, c.seq_q},
      o(o_shape, c.wide_output ? DType::f32 : c.dtype),
      lse(lse_shape),
      slices_(std::move(slices)),
      sinks_(static_cast<std::size_t>(c.q_heads)),
      sinks_device_(Shape{c.q_heads}) {
  std::normal_distribution<float> normal;
  for (float& sink : sinks_) sink = normal(random);
  copy(ConstTensorView(sinks_.data(), DType::f32, Shape{c.q_heads}), sinks_device_.view());
}

AttentionProblem ForwardProblem::on_host() const {
  AttentionProblem problem = options();
  problem.q = q.host_view();
  problem.k = k.host_view();
  problem.v = v.host_view();
  if (case_.sinks) problem.sinks = {sinks_.data(), DType::f32, Shape{case_.q_heads}};
  return problem;
}

ForwardCall ForwardProblem::on_device() const {
  ForwardCall call;
  call.problem = options();
  call.problem.q = q.view;
  call.problem.k = k.view;
  call.problem.v = v.view;
  if (case_.sinks) call.problem.sinks = sinks_device_.view();
  call.o = o.view();
  call.log_sum_exp = lse.view();
  return call;
}

std::vector<Slice> ForwardProblem::slices_of(Span keys) const {
  std::vector<Slice> part;
  for (const Slice& slice : slices_) {
    const Span k_range = intersect(slice.k, keys);
    if (k_range.empty()) continue;
    part.push_back({slice.q,
                    {k_range.begin - keys.begin, k_range.end - keys.begin},
                    slice.band.shifted(0, keys.begin)});
  }
  return part;
}

void ForwardProblem::expect_close() const {
  const Reference expected = reference(on_host(), o_shape, lse_shape);
  const std::vector<float> actual = o.fetched();
  const std::vector<float> actual_lse = lse.fetched();
  // P is rounded to half a unit in the last place, at |O| <= max |V|; as much for the rest.
  const double unit = case_.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  const double tolerance = 2.0 * unit * v.largest() + 1e-6;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(actual[i]), expected.o[i], tolerance) << "O at " << i;
  }
  for (std::size_t i = 0; i < actual_lse.size(); ++i) {
    if (std::isinf(expected.lse[i])) {
      ASSERT_EQ(actual_lse[i], -INFINITY) << "LSE at " << i;
    } else {
      ASSERT_NEAR(static_cast<double>(actual_lse[i]), expected.lse[i],
                  1e-3 + 4e-6 * std::abs(expected.lse[i]))
          << "LSE at " << i;
    }
  }
}

AttentionProblem ForwardProblem::options() const {
  AttentionProblem problem;
  problem.mask = {slices_, {}};
  problem.scale = case_.sharpness / std::sqrt(static_cast<float>(case_.head_dim));
  problem.soft_cap = case_.soft_cap;
  return problem;
}

void run(const ForwardProblem& problem, const ForwardCase& c) {
  if (c.ring) return run_ring(problem, c);
  if (c.segments > 1) return run_segments(problem, c);
  attention_forward(problem.on_device(), "sm90");
}

}  // namespace annulus
