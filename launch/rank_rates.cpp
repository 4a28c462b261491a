#include "launch/rank_rates.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "launch/rank_attention.hpp"
#include "runtime/context.hpp"
#include "runtime/tensor.hpp"

namespace annulus::launch {
namespace {

Tensor ones(std::int64_t bytes, Device device) {
  Tensor tensor(DType::u8, {bytes}, device);
  fill_bytes(tensor.view().data, device, 1, bytes);
  return tensor;
}

double copy_bandwidth(Communicator& world, const Place& place) {
  constexpr std::int64_t kBytes = 64 << 20;
  Tensor from = ones(kBytes, place.device);
  Tensor to = ones(kBytes, place.device);
  const double seconds = timed(world, 3, [&] {
    copy(from.view(), to.view());
    place.finish();
  });
  return static_cast<double>(kBytes) / seconds;
}

// Every rank receives from the one before it, at the same time.
double exchange_bandwidth(Communicator& world, const Place& place) {
  if (world.size() == 1) return 1e10;
  constexpr std::int64_t kBytes = 16 << 20;
  Tensor from = ones(kBytes, place.device);
  Tensor to = ones(kBytes, place.device);
  const int next = (world.rank() + 1) % world.size();
  const int before = (world.rank() + world.size() - 1) % world.size();
  const double seconds = timed(world, 3, [&] {
    const Send send{next, from.view().data, kBytes};
    const Receive receive{before, to.view().data, kBytes};
    place.ranks.exchange({&send, 1}, {&receive, 1})->wait();
    place.finish();
  });
  return static_cast<double>(kBytes) / seconds;
}

// Seconds of all ranks' kernels at the same time, each over its own rows.
class KernelTimes {
 public:
  KernelTimes(Communicator& world, const Place& place, int repeats)
      : world_(world), place_(place), repeats_(repeats) {}

  double forward(RankAttention& tensors, const Band& band) const {
    ForwardCall call = tensors.forward();
    const std::vector<Slice> slices = all_within(call.problem, band);
    call.problem.mask = {slices, {}};
    return timed(world_, repeats_, [&] {
      attention_forward(call);
      place_.finish();
    });
  }
  double backward(RankAttention& tensors, const Band& band) const {
    BackwardCall call = tensors.backward();
    const std::vector<Slice> slices = all_within(call.problem, band);
    call.problem.mask = {slices, {}};
    return timed(world_, repeats_, [&] {
      attention_backward(call);
      place_.finish();
    });
  }

 private:
  static std::vector<Slice> all_within(const AttentionProblem& problem, const Band& band) {
    return {{{0, problem.seq_q()}, {0, problem.seq_kv()}, band}};
  }

  Communicator& world_;
  const Place& place_;
  int repeats_;
};

}  // namespace

double largest(Communicator& ranks, double mine) {
  std::vector<double> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  return *std::max_element(all.begin(), all.end());
}

double timed(Communicator& ranks, int repeats, const std::function<void()>& step) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    ranks.barrier();
    const auto begin = std::chrono::steady_clock::now();
    step();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best = std::min(best, largest(ranks, took.count()));
  }
  return best;
}

Rates measure_rates(Context& context, const Place& place, const PlanRequest& request,
                    const AttentionSizes& sizes, DType dtype, int repeats) {
  constexpr std::int64_t kUnevenRows = 8192;  // more would only add pairs
  Communicator& world = context.world();
  const std::int64_t rows = request.q_layout.max_rows();
  const std::int64_t fewer = std::min(rows, kUnevenRows);
  const std::int64_t heads = request.batch * request.q_heads;
  const auto square = [&](std::int64_t side) {
    return RankAttention(request, sizes, dtype, context.rank(), place.device, side, side);
  };
  const KernelTimes times(world, place, repeats);
  const Band whole;
  const Band half{-kUnbounded, 0};
  const auto uneven_seconds = [&](double whole_seconds, double half_seconds) {
    return std::max(half_seconds - 0.5 * whole_seconds, 0.0) / static_cast<double>(fewer * heads);
  };
  Rates rates;
  {
    RankAttention all = square(rows);
    const double forward = times.forward(all, whole);
    all.compute_delta();
    const double backward = times.backward(all, whole);
    rates.forward_flops = forward_flops(rows * rows * heads, sizes) / forward;
    rates.backward_flops = backward_flops(rows * rows * heads, sizes) / backward;
  }
  {
    RankAttention few = square(fewer);
    rates.forward_uneven_seconds =
        uneven_seconds(times.forward(few, whole), times.forward(few, half));
    few.compute_delta();
    rates.backward_uneven_seconds =
        uneven_seconds(times.backward(few, whole), times.backward(few, half));
  }
  RankAttention one = square(1);
  rates.call_seconds = times.forward(one, whole);
  rates.copy_bandwidth = copy_bandwidth(world, place);
  rates.node_bandwidth = rates.network_bandwidth = exchange_bandwidth(world, place);
  rates.node_ranks = context.ranks_on_node();
  rates.hides_node_transfers = place.device == Device::cuda;
  rates.reads_in_place = place.device == Device::cpu;
  rates.one_launch = place.ranks.carrier() == Communicator::Carrier::copy_engine;
  return rates;
}

}  // namespace annulus::launch
