#include "sharding/memory_model.hpp"

#include <algorithm>

#include "kernels/cuda_support.hpp"
#include "sharding/block_backward.hpp"
#include "sharding/block_forward.hpp"
#include "sharding/gradient_tree.hpp"
#include "sharding/stage_parts.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kFloatBytes = 4;

std::int64_t padded(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

std::int64_t kv_buffer_bytes(std::int64_t batch, std::int64_t rows, std::int64_t heads,
                             const AttentionSizes& sizes, std::int64_t element_bytes) {
  const std::int64_t elements = batch * rows * heads;
  return padded(elements * sizes.head_dim * element_bytes) +
         elements * sizes.value_dim * element_bytes;
}

struct BufferUse {
  bool sends = false;
  bool receives = false;
  bool carries_state = false;        // several kernel calls for the same rows
  int received_buffers[2] = {0, 0};  // of stages with even and with odd numbers
  std::int64_t shared_rows = 0;      // that lie in a window, for peers to read
};

// Rows that peers read, and those that the rank reads beside theirs where stages are joined.
std::int64_t shared_rows(const AttentionPlan& plan, bool joined) {
  std::vector<Span> rows;
  for (const Stage& stage : plan.stages()) {
    for (const Transfer& transfer : stage.sends) {
      for (const Piece& piece : transfer.pieces) rows.push_back(piece.rows);
    }
    if (stage.number != 0 || !joined) continue;
    for (const Slice& slice : stage.slices.slices) rows.push_back(slice.k);
  }
  unite(rows);
  std::int64_t total = 0;
  for (const Span span : rows) total += span.size();
  return total;
}

BufferUse use_of(const AttentionPlan& plan, bool in_place, bool joined) {
  BufferUse use;
  if (in_place) use.shared_rows = shared_rows(plan, joined);
  if (joined) return use;
  const bool blocks = plan.request().block_rows > 0;
  std::size_t calls = 0;
  for (const Stage& stage : plan.stages()) {
    const bool by_piece = in_place && !blocks && stage.number > 0 && few_pieces(stage);
    if (!stage.slices.slices.empty()) {
      for (const Transfer& transfer : stage.receives)
        calls += by_piece ? transfer.pieces.size() : 0;
      calls += by_piece ? 0 : 1;
    }
    // Pieces of one batch row cannot finish the whole batch.
    use.carries_state = use.carries_state || calls > 1 ||
                        (by_piece && stage.runs.size() > 1 && !stage.receives.empty());
    if (stage.number == 0) continue;
    use.sends = use.sends || !stage.sends.empty();
    use.receives = use.receives || stage.buffer_rows > 0;
    if (in_place && !blocks && few_pieces(stage)) continue;
    if (stage.buffer_rows > 0) use.received_buffers[stage.number % 2] = 1;
  }
  return use;
}

// As forward_in_one_launch() does where rows arrive beside the kernel.
bool is_one_launch(const AttentionPlan& plan) {
  return plan.scheme() != Scheme::all_gather && plan.request().block_rows == 0 &&
         plan.stages().size() > 1 && plan.stages().size() <= kernels::cuda::kMaxSegments;
}

BufferUse all_stages_at_once(const AttentionPlan& plan) {
  BufferUse use;
  for (const Stage& stage : plan.stages()) {
    if (stage.number > 0 && stage.buffer_rows > 0) ++use.received_buffers[stage.number % 2];
  }
  return use;
}

// As forward_own_rows_in_place() does: q, k, v and O of the others' rows, and the own rows of O
// that others computed.
std::int64_t others_rows_bytes(const AttentionPlan& plan, const AttentionSizes& sizes) {
  const PlanRequest& request = plan.request();
  const std::int64_t dims = sizes.head_dim + sizes.value_dim;
  const std::int64_t heads = plan.q_heads_of(plan.head_rank()).size();
  const std::int64_t kv_heads = plan.kv_heads_of(plan.head_rank()).size();
  const std::int64_t own_rows = request.q_layout.rows(plan.rank());
  const std::int64_t q_rows = request.q_layout.seq() - own_rows;
  const std::int64_t kv_rows = request.kv_layout.seq() - request.kv_layout.rows(plan.rank());
  const std::int64_t given_back = own_rows * (request.q_heads - heads);
  std::int64_t bytes =
      (q_rows * heads * dims + kv_rows * kv_heads * dims + given_back * sizes.value_dim) *
      sizes.element_bytes;
  if (sizes.log_sum_exp) bytes += (q_rows * heads + given_back) * kFloatBytes;
  return request.batch * bytes;
}

// As backward_own_rows_in_place() does: queries, output gradients, statistics and dQ of the others'
// rows; k, v, dK and dV of all; the own rows' gradients that others computed.
std::int64_t others_gradients_bytes(const AttentionPlan& plan, const AttentionSizes& sizes) {
  const PlanRequest& request = plan.request();
  const std::int64_t dims = sizes.head_dim + sizes.value_dim;
  const std::int64_t heads = plan.q_heads_of(plan.head_rank()).size();
  const std::int64_t own_rows = request.q_layout.rows(plan.rank());
  const std::int64_t q_rows = request.q_layout.seq() - own_rows;
  std::int64_t kv_heads_of_others = -plan.kv_heads_of(plan.head_rank()).size();
  for (int j = 0; j < plan.head_ranks(); ++j) kv_heads_of_others += plan.kv_heads_of(j).size();
  const std::int64_t keys = request.kv_layout.seq() * plan.kv_heads_of(plan.head_rank()).size();
  std::int64_t bytes = keys * dims * (sizes.element_bytes + kFloatBytes);
  bytes += q_rows * heads * (dims * sizes.element_bytes + (4 + sizes.head_dim) * kFloatBytes);
  bytes +=
      own_rows * (2 * request.q_heads + (request.q_heads - heads) * sizes.head_dim) * kFloatBytes;
  bytes += request.kv_layout.rows(plan.rank()) * kv_heads_of_others * dims * kFloatBytes;
  return request.batch * bytes;
}

std::int64_t own_kv_heads(const AttentionPlan& plan) {
  return plan.kv_heads_of(plan.head_rank()).size();
}
std::int64_t own_q_heads(const AttentionPlan& plan) {
  return plan.q_heads_of(plan.head_rank()).size();
}

TensorView without_data(std::int64_t batch, std::int64_t rows, std::int64_t heads,
                        std::int64_t dim) {
  return {nullptr, DType::f32, {batch, rows, heads, dim}};
}

// Partials of a backward pass over grids, those on their way up the trees of the rank's queries and
// of its keys, for `q_heads` query heads: the pass is walked without computing.
std::int64_t tree_bytes(const AttentionPlan& plan, const AttentionSizes& sizes,
                        std::int64_t q_heads, std::int64_t kv_heads) {
  const PlanRequest& request = plan.request();
  const std::int64_t batch = request.batch;
  const std::int64_t rows = plan.kv_layout().rows(plan.group());
  BackwardCall local;
  local.problem.q =
      without_data(batch, plan.q_layout().rows(plan.group()), q_heads, sizes.head_dim);
  local.problem.k = without_data(batch, rows, kv_heads, sizes.head_dim);
  local.problem.v = without_data(batch, rows, kv_heads, sizes.value_dim);
  const ExecuteOptions options;
  BlockBackwardPass pass(local, plan, options, true);
  GradientTree tree(plan,
                    {without_data(batch, rows, q_heads, sizes.head_dim),
                     without_data(batch, rows, q_heads, sizes.value_dim),
                     q_heads,
                     {}},
                    {}, true);
  const auto add = [&](int group, std::size_t node, Span batch_rows, Span own, bool any) {
    for (std::int64_t b = batch_rows.begin; b < batch_rows.end; ++b) {
      for (const KvSide side : {KvSide::key, KvSide::value}) {
        const std::int64_t dim = side == KvSide::key ? sizes.head_dim : sizes.value_dim;
        const TensorView part = without_data(1, own.size(), q_heads, dim);
        tree.add(group, node, b, own, side, any ? part : TensorView());
      }
    }
  };
  const auto take_back = [&](const Stage& stage) {
    for (const Transfer& transfer : stage.sends) {
      const std::size_t nodes = plan.gradient_nodes(transfer.peer).size();
      for (const Piece& piece : transfer.pieces) {
        const bool every = piece.batch == Piece::kEveryBatch;
        const Span all = every ? Span{0, batch} : Span{piece.batch, piece.batch + 1};
        for (std::int64_t b = all.begin; b < all.end; ++b) {
          for (std::size_t i = 0; i < nodes; ++i) {
            add(transfer.peer, i, {b, b + 1}, piece.rows, true);
          }
        }
      }
    }
  };
  const Stage* before = nullptr;
  for (const Stage& stage : plan.stages()) {
    for (const StagePart& part : parts_of(stage, batch, Granularity::block, request.block_rows)) {
      pass.add(part, local.problem.k, local.problem.v,
               [&](std::size_t node, Span cell, const ConstTensorView& grad_k,
                   const ConstTensorView& /*grad_v*/) {
                 if (stage.number > 0) return;
                 const Span own{part.rows.begin + cell.begin, part.rows.begin + cell.end};
                 add(plan.group(), node, part.batch, own, grad_k.rank() > 0);
               });
    }
    if (before != nullptr) take_back(*before);
    before = stage.number > 0 ? &stage : nullptr;
  }
  if (before != nullptr) take_back(*before);
  return pass.buffer_bytes() + tree.buffer_bytes();
}

}  // namespace

std::int64_t shard_bytes(const AttentionPlan& plan, const AttentionSizes& sizes, bool backward) {
  const PlanRequest& request = plan.request();
  const std::int64_t q_rows = request.batch * request.q_layout.rows(plan.rank()) * request.q_heads;
  const std::int64_t kv_rows =
      request.batch * request.kv_layout.rows(plan.rank()) * request.kv_heads;
  const std::int64_t dims = sizes.head_dim + sizes.value_dim;
  std::int64_t bytes = (q_rows + kv_rows) * dims * sizes.element_bytes + q_rows * kFloatBytes;
  if (backward) {
    bytes += q_rows * sizes.value_dim * sizes.element_bytes + q_rows * kFloatBytes;  // dO, delta
    bytes += (q_rows * sizes.head_dim + kv_rows * dims) * kFloatBytes;
  }
  return bytes;
}

RowAccess row_access(const Rates& rates) {
  return {rates.reads_in_place || rates.one_device, rates.one_launch, rates.one_device};
}

bool computes_own_rows_in_place(const AttentionPlan& plan, const RowAccess& access) {
  return access.one_launch && !access.one_device && plan.groups() == 1 && plan.head_ranks() > 1 &&
         plan.request().block_rows == 0 &&
         static_cast<std::size_t>(plan.head_ranks()) <= kernels::cuda::kMaxSegments;
}

bool is_one_call_on_one_device(const AttentionPlan& plan, const AttentionSizes& sizes,
                               bool backward) {
  if (plan.scheme() == Scheme::all_gather || plan.request().block_rows > 0) return false;
  if (plan.groups() == 1) return false;
  if (!backward) return static_cast<std::size_t>(plan.groups()) <= kernels::cuda::kMaxSegments;
  return sizes.head_dim == sizes.value_dim && few_slices(plan);
}

std::int64_t forward_buffer_bytes(const AttentionPlan& plan, const AttentionSizes& sizes,
                                  const RowAccess& access) {
  const PlanRequest& request = plan.request();
  const std::int64_t batch = request.batch;
  const bool by_head = plan.scheme() == Scheme::all_gather;
  const bool in_place = access.in_place;
  if (computes_own_rows_in_place(plan, access)) return others_rows_bytes(plan, sizes);
  const bool joined =
      in_place && !access.one_device && sizes.head_dim == sizes.value_dim && joins_stages(plan);
  BufferUse use = use_of(plan, in_place && !by_head, joined);
  if (access.one_device && is_one_call_on_one_device(plan, sizes, false)) {
    use = {.shared_rows = shared_rows(plan, false)};
  } else if (!in_place && access.one_launch && is_one_launch(plan)) {
    use = all_stages_at_once(plan);
  }
  const std::int64_t q_rows = batch * plan.q_layout().rows(plan.group());
  const std::int64_t kv_heads = by_head ? 1 : own_kv_heads(plan);
  std::int64_t bytes = 0;
  if (request.block_rows > 0) {
    const std::int64_t heads = by_head ? plan.group_size() : own_q_heads(plan);
    bytes += block_state_rows(plan) * heads * (sizes.value_dim + 2) * kFloatBytes;
  } else if (use.carries_state) {
    bytes += q_rows * own_q_heads(plan) * (sizes.value_dim + 2) * kFloatBytes;
  }
  const std::int64_t own = kv_buffer_bytes(batch, plan.kv_layout().rows(plan.group()), kv_heads,
                                           sizes, sizes.element_bytes);
  const auto remote = [&](int parity) {
    return kv_buffer_bytes(batch, plan.max_buffer_rows(parity), kv_heads, sizes,
                           sizes.element_bytes);
  };
  if (by_head && plan.groups() > 1) {
    // Two heads at a time: packed rows to send, and rows gathered.
    const std::int64_t heads = std::min<std::int64_t>(request.kv_heads, 2);
    const bool packs = use.sends && request.kv_heads > 1;
    bytes += heads * ((packs ? own : 0) + (use.receives ? remote(1) : 0));
  } else {
    bytes += kv_buffer_bytes(batch, use.shared_rows, kv_heads, sizes, sizes.element_bytes);
    for (const int parity : {0, 1}) bytes += use.received_buffers[parity] * remote(parity);
  }
  if (plan.head_ranks() == 1) return bytes;
  const std::int64_t dims = sizes.head_dim + sizes.value_dim;
  const std::int64_t kv_rows = batch * plan.kv_layout().rows(plan.group());
  bytes += (q_rows * own_q_heads(plan) * dims + kv_rows * own_kv_heads(plan) * dims) *
           sizes.element_bytes;  // q, k, v in, O out
  const std::int64_t other_heads = request.q_heads - own_q_heads(plan);
  bytes += batch * request.q_layout.rows(plan.rank()) * other_heads * sizes.value_dim *
           sizes.element_bytes;  // O arriving
  if (sizes.log_sum_exp) {
    bytes += (2 * q_rows * own_q_heads(plan) +
              batch * request.q_layout.rows(plan.rank()) * other_heads) *
             kFloatBytes;
  }
  return bytes;
}

std::int64_t backward_buffer_bytes(const AttentionPlan& plan, const AttentionSizes& sizes,
                                   const RowAccess& access) {
  const PlanRequest& request = plan.request();
  const std::int64_t batch = request.batch;
  const bool by_head = plan.scheme() == Scheme::all_gather;
  const bool in_place = access.in_place;
  if (computes_own_rows_in_place(plan, access)) return others_gradients_bytes(plan, sizes);
  const bool in_one_call = access.one_device && is_one_call_on_one_device(plan, sizes, true);
  const BufferUse use = use_of(plan, in_place && !by_head, false);
  const std::int64_t kv_heads = by_head ? 1 : own_kv_heads(plan);
  const std::int64_t own_rows = plan.kv_layout().rows(plan.group());
  const auto kv = [&](std::int64_t rows, std::int64_t element_bytes) {
    return kv_buffer_bytes(batch, rows, kv_heads, sizes, element_bytes);
  };
  const std::int64_t remote[2] = {plan.max_buffer_rows(0), plan.max_buffer_rows(1)};
  const bool trees = request.q_block_rows > 0;
  const std::int64_t grad_heads = !trees    ? kv_heads
                                  : by_head ? plan.group_size()
                                            : plan.gradient_heads();
  const auto copies = [&](int group) {
    return trees ? static_cast<std::int64_t>(plan.gradient_nodes(group).size()) : 1;
  };
  // Partials that go out and partials that come back, of stages that take turns.
  std::int64_t outgoing[2] = {0, 0};
  std::int64_t incoming[2] = {0, 0};
  for (const Stage& stage : plan.stages()) {
    const int turn = stage.number % 2;
    if (stage.number > 0 && stage.buffer_rows > 0) {
      outgoing[turn] = copies(plan.group()) *
                       kv_buffer_bytes(batch, remote[turn], grad_heads, sizes, kFloatBytes);
    }
    // Peers' partials are added from where they lie; those on a device are sent.
    if (in_place && !access.one_device && !by_head) continue;
    std::int64_t rows = 0;
    for (const Transfer& transfer : stage.sends)
      rows += copies(transfer.peer) * transfer.rows(batch);
    incoming[turn] = std::max(incoming[turn],
                              rows * grad_heads * (sizes.head_dim + sizes.value_dim) * kFloatBytes);
  }
  std::int64_t bytes =
      trees ? tree_bytes(plan, sizes, by_head ? grad_heads : own_q_heads(plan), kv_heads) : 0;
  if (by_head && plan.groups() > 1) {
    const std::int64_t heads = std::min<std::int64_t>(request.kv_heads, 2);
    const bool packs = use.sends && request.kv_heads > 1;
    bytes += heads * ((packs ? kv(own_rows, sizes.element_bytes) : 0) +
                      (use.receives ? kv(remote[1], sizes.element_bytes) : 0) + outgoing[1]) +
             incoming[1];
  } else if (in_one_call) {
    bytes += kv(shared_rows(plan, true), sizes.element_bytes) + kv(own_rows, kFloatBytes);
  } else {
    bytes += kv(use.shared_rows, sizes.element_bytes);
    for (const int parity : {0, 1}) {
      bytes += use.received_buffers[parity] * kv(remote[parity], sizes.element_bytes);
    }
    bytes += outgoing[0] + outgoing[1] + incoming[0] + incoming[1];
  }
  if (plan.head_ranks() == 1) return bytes;
  const std::int64_t dims = sizes.head_dim + sizes.value_dim;
  const std::int64_t q_rows = batch * plan.q_layout().rows(plan.group()) * own_q_heads(plan);
  const std::int64_t kv_rows = batch * plan.kv_layout().rows(plan.group()) * own_kv_heads(plan);
  // q, dO, k, v, LSE and delta in; dQ, dK, dV in fp32, and those that arrive.
  bytes += q_rows * (dims * sizes.element_bytes + 2 * kFloatBytes) +
           kv_rows * dims * sizes.element_bytes;
  const std::int64_t own_kv_rows = batch * request.kv_layout.rows(plan.rank());
  bytes += q_rows * sizes.head_dim * kFloatBytes +
           batch * own_rows * plan.gradient_heads() * dims * kFloatBytes;
  std::int64_t arriving_heads = -plan.gradient_heads();
  for (int j = 0; j < plan.head_ranks(); ++j) {
    arriving_heads += trees ? plan.q_heads_of(j).size() : plan.kv_heads_of(j).size();
  }
  if (trees) bytes += own_kv_rows * request.q_heads * dims * kFloatBytes;
  bytes += batch * request.q_layout.rows(plan.rank()) * (request.q_heads - own_q_heads(plan)) *
           sizes.head_dim * kFloatBytes;
  bytes += own_kv_rows * arriving_heads * dims * kFloatBytes;
  return bytes;
}

}  // namespace annulus
