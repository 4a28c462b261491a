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

  double forward(RankAttention& tensors, std::span<const Slice> slices) const {
    ForwardCall call = tensors.forward();
    call.problem.mask = {slices, {}};
    return timed(world_, repeats_, [&] {
      attention_forward(call);
      place_.finish();
    });
  }
  double backward(RankAttention& tensors, std::span<const Slice> slices) const {
    BackwardCall call = tensors.backward();
    call.problem.mask = {slices, {}};
    return timed(world_, repeats_, [&] {
      attention_backward(call);
      place_.finish();
    });
  }

 private:
  Communicator& world_;
  const Place& place_;
  int repeats_;
};

// Causal documents of equal length.
std::vector<Slice> causal_documents(std::int64_t rows, std::int64_t length) {
  std::vector<Slice> slices;
  for (std::int64_t begin = 0; begin < rows; begin += length) {
    const Span document{begin, std::min(begin + length, rows)};
    slices.push_back({document, document, {-kUnbounded, 0}});
  }
  return slices;
}

struct TimedWork {
  TileWork work;
  double seconds = 0.0;  // beside what a call takes
};

struct TileRates {
  double pair_seconds = 0.0;
  double tile_seconds = 0.0;
};

// What a pair and a tile take, by much work of few tiles for its pairs, and by little of many.
TileRates solve(const TimedWork& much, const TimedWork& little) {
  const auto pairs = static_cast<double>(much.work.pairs);
  const auto tiles = static_cast<double>(much.work.tiles);
  const double share = static_cast<double>(little.work.pairs) / pairs;
  const double more_tiles = static_cast<double>(little.work.tiles) - share * tiles;
  TileRates rates;
  if (more_tiles > 0.0) {
    rates.tile_seconds = std::clamp((little.seconds - share * much.seconds) / more_tiles, 0.0,
                                    0.5 * much.seconds / tiles);
  }
  rates.pair_seconds = (much.seconds - tiles * rates.tile_seconds) / pairs;
  return rates;
}

TileWork work_of(std::span<const Slice> slices, std::int64_t tile_rows, std::int64_t copies,
                 TileWork (*work_of_slice)(const Slice&, std::int64_t)) {
  TileWork all;
  for (const Slice& slice : slices) {
    const TileWork work = work_of_slice(slice, tile_rows);
    all.pairs += copies * work.pairs;
    all.tiles += copies * work.tiles;
  }
  return all;
}

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
  constexpr std::int64_t kFewRows = 8192;
  constexpr std::int64_t kDocuments = 16;
  constexpr std::int64_t kDeviceTile = 128;
  Communicator& world = context.world();
  const std::int64_t rows = request.q_layout.max_rows();
  const std::int64_t fewer = std::min(rows, kFewRows);
  const std::int64_t heads = request.batch * request.q_heads;
  const auto square = [&](std::int64_t side) {
    return RankAttention(request, sizes, dtype, context.rank(), place.device, side, side);
  };
  const KernelTimes times(world, place, repeats);
  Rates rates;
  rates.tile_rows = place.device == Device::cuda ? kDeviceTile : 1;
  {
    RankAttention one = square(1);
    rates.call_seconds = times.forward(one, causal_documents(1, 1));
  }
  TimedWork forward[2];
  TimedWork backward[2];
  const std::int64_t sides[2] = {rows, fewer};
  const std::int64_t lengths[2] = {rows, std::max<std::int64_t>(fewer / kDocuments, 1)};
  for (int i = 0; i < 2; ++i) {
    RankAttention tensors = square(sides[i]);
    const std::vector<Slice> slices = causal_documents(sides[i], lengths[i]);
    const auto beside_call = [&](double seconds) {
      return std::max(seconds - rates.call_seconds, 0.1 * seconds);
    };
    forward[i].work = work_of(slices, rates.tile_rows, heads, tile_work);
    backward[i].work = work_of(slices, rates.tile_rows, heads, backward_tile_work);
    forward[i].seconds = beside_call(times.forward(tensors, slices));
    tensors.compute_delta();
    backward[i].seconds = beside_call(times.backward(tensors, slices));
  }
  const TileRates of_forward = solve(forward[0], forward[1]);
  const TileRates of_backward = solve(backward[0], backward[1]);
  rates.forward_flops = forward_flops(1, sizes) / of_forward.pair_seconds;
  rates.backward_flops = backward_flops(1, sizes) / of_backward.pair_seconds;
  rates.forward_tile_seconds = of_forward.tile_seconds;
  rates.backward_tile_seconds = of_backward.tile_seconds;
  rates.copy_bandwidth = copy_bandwidth(world, place);
  rates.node_bandwidth = rates.network_bandwidth = exchange_bandwidth(world, place);
  rates.node_ranks = context.ranks_on_node();
  rates.hides_node_transfers = place.device == Device::cuda;
  rates.reads_in_place = place.device == Device::cpu;
  rates.one_device = place.device == Device::cuda && world.size() > 1 &&
                     place.ranks.reach() == Communicator::Reach::everybody;
  rates.one_launch =
      place.ranks.carrier() == Communicator::Carrier::copy_engine || rates.one_device;
  return rates;
}

}  // namespace annulus::launch
