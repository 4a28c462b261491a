#include "runtime/watched_peers.hpp"

#include <algorithm>

namespace annulus {
namespace {

constexpr std::int64_t kAskAfter = 8;   // parts of the deadline that pass before the first question
constexpr std::int64_t kAskEvery = 16;  // parts of the deadline between questions
constexpr std::int64_t kSilentAfter = 4;  // parts of the deadline without an answer
constexpr std::size_t kWatched = 32;

}  // namespace

void WatchedPeers::wait_for(std::int64_t step, std::span<const int> peers, std::int64_t since_ns) {
  step_ = step;
  since_ns_ = since_ns;
  peers_.assign(peers.begin(), peers.end());
}

std::vector<int> WatchedPeers::to_ask(std::int64_t now_ns) const {
  std::vector<int> result;
  if (now_ns - since_ns_ < timeout_ns_ / kAskAfter) return result;
  for (const int peer : peers_) {
    const auto found = known_.find(peer);
    const bool due =
        found == known_.end() ||
        (found->second.asked_ns == 0 && now_ns - found->second.heard_ns >= timeout_ns_ / kAskEvery);
    if (due) result.push_back(peer);
  }
  return result;
}

void WatchedPeers::asked(int peer, std::int64_t now_ns) { known_[peer].asked_ns = now_ns; }

void WatchedPeers::answered(int peer, const RankAnswer& answer, std::int64_t now_ns) {
  Peer& entry = known_[peer];
  entry.asked_ns = 0;
  entry.heard_ns = now_ns;
  entry.answer = answer;
}

std::int64_t WatchedPeers::idle_of(int peer, std::int64_t now_ns) const {
  const auto found = known_.find(peer);
  if (found == known_.end() || found->second.heard_ns < since_ns_) return now_ns - since_ns_;
  return found->second.answer.idle_ns + now_ns - found->second.heard_ns;
}

std::int64_t WatchedPeers::idle_ns(std::int64_t waited_ns, std::int64_t now_ns) const {
  std::int64_t worst = 0;
  for (const int peer : peers_) worst = std::max(worst, idle_of(peer, now_ns));
  return peers_.empty() ? waited_ns : std::min(waited_ns, worst);
}

bool WatchedPeers::is_silent(const Peer& peer, std::int64_t now_ns) const {
  return peer.asked_ns != 0 && now_ns - peer.asked_ns > timeout_ns_ / kSilentAfter;
}

WatchedPeers::Suspect WatchedPeers::suspect(std::int64_t now_ns) const {
  Suspect result;
  std::int64_t worst = -1;
  for (const int peer : peers_) {
    const auto found = known_.find(peer);
    if (found == known_.end()) continue;
    const bool silent = is_silent(found->second, now_ns);
    const std::int64_t idle = idle_of(peer, now_ns);
    if (result.silent && !silent) continue;
    if (silent == result.silent && idle <= worst) continue;
    worst = idle;
    result.rank = peer;
    result.silent = silent;
    result.ever_heard = found->second.heard_ns != 0;
    result.silent_ns = now_ns - std::max(found->second.heard_ns, since_ns_);
    result.last = found->second.answer;
  }
  // A peer that answers may itself wait for the one to blame.
  if (result.rank >= 0 && !result.silent && result.last.suspect >= 0) {
    result.through = result.rank;
    result.rank = static_cast<int>(result.last.suspect);
  }
  return result;
}

std::vector<int> ranks_to_watch(std::span<const int> members, int rank) {
  const auto mine = std::find(members.begin(), members.end(), rank);
  std::vector<int> result;
  if (mine == members.end()) return result;
  const auto at = static_cast<std::size_t>(mine - members.begin());
  for (std::size_t i = 1; i < members.size() && result.size() < kWatched; ++i) {
    result.push_back(members[(at + i) % members.size()]);
  }
  return result;
}

}  // namespace annulus
