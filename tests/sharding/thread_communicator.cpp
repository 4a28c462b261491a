#include "tests/sharding/thread_communicator.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/error.hpp"

namespace annulus::testing {
namespace {

/// Thrown by the ranks that did nothing wrong themselves.
class OtherRankFailed : public Error {
 public:
  explicit OtherRankFailed(const std::string& reason) : Error(ExitCode::peer, reason) {}
};

/// What all groups of one run share: one lock, and the first failure.
struct World {
  ThreadRanksOptions options;
  std::mutex mutex;
  std::condition_variable changed;
  bool failed = false;
  std::string reason;

  void fail(const std::string& why) {
    if (failed) return;
    failed = true;
    reason = why;
    changed.notify_all();
  }

  template <typename Predicate>
  void wait(std::unique_lock<std::mutex>& lock, const std::string& what, Predicate done) {
    const auto limit = std::chrono::milliseconds(options.timeout_ms);
    const bool in_time = changed.wait_for(lock, limit, [&] { return failed || done(); });
    if (in_time && !failed) return;
    const bool first = !failed;
    if (first) fail(fmt::format("{} for {} ms", what, options.timeout_ms));
    if (first) throw Error(ExitCode::peer, reason);
    throw OtherRankFailed(reason);
  }
};

/// A message between two ranks, from the moment that one side has posted it.
struct Transfer {
  const void* from = nullptr;
  void* to = nullptr;
  std::int64_t bytes = 0;
  bool copied = false;

  bool matched() const { return from != nullptr && to != nullptr; }
  void copy() {
    if (!copied) std::memcpy(to, from, static_cast<std::size_t>(bytes));
    copied = true;
  }
};

using TransferPointer = std::shared_ptr<Transfer>;

/// What a rank brings to a collective call.
struct Contribution {
  std::string call;
  std::size_t bytes = 0;
  const void* data = nullptr;
};

struct Group {
  Group(std::shared_ptr<World> world_, std::vector<int> nodes_)
      : world(std::move(world_)),
        nodes(std::move(nodes_)),
        contributions(nodes.size()),
        posted(nodes.size() * nodes.size()) {}

  int size() const { return static_cast<int>(nodes.size()); }

  void barrier(std::unique_lock<std::mutex>& lock, int rank, const std::string& call) {
    const std::uint64_t mine = generation;
    if (++arrived == size()) {
      arrived = 0;
      ++generation;
      world->changed.notify_all();
      return;
    }
    world->wait(lock, fmt::format("rank {} of {} waited in {}", rank, size(), call),
                [&] { return generation != mine; });
  }

  /// Every rank contributes, then `read` sees all contributions, then all go on.
  template <typename Read>
  void meet(int rank, const Contribution& mine, Read read) {
    std::unique_lock lock(world->mutex);
    contributions[static_cast<std::size_t>(rank)] = mine;
    barrier(lock, rank, mine.call);
    for (int other = 0; other < size(); ++other) {
      const Contribution& theirs = contributions[static_cast<std::size_t>(other)];
      if (theirs.call == mine.call && theirs.bytes == mine.bytes) continue;
      const std::string why =
          fmt::format("rank {} calls {} with {} bytes while rank {} calls {} with {} bytes", rank,
                      mine.call, mine.bytes, other, theirs.call, theirs.bytes);
      world->fail(why);
      throw Error(ExitCode::internal, why);
    }
    read(contributions);
    barrier(lock, rank, mine.call);
  }

  /// Joins this side of a message with the oldest one that the other side has posted.
  TransferPointer post(int from, int to, const Transfer& half) {
    std::deque<TransferPointer>& queue =
        posted[static_cast<std::size_t>(from) * nodes.size() + static_cast<std::size_t>(to)];
    const bool is_send = half.from != nullptr;
    if (queue.empty() || (queue.front()->from != nullptr) == is_send) {
      queue.push_back(std::make_shared<Transfer>(half));
      return queue.back();
    }
    TransferPointer whole = queue.front();
    queue.pop_front();
    if (whole->bytes != half.bytes) {
      const std::string why =
          fmt::format("rank {} sends {} bytes, rank {} receives {}", from,
                      is_send ? half.bytes : whole->bytes, to, is_send ? whole->bytes : half.bytes);
      world->fail(why);
      throw Error(ExitCode::internal, why);
    }
    if (is_send) {
      whole->from = half.from;
    } else {
      whole->to = half.to;
    }
    world->changed.notify_all();
    return whole;
  }

  std::shared_ptr<World> world;
  std::vector<int> nodes;  // of each rank
  std::vector<Contribution> contributions;
  std::vector<std::deque<TransferPointer>> posted;  // [from, to], waiting for the other side
  int arrived = 0;
  std::uint64_t generation = 0;
};

/// Sleeps now and then, as a loaded machine would.
class Delay {
 public:
  Delay(std::uint64_t seed, int rank)
      : on_(seed != 0), random_(seed * 8191 + std::uint64_t(rank)) {}
  void operator()() {
    if (on_ && random_() % 2 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(random_() % 200));
    }
  }
  bool says_no() { return on_ && random_() % 2 == 0; }

 private:
  bool on_;
  std::mt19937_64 random_;
};

class ThreadExchange final : public Exchange {
 public:
  ThreadExchange(std::shared_ptr<Group> group, int rank, Delay& delay,
                 std::vector<TransferPointer> transfers)
      : group_(std::move(group)), rank_(rank), delay_(delay), transfers_(std::move(transfers)) {}

  ~ThreadExchange() override {
    const std::unique_lock lock(group_->world->mutex);
    for (const TransferPointer& transfer : transfers_) {
      if (transfer->matched()) transfer->copy();
    }
    if (complete()) return;
    for (auto& queue : group_->posted) {
      std::erase_if(queue, [&](const TransferPointer& waiting) {
        return std::find(transfers_.begin(), transfers_.end(), waiting) != transfers_.end();
      });
    }
    if (std::uncaught_exceptions() > 0) return;
    group_->world->fail(fmt::format("rank {} dropped an exchange before it was complete", rank_));
  }

  bool test() override {
    delay_();
    const std::unique_lock lock(group_->world->mutex);
    if (group_->world->failed) throw OtherRankFailed(group_->world->reason);
    if (delay_.says_no() || !complete()) return false;
    copy();
    return true;
  }

  void wait(Stream) override {
    delay_();
    std::unique_lock lock(group_->world->mutex);
    group_->world->wait(lock,
                        fmt::format("rank {} waited for {} transfers", rank_, transfers_.size()),
                        [&] { return complete(); });
    copy();
  }

 private:
  bool complete() const {
    return std::all_of(transfers_.begin(), transfers_.end(),
                       [](const TransferPointer& transfer) { return transfer->matched(); });
  }
  void copy() {
    for (const TransferPointer& transfer : transfers_) transfer->copy();
  }

  std::shared_ptr<Group> group_;
  int rank_;
  Delay& delay_;
  std::vector<TransferPointer> transfers_;
};

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<Group> group, int rank)
      : group_(std::move(group)), rank_(rank), delay_(group_->world->options.delay_seed, rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  std::unique_ptr<Communicator> split(int color, int key) override;
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override;
  void all_reduce_sum(std::span<float> values) override;
  std::unique_ptr<Window> expose(std::int64_t bytes, std::int64_t granule) override;

 protected:
  std::unique_ptr<Exchange> start(std::span<const Send> sends, std::span<const Receive> receives,
                                  Stream stream) override;

 private:
  std::shared_ptr<Group> group_;
  int rank_;
  Delay delay_;
};

std::unique_ptr<Exchange> ThreadCommunicator::start(std::span<const Send> sends,
                                                    std::span<const Receive> receives, Stream) {
  delay_();
  std::vector<TransferPointer> transfers;
  const std::unique_lock lock(group_->world->mutex);
  if (group_->world->failed) throw OtherRankFailed(group_->world->reason);
  for (const Receive& receive : receives) {
    std::memset(receive.data, 0xFF, static_cast<std::size_t>(receive.bytes));
    transfers.push_back(
        group_->post(receive.peer, rank_, {nullptr, receive.data, receive.bytes, false}));
  }
  for (const Send& send : sends) {
    transfers.push_back(group_->post(rank_, send.peer, {send.data, nullptr, send.bytes, false}));
  }
  return std::make_unique<ThreadExchange>(group_, rank_, delay_, std::move(transfers));
}

std::unique_ptr<Communicator> ThreadCommunicator::split(int color, int key) {
  delay_();
  struct Member {
    int color, key, rank;
  };
  const Member mine{color, key, rank_};
  std::vector<Member> members;
  group_->meet(rank_, {"split", sizeof mine, &mine}, [&](const auto& contributions) {
    for (const Contribution& theirs : contributions) {
      const auto& member = *static_cast<const Member*>(theirs.data);
      if (member.color == color) members.push_back(member);
    }
  });
  std::stable_sort(members.begin(), members.end(),
                   [](const Member& a, const Member& b) { return a.key < b.key; });
  std::vector<int> nodes;
  int new_rank = 0;
  for (const Member& member : members) {
    if (member.rank == rank_) new_rank = static_cast<int>(nodes.size());
    nodes.push_back(group_->nodes[static_cast<std::size_t>(member.rank)]);
  }
  // The first member's group is everybody's.
  std::shared_ptr<Group> group = std::make_shared<Group>(group_->world, nodes);
  const std::shared_ptr<Group> own = group;
  group_->meet(rank_, {"split", sizeof group, &own}, [&](const auto& contributions) {
    const auto leader = static_cast<std::size_t>(members.front().rank);
    group = *static_cast<const std::shared_ptr<Group>*>(contributions[leader].data);
  });
  return std::make_unique<ThreadCommunicator>(std::move(group), new_rank);
}

void ThreadCommunicator::all_gather(std::span<const std::byte> mine, std::span<std::byte> all) {
  delay_();
  require(all.size() == mine.size() * static_cast<std::size_t>(size()), ExitCode::internal,
          "all_gather: {} bytes from each of {} ranks do not make {}", mine.size(), size(),
          all.size());
  group_->meet(rank_, {"all_gather", mine.size(), mine.data()}, [&](const auto& contributions) {
    std::byte* to = all.data();
    for (const Contribution& theirs : contributions) {
      if (!mine.empty()) std::memmove(to, theirs.data, theirs.bytes);
      to += mine.size();
    }
  });
}

void ThreadCommunicator::all_reduce_sum(std::span<float> values) {
  delay_();
  std::vector<float> sum(values.size(), 0.0F);
  group_->meet(rank_, {"all_reduce_sum", values.size_bytes(), values.data()},
               [&](const auto& contributions) {
                 for (const Contribution& theirs : contributions) {
                   const float* from = static_cast<const float*>(theirs.data);
                   for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += from[i];
                 }
               });
  std::copy(sum.begin(), sum.end(), values.begin());
}

constexpr std::int64_t kWindowAlignment = 64;  // of shared memory at least

/// The windows of all ranks, side by side, as those of one node's processes.
struct SharedBytes {
  SharedBytes(std::int64_t stride_, int ranks)
      : stride(stride_), data(static_cast<std::size_t>(stride_ * ranks), std::byte{0xFF}) {}
  std::int64_t stride;
  std::vector<std::byte> data;
};

class ThreadWindow final : public Window {
 public:
  ThreadWindow(std::shared_ptr<Group> group, int rank, std::shared_ptr<SharedBytes> bytes)
      : group_(std::move(group)), rank_(rank), bytes_(std::move(bytes)) {}

  void* local() override { return bytes_->data.data() + rank_ * bytes_->stride; }
  const void* peer(int peer) const override {
    const auto& nodes = group_->nodes;
    const bool near =
        nodes.at(static_cast<std::size_t>(peer)) == nodes[static_cast<std::size_t>(rank_)];
    return near ? bytes_->data.data() + peer * bytes_->stride : nullptr;
  }
  std::int64_t stride() const override { return bytes_->stride; }
  void fence(Stream /*stream*/) override {
    group_->meet(rank_, {"fence", 0, nullptr}, [](const auto&) {});
  }

 private:
  std::shared_ptr<Group> group_;
  int rank_;
  std::shared_ptr<SharedBytes> bytes_;
};

std::unique_ptr<Window> ThreadCommunicator::expose(std::int64_t bytes, std::int64_t granule) {
  delay_();
  std::int64_t stride = 1;
  group_->meet(rank_, {"expose", sizeof bytes, &bytes}, [&](const auto& contributions) {
    for (const Contribution& theirs : contributions) {
      stride = std::max(stride, *static_cast<const std::int64_t*>(theirs.data));
    }
  });
  // A gap, so that nobody takes the next rank's rows for its own.
  const std::int64_t unit = std::lcm(granule, kWindowAlignment);
  stride = (stride / unit + 2) * unit;
  auto shared = rank_ == 0 ? std::make_shared<SharedBytes>(stride, size()) : nullptr;
  const std::shared_ptr<SharedBytes> own = shared;
  group_->meet(rank_, {"expose", sizeof own, &own}, [&](const auto& contributions) {
    shared = *static_cast<const std::shared_ptr<SharedBytes>*>(contributions.front().data);
  });
  return std::make_unique<ThreadWindow>(group_, rank_, std::move(shared));
}

struct Outcome {
  std::exception_ptr exception;
  std::string message;
  bool secondary = false;
};

Outcome run_one(const std::shared_ptr<Group>& group, int rank,
                const std::function<void(Communicator&)>& body) {
  Outcome outcome;
  try {
    ThreadCommunicator communicator(group, rank);
    body(communicator);
    return outcome;
  } catch (const OtherRankFailed& error) {
    outcome = {std::current_exception(), error.what(), true};
  } catch (const std::exception& error) {
    outcome = {std::current_exception(), error.what(), false};
  } catch (...) {
    outcome = {std::current_exception(), "an exception that is no std::exception", false};
  }
  const std::unique_lock lock(group->world->mutex);
  group->world->fail(fmt::format("rank {}: {}", rank, outcome.message));
  return outcome;
}

}  // namespace

void run_ranks(int ranks, const std::function<void(Communicator&)>& body,
               const ThreadRanksOptions& options) {
  const auto world = std::make_shared<World>();
  world->options = options;
  std::vector<int> nodes(static_cast<std::size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank) {
    nodes[static_cast<std::size_t>(rank)] =
        options.ranks_per_node > 0 ? rank / options.ranks_per_node : 0;
  }
  const auto group = std::make_shared<Group>(world, nodes);
  std::vector<Outcome> outcomes(nodes.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back(
        [&, rank] { outcomes[static_cast<std::size_t>(rank)] = run_one(group, rank, body); });
  }
  for (std::thread& thread : threads) thread.join();

  std::exception_ptr cause;
  std::exception_ptr any;
  for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
    const Outcome& outcome = outcomes[rank];
    if (!outcome.exception) continue;
    fmt::print(stderr, "rank {} of {}: {}\n", rank, ranks, outcome.message);
    any = outcome.exception;
    if (!outcome.secondary && !cause) cause = outcome.exception;
  }
  if (cause) std::rethrow_exception(cause);
  if (any) std::rethrow_exception(any);
  if (world->failed) throw Error(ExitCode::internal, world->reason);
}

}  // namespace annulus::testing
