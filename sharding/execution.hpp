#pragma once

#include <cstdint>
#include <string_view>

#include "kernels/attention.hpp"
#include "sharding/attention_plan.hpp"
#include "sharding/communicator.hpp"
#include "sharding/stage_recorder.hpp"

namespace annulus {

/// What one execution of a plan cost this rank.
struct ExecutionReport {
  double compute_seconds = 0.0;
  double exposed_seconds = 0.0;     // waiting for transfers, copying and reducing
  std::int64_t bytes_sent = 0;      // payload to other ranks
  std::int64_t bytes_in_place = 0;  // of other ranks, read where they lie
  std::int64_t buffer_bytes = 0;    // most that was held at a time besides the caller's tensors
};

struct ExecuteOptions {
  std::string_view backend;  // as in attention_forward
  /// Ranks of a node read each other's KV where it lies instead of receiving it.
  bool in_place = true;
  /// On devices whose copy engines move the rows, a ring's forward pass is one launch over all
  /// stages instead of one a stage, with room for all stages' rows.
  bool one_launch = true;
  /// Parts of the heads that ulysses and hybrid exchange and compute one after the other; 0: by
  /// size, on devices. As head_parts() has it; not with bias or a dense mask.
  int head_parts = 0;
  ExecutionReport* report = nullptr;  // added to when present
  StageRecorder* recorder = nullptr;  // told when what was done, when present
};

/// Runs `plan` by its scheme: the functions of ring.hpp, all_gather.hpp, ulysses.hpp, hybrid.hpp.
///
/// Every rank of the group calls with the plans of one request and with its own shards. `local`
/// holds this rank's rows in the order of the layouts: q, grad_o and o rows of q_layout, k and v
/// rows of kv_layout, all heads of the request. The mask comes from the plan; `local.problem.mask`
/// and `local.state` are not looked at. Bias, its gradient and the dense mask have this rank's
/// query rows and all key columns in global order. Dropout positions come from the plan; its
/// batch_begin and q_head_begin are the caller's. Gradients are added to; those of sinks are the
/// caller's (attention_sink_gradient over its own rows, summed over the ranks).
/// Throws peer when a transfer fails.
void execute_forward(Communicator& ranks, const AttentionPlan& plan, const ForwardCall& local,
                     const ExecuteOptions& options = {});
void execute_backward(Communicator& ranks, const AttentionPlan& plan, const BackwardCall& local,
                      const ExecuteOptions& options = {});

}  // namespace annulus
