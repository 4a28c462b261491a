#include "kernels/sm90/decode_launch.hpp"

#include <algorithm>
#include <bit>
#include <numeric>

#include "kernels/cuda/check.hpp"
#include "kernels/error.hpp"
#include "kernels/sm90/scratch.hpp"
#include "kernels/sm90/tensor_map.hpp"

namespace annulus::kernels::sm90 {
namespace {

constexpr float kLog2E = 1.4426950408889634F;
constexpr std::uint64_t kEvictFirst = 0x12F0000000000000;
constexpr std::uint64_t kEvictNormal = 0x1000000000000000;

std::int32_t narrow(std::int64_t value) {
  require(value >= 0 && value < (std::int64_t{1} << 30), ExitCode::bad_data,
          "sm90 decode: extent {}; accepted: below 2^30", value);
  return static_cast<std::int32_t>(value);
}

/// [tokens, heads, dim]
TokenStrides token_strides(const TensorView& view) { return {view.strides[0], view.strides[1]}; }

/// [.., heads, tokens]
TokenStrides head_strides(const TensorView& view, int heads) {
  return {view.strides[heads + 1], view.strides[heads]};
}

Divisor divisor(std::int32_t value) {
  const std::uint64_t by = static_cast<std::uint64_t>(std::max(value, 1));
  const int shift = 31 + static_cast<int>(std::bit_width(by - 1));
  return {value, static_cast<std::uint32_t>((std::uint64_t{1} << shift) / by + 1), shift};
}

PageStrides page_strides(const ConstTensorView& cache) {
  return {cache.strides[0] * 2, cache.strides[1] * 2, cache.strides[2] * 2};
}

/// Tokens that one copy takes from a page, 0 where they are gathered.
std::int32_t box_tokens(const DecodeProblem& problem, int block) {
  if (problem.max_pages() == 1) return block;
  if (gathers_tokens(problem)) return 0;
  return static_cast<std::int32_t>(std::gcd(problem.page_size(), block));
}

CUtensorMap cache_map(const ConstTensorView& cache, int columns, int box) {
  return make_tensor_map<4>(
      cache.data, cache.dtype,
      {MapDim{cache.shape[3], 1, columns}, MapDim{cache.shape[1], cache.strides[1], box},
       MapDim{cache.shape[2], cache.strides[2], 1}, MapDim{cache.shape[0], cache.strides[0], 1}},
      // A box's rows are 128 bytes: with 256 each is asked of L2 twice, which then binds.
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

void set_cache(DecodeParams& params, const DecodeProblem& problem, const DecodeVariant& variant) {
  params.k_data = static_cast<const char*>(problem.k.data);
  params.v_data = static_cast<const char*>(problem.v.data);
  params.k_strides = page_strides(problem.k);
  params.v_strides = page_strides(problem.v);
  params.pages = narrow(problem.k.shape[0]);
  params.page_size = divisor(narrow(problem.page_size()));
  params.max_pages = narrow(problem.max_pages());
  narrow(problem.max_pages() * problem.page_size());
  params.box_tokens = box_tokens(problem, variant.block);
  params.boxes = params.box_tokens == 0 ? 0 : variant.block / params.box_tokens;
  // Many small boxes hold the copy engine up: with two thirds of the bytes under way pages of 16
  // arrive 1 to 7% faster.
  params.stages = params.boxes > 2 ? variant.few_stages : variant.stages;
  params.alignment = problem.max_pages() == 1 ? 1 : std::max(params.box_tokens, 1);
  if (params.box_tokens == 0 || params.pages == 0) return;
  params.k = cache_map(problem.k, variant.k_columns, params.box_tokens);
  params.v = cache_map(problem.v, variant.v_columns, params.box_tokens);
}

void set_sequences(DecodeParams& params, const DecodeProblem& problem) {
  const auto integers = [](const ConstTensorView& view) {
    return static_cast<const std::int32_t*>(view.data);
  };
  params.q = problem.q.data;
  params.q_strides = {problem.q.strides[0], problem.q.strides[1]};
  params.query_begin = integers(problem.query_begin);
  params.lengths = integers(problem.lengths);
  params.starts = problem.starts ? integers(problem.starts) : nullptr;
  params.page_table = integers(problem.page_table);
  params.sequences = narrow(problem.sequences());
  params.deal_round = divisor(narrow(problem.deal.block * problem.deal.ranks));
  params.deal_block = narrow(problem.deal.block);
  params.deal_ranks = narrow(problem.deal.ranks);
  params.deal_rank = narrow(problem.deal.rank);
  const auto window = [](std::int64_t width) {
    return width < 0 ? -1 : static_cast<std::int32_t>(std::min<std::int64_t>(width, 1 << 30));
  };
  params.window_left = window(problem.window_left);
  params.window_right = window(problem.window_right);
  params.causal = problem.causal;
}

/// Query heads that share a tile, and how many thread blocks read the same keys side by side.
void set_parts(DecodeParams& params, const DecodeProblem& problem, int multiprocessors) {
  const std::int64_t group = problem.group_size();
  const std::int64_t pack = group % kTileRows == 0 ? kTileRows : group;
  params.pack = divisor(narrow(pack));
  params.parts = narrow(problem.q_heads() / pack);
  params.parts_per_kv_head = divisor(narrow(group / pack));
  std::int32_t lanes = 1;
  for (std::int32_t more = 2; more <= std::min(params.parts, multiprocessors); ++more) {
    const int used = multiprocessors / more * more;
    if (params.parts % more == 0 && used * 10 >= multiprocessors * 9) lanes = more;
  }
  params.lanes = divisor(lanes);
  params.groups = divisor(multiprocessors / lanes);
  params.rounds = params.parts / lanes;
  narrow((problem.tokens() * pack / kTileRows + problem.sequences()) * params.rounds);  // units
  // Parts of one KV head that go side by side read its keys at the same time.
  const bool read_once = params.parts_per_kv_head.value <= lanes && problem.max_rows > 0 &&
                         problem.max_rows * pack <= kTileRows;
  params.policy = read_once ? kEvictFirst : kEvictNormal;
}

void set_scale(DecodeParams& params, const DecodeProblem& problem) {
  params.capped = problem.soft_cap > 0.0F;
  params.score_scale = params.capped ? problem.scale / problem.soft_cap : 1.0F;
  params.exp_scale = kLog2E * (params.capped ? problem.soft_cap : problem.scale);
}

void set_outputs(DecodeParams& params, const DecodeCall& call) {
  if (call.problem.sinks) params.sinks = static_cast<const float*>(call.problem.sinks.data);
  if (call.o) {
    params.o = call.o.data;
    params.o_strides = token_strides(call.o);
    params.output_f32 = call.o.dtype == DType::f32;
    if (call.log_sum_exp) {
      params.lse = static_cast<float*>(call.log_sum_exp.data);
      params.lse_strides = head_strides(call.log_sum_exp, 0);
    }
    return;
  }
  params.accumulator = static_cast<float*>(call.state.accumulator.data);
  params.accumulator_strides = {call.state.accumulator.strides[1],
                                call.state.accumulator.strides[2]};
  params.row_max = static_cast<float*>(call.state.row_max.data);
  params.row_sum = static_cast<float*>(call.state.row_sum.data);
  params.max_strides = head_strides(call.state.row_max, 1);
  params.sum_strides = head_strides(call.state.row_sum, 1);
}

/// Two slots of a tile's rows, and two counters, for each thread block.
void set_scratch(DecodeParams& params, cudaStream_t stream, int blocks, int value_dim) {
  const std::int64_t rows = std::int64_t{2} * blocks * kTileRows;
  const std::int64_t statistics_bytes = rows * std::int64_t{sizeof(float2)};
  const Scratch memory = scratch(stream, 2 * blocks,
                                 statistics_bytes + rows * value_dim * std::int64_t{sizeof(float)});
  params.arrivals = memory.arrivals;
  params.partial_statistics = reinterpret_cast<float2*>(memory.data);
  params.partial_o = reinterpret_cast<float*>(memory.data + statistics_bytes);
}

int multiprocessors() {
  int device = 0;
  int count = 0;
  ANNULUS_CHECK_CUDA(cudaGetDevice(&device));
  ANNULUS_CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace

bool gathers_tokens(const DecodeProblem& problem) {
  return problem.max_pages() > 1 && problem.page_size() % 8 != 0;
}

void launch_decode(const DecodeCall& call, const DecodeVariant& variant) {
  const DecodeProblem& problem = call.problem;
  if (problem.tokens() == 0 || problem.q_heads() == 0 || problem.sequences() == 0) return;
  const auto stream = static_cast<cudaStream_t>(call.stream.handle);
  const int processors = multiprocessors();
  DecodeParams params{};
  set_cache(params, problem, variant);
  set_sequences(params, problem);
  set_parts(params, problem, processors);
  set_scale(params, problem);
  set_outputs(params, call);
  const int blocks = params.groups.value * params.lanes.value;
  set_scratch(params, stream, blocks, variant.value_dim);
  variant.launch(params, blocks, stream);
}

}  // namespace annulus::kernels::sm90
