#include "runtime/attention_call.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "kernels/error.hpp"
#include "kernels/work_meter.hpp"
#include "runtime/call_tensors.hpp"
#include "runtime/kernel_choice.hpp"
#include "runtime/redistribute.hpp"
#include "runtime/stopwatch.hpp"
#include "runtime/trace.hpp"
#include "sharding/block_forward.hpp"

namespace annulus {
namespace {

bool rows_are_dense(const ConstTensorView& view) {
  const int last = view.rank() - 1;
  return view.shape[last] <= 1 || view.strides[last] == 1;
}

std::string in_words(const DistributedTensor& tensor) {
  std::uint64_t dealt = 0;
  const TensorLayout& layout = tensor.layout();
  for (int rank = 0; rank < layout.mesh().ranks(); ++rank) {
    for (int dim = 0; dim < layout.global_shape().rank(); ++dim) {
      dealt = dealt * 31 + digest_of(layout.runs(rank, dim));
    }
  }
  return fmt::format("{} {} dealt {:016x}", name(tensor.dtype()), layout.to_string(), dealt);
}

std::string in_words(const AttentionMask& mask) {
  std::uint64_t segments = 0;
  for (const auto* side : {&mask.q_segments, &mask.kv_segments}) {
    for (const std::vector<Segment>& row : *side) segments = segments * 31 + digest_of(row);
  }
  return fmt::format(
      "window {},{}, {}x{} segment rows {:016x}, {}, prefix {:016x}, blocks {}x{} {:016x}",
      mask.window_left, mask.window_right, mask.q_segments.size(), mask.kv_segments.size(),
      segments, mask.align_per_segment ? "aligned per segment" : "aligned whole",
      digest_of(mask.prefix_lengths), mask.block_q, mask.block_kv, digest_of(mask.kept_blocks));
}

/// The part of a mask that the rows of `runs` see.
MaskSlices rows_of(const MaskSlices& mask, std::span<const RowRun> runs, std::int64_t seq_kv) {
  MaskSlices part;
  const auto add = [&](std::span<const Slice> slices) {
    for (const Slice& slice : slices) {
      for (const RowRun& run : runs) {
        const Slice seen = clip(slice, run.global, {0, seq_kv});
        if (!seen.q.empty() && !seen.k.empty()) part.slices.push_back(seen);
      }
    }
  };
  if (mask.batch_offsets.empty()) {
    add(mask.slices);
    return part;
  }
  part.batch_offsets.push_back(0);
  for (std::size_t b = 0; b + 1 < mask.batch_offsets.size(); ++b) {
    add(mask.view().of_batch(static_cast<std::int64_t>(b)));
    part.batch_offsets.push_back(static_cast<std::int64_t>(part.slices.size()));
  }
  return part;
}

/// Ranks that exchange heads in a hybrid: consecutive members on one node, no more than there are
/// heads, and as many in every such group.
int head_ranks(const Context& context, const std::vector<int>& members, std::int64_t q_heads) {
  const auto shared = [&](std::size_t length) {
    if (members.size() % length != 0) return false;
    for (std::size_t i = 0; i < members.size(); ++i) {
      if (context.node_of(members[i]) != context.node_of(members[i - i % length])) return false;
    }
    return true;
  };
  std::size_t length = std::min(members.size(), static_cast<std::size_t>(q_heads));
  while (length > 1 && !shared(length)) --length;
  return static_cast<int>(length);
}

}  // namespace

AttentionCall::AttentionCall(const AttentionOperation& operation, const AttentionInputs& inputs,
                             const AttentionOptions& options, Device device)
    : operation_(operation),
      inputs_(inputs),
      options_(options),
      device_(device),
      context_(*operation.metadata().context),
      rank_(context_.rank()) {
  check([this] { plan(); });
}

void AttentionCall::check(const std::function<void()>& step) {
  if (failure_) return;
  try {
    step();
  } catch (const Error& error) {
    const std::string said = error.what();
    const std::string prefix = operation_.name() + ": ";
    failure_ = Error(error.code(), said.starts_with(prefix) ? said : prefix + said);
  }
}

void AttentionCall::plan() {
  require(!options_.attention_weights || operation_.traits().weights, ExitCode::usage,
          "attention_weights are never formed here; use --op vanilla");
  // A device kernel's bits depend on the other rows and keys of its launch.
  require(!options_.reproducible || device_ == Device::cpu, ExitCode::usage,
          "the same bits for any number of ranks come from the CPU's kernels only; leave "
          "--reproducible or --backend out");
  check_output_dtype(options_);
  check_tensors(inputs_, operation_.metadata().mesh);
  const AttentionShape shape = shape_of(inputs_, options_.order);
  const TensorLayout query = bthd_layout(inputs_.query.layout(), options_.order);
  const TensorLayout key = bthd_layout(inputs_.key.layout(), options_.order);
  const AttentionOperation::Traits& traits = operation_.traits();
  const bool rows_share_work = traits.key_rows == KeyRows::dealt && traits.scheme == Scheme::ring;
  setup_ = make_setup(operation_.metadata(), shape, options_, operation_.causal(options_),
                      traits.key_rows, {&query, &key, rows_share_work});
  const Span batch = setup_->batch(rank_);
  mask_ = mask_of(setup_->mask, batch);
  const int part = setup_->sequence_part(rank_);
  const std::span<const RowRun> runs = setup_->q_rows.runs(part);
  positions_ = positions_of(runs);
  if (idle()) return;
  const bool whole = traits.key_rows == KeyRows::whole;
  if (whole && !options_.reproducible) {
    const std::vector<RowRun> all = {{0, {0, shape.seq_kv}}};
    local_mask_ = localize(mask_, runs, {&all, 1});
    return;
  }
  PlanRequest request;
  const int head_part = setup_->head_part(rank_);
  const HeadGroups groups = setup_->heads.groups(head_part);
  request.q_layout = setup_->q_rows;
  request.kv_layout = setup_->kv_rows;
  request.mask = mask_;
  request.batch = batch.size();
  request.q_heads = setup_->heads.q_heads(head_part).size();
  request.kv_heads = setup_->heads.kv_heads(head_part).size();
  request.group_size = groups.group_size;
  request.q_head_offset = groups.q_head_offset;
  request.node_ranks =
      head_ranks(context_, setup_->mesh().group(rank_, setup_->sequence_axes), request.q_heads);
  request.stage_rows = operation_.tuning().stage_rows;
  if (options_.reproducible) {
    request.block_rows = reproducible_block_rows(shape.seq_kv);
    request.q_block_rows = reproducible_query_rows(shape.seq_q);
  }
  if (!whole) {
    plan_.emplace(operation_.choose(std::move(request), shape), part);
    return;
  }
  request.kv_layout = SequenceLayout::contiguous(shape.seq_kv, setup_->q_rows.ranks());
  gradient_plan_.emplace(std::make_shared<const PlanRequest>(request), part);
  // The grid of blocks is walked by a ring in which this rank holds all keys, needs nobody and
  // nobody needs it.
  request.mask = rows_of(mask_, runs, shape.seq_kv);
  std::vector<std::int64_t> rows(static_cast<std::size_t>(setup_->q_rows.ranks()));
  rows[static_cast<std::size_t>(part)] = shape.seq_kv;
  request.kv_layout = SequenceLayout::contiguous(rows);
  plan_.emplace(std::make_shared<const PlanRequest>(std::move(request)), part);
}

bool AttentionCall::idle() const {
  return setup_->batch(rank_).empty() || setup_->heads.q_heads(setup_->head_part(rank_)).empty();
}

std::int64_t AttentionCall::kept_pairs() const {
  if (idle()) return 0;
  // Where heads are exchanged a rank sees all rows, for its share of the heads.
  if (plan_) return plan_->area() * plan_->q_heads_of(plan_->head_rank()).size();
  const std::int64_t heads = setup_->heads.q_heads(setup_->head_part(rank_)).size();
  std::int64_t pairs = 0;
  for (std::int64_t b = 0; b < setup_->batch(rank_).size(); ++b) pairs += local_mask_.area(b);
  return pairs * heads;
}

void AttentionCall::state(Statement& statement) const {
  const OperationMetadata& metadata = operation_.metadata();
  const OperationTuning& tuning = operation_.tuning();
  statement.add("version", ANNULUS_VERSION)
      .add("mesh", metadata.mesh.to_string())
      .add("backend", metadata.backend)
      .add("transport", name(metadata.transport))
      .add("runtime dtype", name(metadata.runtime_dtype))
      .add("kernel", tuning.kernel)
      .add("stage rows", tuning.stage_rows)
      .add("reading in place", tuning.in_place)
      .add("rates", tuning.rates)
      .add("causal", operation_.causal(options_))
      .add("scale", options_.scale.value_or(metadata.softmax_scale.value_or(0.0F)))
      .add("soft cap", options_.soft_cap)
      .add("dropout", options_.dropout.value_or(metadata.dropout_prob))
      .add("seed", options_.seed)
      .add("order", name(options_.order))
      .add("deal", options_.deal ? static_cast<int>(*options_.deal) : -1)
      .add("output dtype", name(options_.output_dtype.value_or(metadata.runtime_dtype)))
      .add("weights", options_.attention_weights)
      .add("log_sum_exp", options_.log_sum_exp)
      .add("reproducible", options_.reproducible)
      .add("mask", in_words(options_.mask));
}

void AttentionCall::agree(const std::vector<const DistributedTensor*>& extra) {
  Statement statement(operation_.name());
  state(statement);
  const auto state_tensor = [&](const std::string& what, const DistributedTensor* tensor) {
    const bool present = tensor != nullptr && *tensor;
    statement.add(what, present ? std::string_view(in_words(*tensor)) : "absent");
  };
  state_tensor("query", &inputs_.query);
  state_tensor("key", &inputs_.key);
  state_tensor("value", &inputs_.value);
  state_tensor("bias", inputs_.bias);
  state_tensor("dense mask", inputs_.mask);
  state_tensor("sinks", inputs_.sinks);
  for (std::size_t i = 0; i < extra.size(); ++i) {
    state_tensor(fmt::format("given result {}", i), extra[i]);
  }
  if (failure_) statement.fail(failure_->code(), failure_->what());
  const bool dealt = operation_.traits().key_rows == KeyRows::dealt;
  const bool planned = !failure_ && plan_.has_value() && dealt;
  const std::vector<Statement::Numbers> numbers = statement.agree(
      context_.world(),
      {failure_ ? 0 : kept_pairs(), planned ? static_cast<std::int64_t>(plan_->hash()) : 0});
  std::int64_t largest = 0;
  for (int rank = 0; rank < static_cast<int>(numbers.size()); ++rank) {
    const Statement::Numbers& theirs = numbers[static_cast<std::size_t>(rank)];
    largest = std::max(largest, theirs[0]);
    report_.pairs += static_cast<double>(theirs[0]);
    const int first = setup_->mesh().group(rank, setup_->sequence_axes).front();
    const auto expected = static_cast<std::uint64_t>(numbers[static_cast<std::size_t>(first)][1]);
    require(static_cast<std::uint64_t>(theirs[1]) == expected, ExitCode::internal,
            "{}: plan hash is {:016x} on rank {} but {:016x} on rank {}", operation_.name(),
            expected, first, static_cast<std::uint64_t>(theirs[1]), rank);
  }
  // Groups are made by all ranks together, also by those that have nothing to do.
  static_cast<void>(sequence_group());
  if (dealt || options_.reproducible) static_cast<void>(kernel_ranks());
  const double mean = report_.pairs / static_cast<double>(numbers.size());
  report_.imbalance = mean > 0.0 ? static_cast<double>(largest) / mean : 1.0;
}

Communicator& AttentionCall::kernel_ranks() const {
  if (device_ == Device::cpu) return sequence_group();
  return context_.along(setup_->mesh(), setup_->sequence_axes, operation_.metadata().transport);
}

WorkingInput AttentionCall::bring(const DistributedTensor& from, DimOrder order,
                                  const TensorLayout& to, DType dtype) {
  const auto begin = std::chrono::steady_clock::now();
  const std::int64_t bytes_before = context_.world().bytes_sent();
  WorkingInput input;
  input.view = in_bthd(from.local(), order);
  const TensorLayout layout = bthd_layout(from.layout(), order);
  if (!same_shards(layout, to)) {
    const RecordedSpan span(trace_recorder(), StageRecord::Kind::exchange);
    // Narrow first: fewer bytes travel.
    if (size_bytes(dtype) < size_bytes(input.view.dtype)) {
      input.cast = Tensor::copy_of(input.view, dtype);
      input.view = std::as_const(input.cast).view();
    }
    const DistributedTensor lent(Tensor::borrow(readable(input.view)), layout, rank_);
    input.moved = redistribute(lent, to, context_.world());
    input.view = std::as_const(input.moved).local();
  }
  if (input.view.dtype != dtype || input.view.device != device_ || !rows_are_dense(input.view)) {
    input.cast = Tensor::copy_of(input.view, dtype, device_);
    input.view = std::as_const(input.cast).view();
  }
  report_.exposed_communication_seconds += seconds_since(begin);
  report_.bytes_sent += context_.world().bytes_sent() - bytes_before;
  return input;
}

/// A bias or dense mask; one of KV heads is repeated for the query heads it serves.
WorkingInput AttentionCall::bring_pairs(const DistributedTensor* from,
                                        const std::optional<TensorLayout>& to, DType dtype) {
  if (!to) return {};
  WorkingInput input = bring(*from, DimOrder::bthd, *to, dtype);
  const std::int64_t heads = to->global_shape()[1];
  if (heads == 1 || heads == setup_->shape.q_heads) return input;
  const int part = setup_->head_part(rank_);
  const HeadGroups groups = setup_->heads.groups(part);
  Shape shape = input.view.shape;
  shape[1] = setup_->heads.q_heads(part).size();
  Tensor repeated(dtype, shape, device_);
  for (std::int64_t head = 0; head < shape[1]; ++head) {
    const std::int64_t kv = (head + groups.q_head_offset) / groups.group_size;
    copy(input.view.slice(1, {kv, kv + 1}), repeated.view().slice(1, {head, head + 1}));
  }
  input.moved = {};
  input.cast = std::move(repeated);
  input.view = std::as_const(input.cast).view();
  return input;
}

void AttentionCall::bring_inputs() {
  const AttentionLayouts& layouts = setup_->layouts;
  const DType dtype = operation_.metadata().runtime_dtype;
  query_ = bring(inputs_.query, options_.order, layouts.query, dtype);
  key_ = bring(inputs_.key, options_.order, layouts.key, dtype);
  value_ = bring(inputs_.value, options_.order, layouts.value, dtype);
  if (layouts.bias) {
    const DType given = inputs_.bias->dtype();
    bias_ = bring_pairs(inputs_.bias, layouts.bias, given == DType::f64 ? DType::f32 : given);
  }
  dense_mask_ = bring_pairs(inputs_.mask, layouts.mask, DType::u8);
  if (layouts.sinks) {
    sinks_ = bring(*inputs_.sinks, DimOrder::bthd, *layouts.sinks, DType::f32);
    if (sinks_.view.rank() == 2) {
      sinks_.cast = Tensor::copy_of(sinks_.view);
      const Shape heads{sinks_.view.shape[1]};
      sinks_.view = {std::as_const(sinks_.cast).view().data, DType::f32, heads, device_};
    }
  }
}

DistributedTensor AttentionCall::leave(DistributedTensor result, const TensorLayout& wanted) {
  const Device home = inputs_.query.device();
  if (result.device() != home) {
    Tensor local = Tensor::copy_of(std::as_const(result).local(), result.dtype(), home);
    result = DistributedTensor(std::move(local), result.layout(), rank_);
  }
  if (same_shards(result.layout(), wanted)) return result;
  const auto begin = std::chrono::steady_clock::now();
  const RecordedSpan span(trace_recorder(), StageRecord::Kind::exchange);
  const std::int64_t bytes_before = context_.world().bytes_sent();
  result = redistribute(result, wanted, context_.world());
  report_.exposed_communication_seconds += seconds_since(begin);
  report_.bytes_sent += context_.world().bytes_sent() - bytes_before;
  return result;
}

Tensor AttentionCall::local(DType dtype, const TensorLayout& layout) const {
  return Tensor(dtype, layout.local_shape(rank_), device_);
}

CacheView AttentionCall::cache() const {
  const AttentionLayouts& layouts = setup_->layouts;
  return {DistributedTensor(Tensor::copy_of(key_.view), layouts.key, rank_),
          DistributedTensor(Tensor::copy_of(value_.view), layouts.value, rank_)};
}

AttentionProblem AttentionCall::problem() const {
  const OperationMetadata& metadata = operation_.metadata();
  AttentionProblem problem;
  problem.q = query_.view;
  problem.k = key_.view;
  problem.v = value_.view;
  problem.mask = local_mask_.view();
  const float usual = 1.0F / std::sqrt(static_cast<float>(setup_->shape.head_dim));
  problem.scale = options_.scale.value_or(metadata.softmax_scale.value_or(usual));
  problem.soft_cap = options_.soft_cap;
  problem.groups = setup_->heads.groups(setup_->head_part(rank_));
  problem.sinks = sinks_.view;
  problem.bias = bias_.view;
  problem.dense_mask = dense_mask_.view;
  problem.dropout.probability = options_.dropout.value_or(metadata.dropout_prob);
  problem.dropout.seed = options_.seed;
  problem.dropout.batch_begin = setup_->batch(rank_).begin;
  problem.dropout.q_head_begin = setup_->heads.q_heads(setup_->head_part(rank_)).begin;
  problem.dropout.q_positions = positions_;
  return problem;
}

ExecuteOptions AttentionCall::execute_options(ExecutionReport& execution,
                                              const AttentionProblem& problem,
                                              Direction direction) const {
  ExecuteOptions options;
  options.backend = kernel_of(operation_, device_, problem, direction);
  options.in_place = operation_.tuning().in_place;
  options.report = &execution;
  options.recorder = trace_recorder();
  return options;
}

/// A device works on when execution returns, and copies while it computes: what was not spent on
/// the host in waiting counts as computation.
void AttentionCall::finish_on_device(ExecutionReport& execution,
                                     std::chrono::steady_clock::time_point begin) const {
  if (device_ == Device::cpu) return;
  synchronize(device_, {});
  execution.compute_seconds = std::max(0.0, seconds_since(begin) - execution.exposed_seconds);
}

void AttentionCall::account(const ExecutionReport& execution) {
  report_.compute_seconds += execution.compute_seconds;
  report_.exposed_communication_seconds += execution.exposed_seconds;
  report_.bytes_sent += execution.bytes_sent;
  report_.bytes_in_place += execution.bytes_in_place;
  report_.buffer_bytes = std::max(report_.buffer_bytes, execution.buffer_bytes);
}

void AttentionCall::forward(const TensorView& o, const TensorView& log_sum_exp) {
  if (idle()) return;
  work_meter().expect(static_cast<double>(kept_pairs()));
  ForwardCall call;
  call.problem = problem();
  call.o = o;
  call.log_sum_exp = log_sum_exp;
  ExecutionReport execution;
  const ExecuteOptions options = execute_options(execution, call.problem, Direction::forward);
  if (plan_) {
    const auto begin = std::chrono::steady_clock::now();
    execute_forward(kernel_ranks(), *plan_, call, options);
    finish_on_device(execution, begin);
  } else if (call.problem.seq_q() > 0) {
    const auto begin = std::chrono::steady_clock::now();
    const RecordedSpan span(options.recorder, StageRecord::Kind::compute);
    attention_forward(call, options.backend);
    synchronize(device_, call.stream);
    execution.compute_seconds = seconds_since(begin);
  }
  account(execution);
}

void AttentionCall::backward(BackwardCall& call) {
  if (idle()) return;
  work_meter().expect(kBackwardWork * static_cast<double>(kept_pairs()));
  call.problem = problem();
  ExecutionReport execution;
  const ExecuteOptions options = execute_options(execution, call.problem, Direction::backward);
  if (gradient_plan_) {
    backward_over_blocks(call, options);
  } else if (plan_) {
    const auto begin = std::chrono::steady_clock::now();
    execute_backward(kernel_ranks(), *plan_, call, options);
    finish_on_device(execution, begin);
  } else if (call.problem.seq_q() > 0) {
    const auto begin = std::chrono::steady_clock::now();
    const RecordedSpan span(options.recorder, StageRecord::Kind::compute);
    attention_backward(call, options.backend);
    synchronize(device_, call.stream);
    execution.compute_seconds = seconds_since(begin);
  }
  account(execution);
}

bool AttentionCall::is_one_backward() const {
  return !idle() && !gradient_plan_ && !plan_ && problem().seq_q() > 0;
}

// Of the keys that all ranks hold, each has the gradients of its share, summed over all queries;
// the others' it leaves as they are.
void AttentionCall::backward_over_blocks(BackwardCall& call, const ExecuteOptions& options) {
  const std::span<const RowRun> runs = gradient_plan_->kv_layout().runs(gradient_plan_->group());
  const Span rows = runs.empty() ? Span{0, 0} : runs.front().global;
  BackwardCall dealt = call;
  dealt.problem.k = call.problem.k.slice(1, rows);
  dealt.problem.v = call.problem.v.slice(1, rows);
  dealt.grad_k = call.grad_k.slice(1, rows);
  dealt.grad_v = call.grad_v.slice(1, rows);
  execute_backward(kernel_ranks(), *gradient_plan_, dealt, options);
}

void AttentionCall::weights(const TensorView& weights) {
  // With the columns of an identity as values, O is P itself: one kernel for both, and dropout,
  // soft cap and masks are right by construction.
  constexpr std::int64_t kColumns = 128;
  if (idle()) return;
  const auto begin = std::chrono::steady_clock::now();
  ForwardCall call;
  call.problem = problem();
  const std::int64_t seq_kv = call.problem.seq_kv();
  const std::int64_t width = std::min(kColumns, seq_kv);
  for (std::int64_t first = 0; first < seq_kv && call.problem.seq_q() > 0; first += width) {
    const Span columns{first, std::min(first + width, seq_kv)};
    Tensor identity(DType::f32, {seq_kv, columns.size()});
    fill_bytes(identity.view().data, Device::cpu, 0, seq_kv * columns.size() * 4);
    float* ones = static_cast<float*>(identity.view().data);
    for (std::int64_t i = 0; i < columns.size(); ++i) {
      ones[(first + i) * columns.size() + i] = 1.0F;
    }
    const Tensor values =
        Tensor::copy_of(std::as_const(identity).view(), call.problem.v.dtype, device_);
    // Every batch row and head sees the same values.
    call.problem.v = {values.view().data,
                      call.problem.v.dtype,
                      {call.problem.batch(), seq_kv, call.problem.kv_heads(), columns.size()},
                      {0, columns.size(), 0, 1},
                      device_};
    call.o = weights.slice(3, columns).transposed(1, 2);
    attention_forward(call, kernel_of(operation_, device_, call.problem, Direction::forward));
    synchronize(device_, call.stream);
  }
  report_.compute_seconds += seconds_since(begin);
}

}  // namespace annulus
