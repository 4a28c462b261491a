#include <cmath>
#include <limits>
#include <vector>

#include "kernels/decode_support.hpp"
#include "kernels/element.hpp"
#include "kernels/scalar.hpp"

namespace annulus::kernels::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::int64_t integer(const ConstTensorView& view, std::int64_t i) {
  return static_cast<const std::int32_t*>(view.data)[i];
}

double element(const ConstTensorView& view, std::int64_t at) {
  return load_element(view.data, view.dtype, at);
}

struct Row {
  std::int64_t sequence = 0;
  std::int64_t token = 0;
  std::int64_t head = 0;
  Span keys;  // positions
};

// Softmax of one row so far.
struct RowState {
  std::vector<double> accumulator;
  double max = -kInfinity;
  double sum = 0.0;

  /// Takes a logit in, and gives the weight of what belongs to it.
  double add(double logit) {
    const double larger = max_or_nan(logit, max);
    if (larger == -kInfinity) return 0.0;
    const double kept = max == -kInfinity ? 0.0 : std::exp(max - larger);
    const double weight = std::exp(logit - larger);
    for (double& value : accumulator) value *= kept;
    sum = sum * kept + weight;
    max = larger;
    return weight;
  }
  void add_values(double weight, const ConstTensorView& v, std::int64_t at) {
    for (std::size_t d = 0; d < accumulator.size(); ++d) {
      accumulator[d] += weight * element(v, at + static_cast<std::int64_t>(d) * v.strides[3]);
    }
  }
};

double logit(const DecodeProblem& problem, const Row& row, std::int64_t k_at) {
  const ConstTensorView& q = problem.q;
  const std::int64_t q_at = row.token * q.strides[0] + row.head * q.strides[1];
  double sum = 0.0;
  for (std::int64_t d = 0; d < problem.head_dim(); ++d) {
    sum +=
        element(q, q_at + d * q.strides[2]) * element(problem.k, k_at + d * problem.k.strides[3]);
  }
  sum *= static_cast<double>(problem.scale);
  const auto cap = static_cast<double>(problem.soft_cap);
  return cap > 0.0 ? cap * std::tanh(sum / cap) : sum;
}

RowState attend(const DecodeProblem& problem, const Row& row) {
  RowState state;
  state.accumulator.assign(static_cast<std::size_t>(problem.value_dim()), 0.0);
  const std::int64_t kv_head = row.head / problem.group_size();
  const auto place = [&](const ConstTensorView& view, std::int64_t token) {
    const std::int64_t page =
        integer(problem.page_table, row.sequence * problem.max_pages() + token / view.shape[1]);
    return page * view.strides[0] + token % view.shape[1] * view.strides[1] +
           kv_head * view.strides[2];
  };
  const std::int64_t end = problem.deal.tokens(row.keys.end);
  for (std::int64_t token = problem.deal.tokens(row.keys.begin); token < end; ++token) {
    const double weight = state.add(logit(problem, row, place(problem.k, token)));
    state.add_values(weight, problem.v, place(problem.v, token));
  }
  if (problem.sinks) {
    state.add(element(problem.sinks, row.head * problem.sinks.strides[0]));
  }
  return state;
}

void store(const TensorView& view, std::int64_t at, double value) {
  store_element(view.data, view.dtype, at, value);
}

void write(const DecodeCall& call, const Row& row, const RowState& state) {
  if (call.o) {
    const TensorView& o = call.o;
    const bool empty = state.max == -kInfinity;
    for (std::int64_t d = 0; d < o.shape[2]; ++d) {
      store(o, row.token * o.strides[0] + row.head * o.strides[1] + d * o.strides[2],
            empty ? 0.0 : state.accumulator[static_cast<std::size_t>(d)] / state.sum);
    }
    if (!call.log_sum_exp) return;
    const TensorView& lse = call.log_sum_exp;
    store(lse, row.head * lse.strides[0] + row.token * lse.strides[1],
          empty ? -kInfinity : state.max + std::log(state.sum));
    return;
  }
  const TensorView& accumulator = call.state.accumulator;
  for (std::int64_t d = 0; d < accumulator.shape[3]; ++d) {
    store(accumulator,
          row.token * accumulator.strides[1] + row.head * accumulator.strides[2] +
              d * accumulator.strides[3],
          state.accumulator[static_cast<std::size_t>(d)]);
  }
  const auto statistic = [&](const TensorView& view, double value) {
    store(view, row.head * view.strides[1] + row.token * view.strides[2], value);
  };
  statistic(call.state.row_max, state.max);
  statistic(call.state.row_sum, state.sum);
}

}  // namespace

std::string decode_unsupported(const DecodeProblem& /*problem*/) { return {}; }

void decode_forward(const DecodeCall& call) {
  const DecodeProblem& problem = call.problem;
  for (std::int64_t s = 0; s < problem.sequences(); ++s) {
    const std::int64_t begin = integer(problem.query_begin, s);
    const std::int64_t end = integer(problem.query_begin, s + 1);
    const std::int64_t length = integer(problem.lengths, s);
    const std::int64_t start = problem.starts ? integer(problem.starts, s) : 0;
    for (std::int64_t token = begin; token < end; ++token) {
      const Span keys = visible_keys(problem, length - end + token, start, length);
      for (std::int64_t head = 0; head < problem.q_heads(); ++head) {
        const Row row{s, token, head, keys};
        write(call, row, attend(problem, row));
      }
    }
  }
}

}  // namespace annulus::kernels::reference
