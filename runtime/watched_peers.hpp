#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace annulus {

/// What a rank says of itself when a peer that waits for it asks. Sent as bytes.
struct RankAnswer {
  std::array<char, 32> phase{};
  std::array<char, 24> step_name{};
  std::int64_t step = 0;      // the one waited for, or the last
  std::int64_t waiting = 0;   // 1: inside that step; 0: working on its own
  std::int64_t idle_ns = 0;   // since the rank, or one it waits for, last made progress
  std::int64_t suspect = -1;  // whom it waits for in vain; -1: nobody
};

/// Whether a wait has become hopeless, and through whom: pure bookkeeping of asked and answered.
///
/// A wait is justified while every rank waited for moves on: it computes, reads, or waits itself
/// with a reason. So a long computation elsewhere never ends a job, and a stopped process does
/// within one deadline of its last sign of life.
class WatchedPeers {
 public:
  explicit WatchedPeers(std::int64_t timeout_ns) : timeout_ns_(timeout_ns) {}

  /// From now on `peers` are waited for, in a step that began to wait at `since_ns`.
  void wait_for(std::int64_t step, std::span<const int> peers, std::int64_t since_ns);
  std::int64_t step() const { return step_; }
  std::span<const int> peers() const { return peers_; }

  /// Those to ask now: long enough waited for, and no question of ours on its way to them.
  std::vector<int> to_ask(std::int64_t now_ns) const;
  void asked(int peer, std::int64_t now_ns);
  void answered(int peer, const RankAnswer& answer, std::int64_t now_ns);

  /// Nanoseconds for which this wait has had no justification.
  std::int64_t idle_ns(std::int64_t waited_ns, std::int64_t now_ns) const;

  /// The rank to blame for the wait; -1 when nobody is waited for.
  struct Suspect {
    int rank = -1;
    bool silent = false;         // its process does not answer
    std::int64_t silent_ns = 0;  // for how long
    RankAnswer last;             // what it last said, if it ever did
    bool ever_heard = false;
    int through = -1;  // the peer that waits for it in turn; -1: waited for directly
  };
  Suspect suspect(std::int64_t now_ns) const;

 private:
  struct Peer {
    std::int64_t asked_ns = 0;  // 0: no question on its way
    std::int64_t heard_ns = 0;  // 0: never
    RankAnswer answer;
  };

  std::int64_t idle_of(int peer, std::int64_t now_ns) const;
  bool is_silent(const Peer& peer, std::int64_t now_ns) const;

  std::int64_t timeout_ns_;
  std::int64_t step_ = 0;
  std::int64_t since_ns_ = 0;
  std::vector<int> peers_;
  std::map<int, Peer> known_;  // also of earlier waits: a late answer still counts
};

/// Whom to ask in a step of all `members`: the 32 that follow `rank`, so that of any number of
/// ranks each is asked by 32.
std::vector<int> ranks_to_watch(std::span<const int> members, int rank);

}  // namespace annulus
