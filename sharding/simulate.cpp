#include "sharding/simulate.hpp"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

#include "kernels/error.hpp"
#include "sharding/head_parts.hpp"
#include "sharding/memory_model.hpp"
#include "sharding/stage_parts.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kFloatBytes = 4;

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

struct LinkBytes {
  std::int64_t node = 0;
  std::int64_t network = 0;
};

// One rank on its way through its plan.
class RankWalk {
 public:
  RankWalk(AttentionPlan plan, const AttentionSizes& sizes, const Rates& rates, Pass pass)
      : plan_(std::move(plan)), sizes_(sizes), rates_(rates), pass_(pass) {
    timeline_.rank = plan_.rank();
    const bool backward = pass == Pass::backward;
    timeline_.bytes_sent =
        backward ? plan_.backward_bytes(sizes.head_dim, sizes.value_dim, sizes.element_bytes)
                 : plan_.forward_bytes(sizes.head_dim, sizes.value_dim, sizes.element_bytes,
                                       sizes.log_sum_exp);
    timeline_.peak_memory_bytes =
        shard_bytes(plan_, sizes, backward) +
        (backward ? backward_buffer_bytes(plan_, sizes, row_access(rates))
                  : forward_buffer_bytes(plan_, sizes, row_access(rates)));
    for (const Stage& stage : plan_.stages()) stages_[stage.number] = &stage;
    in_place_ = rates.reads_in_place || (rates.one_device && plan_.scheme() != Scheme::all_gather);
    joined_ = reads_all_in_place();
    own_rows_ = rates.hides_node_transfers && computes_own_rows_in_place(plan_, row_access(rates));
    exchange_heads();
    clock_ = timeline_.head_exchange_seconds + share_seconds();
    timeline_.exposed_seconds = clock_;
  }

  const AttentionPlan& plan() const { return plan_; }
  /// One call computes all stages: this rank waits for nobody.
  bool joined() const { return joined_; }
  double clock() const { return clock_; }
  int last_number() const { return stages_.empty() ? 0 : stages_.rbegin()->first; }
  const Stage* stage(int number) const {
    const auto found = stages_.find(number);
    return found == stages_.end() ? nullptr : found->second;
  }

  /// The rows of `number` arrive at `arrival` unless this rank's core has to copy them itself.
  void compute(int number, double transfer_begin, double arrival) {
    const Stage* now = stage(number);
    if (now == nullptr) return;
    const double copied = rates_.hides_node_transfers ? 0.0 : own_copy_seconds(*now);
    const double begin = std::max(clock_, arrival) + copied;
    const double seconds = compute_seconds(*now);
    computed_ = computed_ || !now->slices.slices.empty();
    timeline_.exposed_seconds += begin - clock_;
    timeline_.compute_seconds += seconds;
    clock_ = begin + seconds;
    if (pass_ == Pass::backward && number > 0 && !joined_) {
      const double behind = return_seconds(*now);
      timeline_.exposed_seconds += behind;
      clock_ += behind;
    }
    if (now->slices.slices.empty() && now->receives.empty()) return;
    const LinkBytes bytes = received(*now);
    timeline_.stages.push_back({number, transfer_begin, arrival, begin, begin + seconds,
                                main_peer(*now), bytes.node + bytes.network});
  }

  /// Seconds until a stage's rows have come, once both sides are ready.
  double transfer_seconds(const Stage& stage) const {
    const LinkBytes bytes = received(stage);
    if (bytes.node + bytes.network == 0) return 0.0;
    const double node = static_cast<double>(bytes.node) / rates_.node_bandwidth;
    return rates_.latency_seconds +
           std::max(rates_.hides_node_transfers ? node : 0.0,
                    static_cast<double>(bytes.network) / rates_.network_bandwidth);
  }

  RankTimeline finish() {
    if (pass_ == Pass::backward && joined_) {
      timeline_.exposed_seconds += shared_gradient_seconds();
      clock_ += shared_gradient_seconds();
    }
    // What kernels cannot hide, and what goes on after the last of them.
    const double beside = timeline_.compute_seconds * (1.0 - 1.0 / head_parts_);
    double back = heads_back_seconds_ + std::max(heads_beside_seconds_ - beside, 0.0);
    if (own_rows_) back = others_seconds();
    timeline_.exposed_seconds += back;
    timeline_.seconds = clock_ + back;
    return std::move(timeline_);
  }

  void wait_until(double time) {
    if (time <= clock_) return;
    timeline_.exposed_seconds += time - clock_;
    clock_ = time;
  }

  bool same_node(int group) const {
    const int peer = group * plan_.head_ranks() + plan_.head_rank();
    return peer / rates_.node_ranks == plan_.rank() / rates_.node_ranks;
  }

 private:
  bool reads_all_in_place() const {
    if (rates_.one_device) {
      return is_one_call_on_one_device(plan_, sizes_, pass_ == Pass::backward);
    }
    if (pass_ == Pass::backward || !rates_.reads_in_place) return false;
    if (sizes_.head_dim != sizes_.value_dim || !joins_stages(plan_)) return false;
    for (int group = 0; group < plan_.groups(); ++group) {
      if (!same_node(group)) return false;
    }
    return true;
  }

  std::int64_t kv_row_elements() const {
    return plan_.kv_heads_of(plan_.head_rank()).size() * (sizes_.head_dim + sizes_.value_dim);
  }

  template <typename BytesOfRow>
  LinkBytes bytes_of(std::span<const Transfer> transfers, BytesOfRow bytes_of_row) const {
    LinkBytes bytes;
    for (const Transfer& transfer : transfers) {
      if (transfer.peer == plan_.group()) continue;
      const std::int64_t moved = transfer.rows(plan_.request().batch) * bytes_of_row(transfer.peer);
      (same_node(transfer.peer) ? bytes.node : bytes.network) += moved;
    }
    return bytes;
  }

  LinkBytes row_bytes_of(std::span<const Transfer> transfers) const {
    return bytes_of(transfers,
                    [&](int /*peer*/) { return kv_row_elements() * sizes_.element_bytes; });
  }

  // Partial gradients of a row: one, or one for each node of a grid of queries.
  std::int64_t partial_row_bytes(int group) const {
    const std::int64_t copies = plan_.request().q_block_rows > 0
                                    ? static_cast<std::int64_t>(plan_.gradient_nodes(group).size())
                                    : 1;
    return copies * plan_.gradient_heads() * (sizes_.head_dim + sizes_.value_dim) * kFloatBytes;
  }
  LinkBytes partials_in(const Stage& stage) const {
    return bytes_of(stage.sends, [&](int peer) { return partial_row_bytes(peer); });
  }
  LinkBytes partials_out(const Stage& stage) const {
    const std::int64_t row = partial_row_bytes(plan_.group());
    return bytes_of(stage.receives, [row](int /*peer*/) { return row; });
  }

  // What is moved for a stage: rows that are read in place are not.
  LinkBytes received(const Stage& stage) const {
    LinkBytes bytes = row_bytes_of(stage.receives);
    if (in_place_) bytes.node = 0;
    return bytes;
  }

  double own_copy_seconds(const Stage& stage) const {
    return static_cast<double>(received(stage).node) / rates_.node_bandwidth;
  }

  // Partials that others computed for this rank's rows, added from where they lie or after they
  // came, and clearing its own.
  double return_seconds(const Stage& stage) const {
    const LinkBytes in = partials_in(stage);
    const LinkBytes out = partials_out(stage);
    double seconds = static_cast<double>(out.node + out.network) / rates_.copy_bandwidth;
    seconds += 2.0 * static_cast<double>(in.node + in.network) / rates_.copy_bandwidth;
    if (!rates_.hides_node_transfers && !rates_.reads_in_place)
      seconds += static_cast<double>(in.node) / rates_.node_bandwidth;
    return seconds;
  }

  std::int64_t own_kv_elements() const {
    return plan_.request().batch * plan_.kv_layout().rows(plan_.group()) * kv_row_elements();
  }

  // A window holds a copy of the rows that others read.
  double share_seconds() const {
    if (!in_place_ || plan_.groups() == 1) return 0.0;
    return static_cast<double>(own_kv_elements() * sizes_.element_bytes) / rates_.copy_bandwidth;
  }

  // Gradients to which all ranks add where they lie: cleared, and added to this rank's own.
  double shared_gradient_seconds() const {
    return 2.0 * static_cast<double>(own_kv_elements() * kFloatBytes) / rates_.copy_bandwidth;
  }

  double compute_seconds(const Stage& stage) const {
    if (stage.slices.slices.empty()) return 0.0;
    const std::int64_t copies = stage.slices.batch_offsets.empty() ? plan_.request().batch : 1;
    const bool forward = pass_ == Pass::forward;
    TileWork work;
    for (const Slice& slice : stage.slices.slices) {
      const TileWork more = forward ? tile_work(slice, rates_.tile_rows)
                                    : backward_tile_work(slice, rates_.tile_rows);
      work.pairs += copies * more.pairs;
      work.tiles += copies * more.tiles;
    }
    const double flops =
        forward ? forward_flops(work.pairs, sizes_) : backward_flops(work.pairs, sizes_);
    const double rate = forward ? rates_.forward_flops : rates_.backward_flops;
    const double tile = forward ? rates_.forward_tile_seconds : rates_.backward_tile_seconds;
    const auto heads = static_cast<double>(plan_.q_heads_of(plan_.head_rank()).size());
    const double seconds = heads * (flops / rate + tile * static_cast<double>(work.tiles));
    if (computed_ && (joined_ || (forward && launches_once()))) return seconds;
    return seconds + calls() * rates_.call_seconds + (forward ? resume_seconds() : 0.0);
  }

  // All-gather computes KV head by KV head.
  double calls() const {
    if (own_rows_) return pass_ == Pass::forward ? 3.0 : 4.0;
    const bool by_head = plan_.scheme() == Scheme::all_gather;
    return by_head ? static_cast<double>(plan_.request().kv_heads) : head_parts_;
  }

  // A stage after the first writes the running state that it has read.
  double resume_seconds() const {
    if (joined_ || !computed_ || launches_once()) return 0.0;
    const auto rows =
        static_cast<double>(plan_.request().batch * plan_.q_layout().rows(plan_.group()) *
                            plan_.q_heads_of(plan_.head_rank()).size());
    return rows * static_cast<double>(sizes_.value_dim * kFloatBytes) / rates_.copy_bandwidth;
  }
  bool launches_once() const {
    return rates_.one_launch && plan_.scheme() != Scheme::all_gather &&
           plan_.request().block_rows == 0;
  }

  // Everything that the heads trade, in and out: packed, moved, and unpacked. Of some parts all but
  // the first part's way in and the last one's way back go on beside kernels.
  void exchange_heads() {
    if (plan_.head_ranks() == 1) return;
    if (own_rows_) {
      const auto sent = static_cast<double>(timeline_.bytes_sent) - result_bytes();
      timeline_.head_exchange_seconds = sent / rates_.copy_bandwidth;  // to pack
      return;
    }
    std::int64_t stage_bytes = 0;
    for (const Stage& stage : plan_.stages()) {
      const LinkBytes sent = row_bytes_of(stage.sends);
      stage_bytes += sent.node + sent.network;
      if (pass_ == Pass::forward) continue;
      const LinkBytes back = partials_out(stage);
      stage_bytes += back.node + back.network;
    }
    if (rates_.hides_node_transfers) head_parts_ = choose_head_parts(plan_, sizes_);
    const auto bytes = static_cast<double>(timeline_.bytes_sent - stage_bytes);
    const bool inside = plan_.head_ranks() <= rates_.node_ranks;
    const double moving = bytes / (inside ? rates_.node_bandwidth : rates_.network_bandwidth);
    heads_beside_seconds_ = moving * (1.0 - 1.0 / head_parts_);
    const double exposed = moving / head_parts_ + 2.0 * bytes / rates_.copy_bandwidth;
    // Forward: q, k, v in and O out. Backward: q, k, v, dO in and fp32 dQ, dK, dV out.
    const double back_share = pass_ == Pass::forward ? 1.0 / 3.0 : 0.5;
    heads_back_seconds_ = exposed * back_share + rates_.latency_seconds;
    timeline_.head_exchange_seconds = exposed * (1.0 - back_share) + rates_.latency_seconds;
  }

  // What a rank computed of the others' rows: O and LSE, or dQ, dK and dV in fp32.
  double result_bytes() const {
    const PlanRequest& request = plan_.request();
    const auto others = [&](const SequenceLayout& layout) {
      return static_cast<double>(request.batch * (layout.seq() - layout.rows(plan_.rank())));
    };
    const auto heads = static_cast<double>(plan_.q_heads_of(plan_.head_rank()).size());
    const double rows = others(request.q_layout) * heads;
    if (pass_ == Pass::forward) {
      return rows * static_cast<double>(sizes_.value_dim * sizes_.element_bytes + kFloatBytes);
    }
    return rows * static_cast<double>(sizes_.head_dim * kFloatBytes) +
           others(request.kv_layout) * static_cast<double>(kv_row_elements() * kFloatBytes);
  }

  // Own rows of half of the heads are computed first, while the others' come, and of the other half
  // last, while results return: what lasts longer, and what is copied or added before and after.
  double others_seconds() const {
    const double ranks = plan_.head_ranks();
    const double results = result_bytes();
    const bool forward = pass_ == Pass::forward;
    // Backward only beside the own keys.
    const double first = timeline_.compute_seconds / (2.0 * ranks * (forward ? 1.0 : ranks));
    const double last =
        forward ? first : timeline_.compute_seconds * (1.0 / ranks - 0.5 / (ranks * ranks));
    const bool inside = plan_.head_ranks() <= rates_.node_ranks;
    const double bandwidth = inside ? rates_.node_bandwidth : rates_.network_bandwidth;
    const double coming = (static_cast<double>(timeline_.bytes_sent) - results) / bandwidth;
    return std::max(rates_.latency_seconds + coming - first, 0.0) +
           std::max(rates_.latency_seconds + results / bandwidth - last, 0.0) +
           (forward ? 2.0 : 3.0) * results / rates_.copy_bandwidth;
  }

  int main_peer(const Stage& stage) const {
    int peer = plan_.rank();
    std::int64_t most = 0;
    for (const Transfer& transfer : stage.receives) {
      const std::int64_t rows = transfer.rows(1);
      if (rows <= most) continue;
      most = rows;
      peer = transfer.peer * plan_.head_ranks() + plan_.head_rank();
    }
    return peer;
  }

  AttentionPlan plan_;
  const AttentionSizes& sizes_;
  const Rates& rates_;
  Pass pass_;
  std::map<int, const Stage*> stages_;
  RankTimeline timeline_;
  double clock_ = 0.0;
  int head_parts_ = 1;
  double heads_back_seconds_ = 0.0;
  double heads_beside_seconds_ = 0.0;  // moving, while parts are computed
  bool in_place_ = false;              // rows of the node are read where they lie
  bool joined_ = false;
  bool own_rows_ = false;  // are read and written where they lie
  bool computed_ = false;  // a stage before
};

std::vector<int> followed_ranks(const PlanRequest& request, int head_ranks,
                                const std::vector<std::int64_t>& area) {
  const int ranks = request.q_layout.ranks();
  std::vector<int> followed;
  if (ranks <= Simulation::kTimelines) {
    followed.resize(index(ranks));
    std::iota(followed.begin(), followed.end(), 0);
    return followed;
  }
  const auto most = std::max_element(area.begin(), area.end()) - area.begin();
  const auto least = std::min_element(area.begin(), area.end()) - area.begin();
  followed = {static_cast<int>(most) * head_ranks, static_cast<int>(least) * head_ranks};
  constexpr int kBetween = 6;
  for (int i = 0; i <= kBetween; ++i) followed.push_back((ranks - 1) * i / kBetween);
  std::sort(followed.begin(), followed.end());
  followed.erase(std::unique(followed.begin(), followed.end()), followed.end());
  return followed;
}

// Stage by stage: a transfer starts when both ends have reached the stage before it, and a sender
// goes on when its rows have gone.
void walk(std::vector<RankWalk>& walks) {
  int last = 0;
  std::map<int, std::size_t> walk_of_rank;
  for (std::size_t i = 0; i < walks.size(); ++i) {
    last = std::max(last, walks[i].last_number());
    walk_of_rank[walks[i].plan().rank()] = i;
  }
  std::vector<double> begin(walks.size(), 0.0);  // of each rank's stage before
  for (int number = 0; number <= last; ++number) {
    std::vector<double> start(walks.size());
    std::vector<double> arrival(walks.size(), 0.0);
    std::vector<double> sent(walks.size(), 0.0);
    for (std::size_t i = 0; i < walks.size(); ++i) {
      start[i] = begin[i];
      const Stage* stage = walks[i].stage(number);
      if (stage == nullptr || number == 0 || walks[i].joined()) continue;
      std::vector<std::size_t> senders;
      for (const Transfer& transfer : stage->receives) {
        const AttentionPlan& plan = walks[i].plan();
        const auto sender = walk_of_rank.find(transfer.peer * plan.head_ranks() + plan.head_rank());
        if (sender == walk_of_rank.end()) continue;
        start[i] = std::max(start[i], begin[sender->second]);
        senders.push_back(sender->second);
      }
      arrival[i] = start[i] + walks[i].transfer_seconds(*stage);
      for (const std::size_t sender : senders) sent[sender] = std::max(sent[sender], arrival[i]);
    }
    for (std::size_t i = 0; i < walks.size(); ++i) {
      walks[i].wait_until(sent[i]);
      begin[i] = walks[i].clock();
      walks[i].compute(number, start[i], arrival[i]);
    }
  }
}

// Rows times heads that one exchange of heads sends, over all ranks: each rank's rows go to the
// other ranks of its group.
std::int64_t head_rows_sent(const AttentionPlan& plan, const SequenceLayout& layout,
                            Span (AttentionPlan::*heads_of)(int) const) {
  std::int64_t sent = 0;
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    for (int j = 0; j < plan.head_ranks(); ++j) {
      if (j != rank % plan.head_ranks()) sent += layout.rows(rank) * (plan.*heads_of)(j).size();
    }
  }
  return sent * plan.request().batch;
}

void add_traffic(const AttentionPlan& plan, const GroupShares& shares, const AttentionSizes& sizes,
                 const Rates& rates, Pass pass, Simulation& simulation) {
  const PlanRequest& request = plan.request();
  const bool backward = pass == Pass::backward;
  const std::int64_t dims = sizes.head_dim + sizes.value_dim;
  std::int64_t kv_heads = 0;
  for (int j = 0; j < plan.head_ranks(); ++j) kv_heads += plan.kv_heads_of(j).size();
  const std::int64_t row_bytes =
      kv_heads * dims * (sizes.element_bytes + (backward ? kFloatBytes : 0));
  for (std::size_t group = 0; group < shares.rows_received.size(); ++group) {
    simulation.bytes_sent += shares.rows_received[group] * row_bytes;
    simulation.network_bytes_sent += shares.rows_from_network[group] * row_bytes;
  }
  const std::int64_t q = head_rows_sent(plan, request.q_layout, &AttentionPlan::q_heads_of);
  const std::int64_t kv = head_rows_sent(plan, request.kv_layout, &AttentionPlan::kv_heads_of);
  std::int64_t bytes = (q + kv) * dims * sizes.element_bytes;
  if (backward) bytes += q * (sizes.head_dim + 2) * kFloatBytes + kv * dims * kFloatBytes;
  if (!backward && sizes.log_sum_exp) bytes += q * kFloatBytes;
  simulation.bytes_sent += bytes;
  if (plan.head_ranks() > rates.node_ranks) simulation.network_bytes_sent += bytes;
}

std::vector<int> divisors(int n) {
  std::vector<int> all;
  for (int d = 1; d <= n; ++d) {
    if (n % d == 0) all.push_back(d);
  }
  return all;
}

}  // namespace

Simulation simulate(const std::shared_ptr<const PlanRequest>& request, const AttentionSizes& sizes,
                    const Rates& rates, Pass pass) {
  Simulation simulation;
  const AttentionPlan first(request, 0);
  const GroupShares shares =
      group_shares(first.q_layout(), first.kv_layout(), request->mask, request->batch,
                   std::max(rates.node_ranks / first.head_ranks(), 1));
  simulation.imbalance = imbalance(shares.area);
  const std::int64_t area =
      std::accumulate(shares.area.begin(), shares.area.end(), std::int64_t{0});
  simulation.flops =
      static_cast<double>(request->q_heads) *
      (pass == Pass::forward ? forward_flops(area, sizes) : backward_flops(area, sizes));
  const std::vector<int> followed = followed_ranks(*request, first.head_ranks(), shares.area);
  std::vector<RankWalk> walks;
  walks.reserve(followed.size());
  for (const int rank : followed) {
    walks.emplace_back(AttentionPlan(request, rank), sizes, rates, pass);
  }
  walk(walks);
  for (RankWalk& walk : walks) {
    simulation.timelines.push_back(walk.finish());
    const RankTimeline& timeline = simulation.timelines.back();
    simulation.seconds = std::max(simulation.seconds, timeline.seconds);
    simulation.peak_memory_bytes =
        std::max(simulation.peak_memory_bytes, timeline.peak_memory_bytes);
  }
  add_traffic(first, shares, sizes, rates, pass, simulation);
  return simulation;
}

std::shared_ptr<const PlanRequest> choose_scheme(const PlanRequest& request,
                                                 const AttentionSizes& sizes, const Rates& rates,
                                                 bool backward) {
  std::shared_ptr<const PlanRequest> best;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](Scheme scheme, int node_ranks) {
    auto candidate = std::make_shared<PlanRequest>(request);
    candidate->scheme = scheme;
    candidate->node_ranks = node_ranks;
    double seconds = simulate(candidate, sizes, rates, Pass::forward).seconds;
    if (backward) seconds += simulate(candidate, sizes, rates, Pass::backward).seconds;
    if (seconds >= least) return;
    least = seconds;
    best = candidate;
  };
  const int ranks = request.q_layout.ranks();
  consider(Scheme::ring, 1);
  if (ranks == 1) return best;
  consider(Scheme::all_gather, 1);
  if (ranks <= request.q_heads) consider(Scheme::ulysses, 1);
  for (const int node_ranks : divisors(std::min(rates.node_ranks, ranks))) {
    const bool divides = node_ranks > 1 && node_ranks < ranks && ranks % node_ranks == 0;
    if (divides && node_ranks <= request.q_heads) consider(Scheme::hybrid, node_ranks);
  }
  return best;
}

}  // namespace annulus
