#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "sharding/communicator.hpp"

// What every communicator must do, whatever carries it; called on all ranks.

namespace annulus::testing {

/// A value that tells sender, receiver, message and position apart.
inline int stamp(int from, int to, int message, int i) {
  const std::int64_t wide = ((std::int64_t{from} * 31 + to) * 1009 + message) * 7919 + i;
  return static_cast<int>(wide % std::numeric_limits<int>::max());
}

inline std::vector<int> message(int from, int to, int number, int length) {
  std::vector<int> values(static_cast<std::size_t>(length));
  for (int i = 0; i < length; ++i) values[static_cast<std::size_t>(i)] = stamp(from, to, number, i);
  return values;
}

/// Length of message `number` between two ranks; some are empty, some span several pieces.
inline int length_of(int from, int to, int number) {
  return (from * 7 + to * 3 + number * 137) % 5 == 0 ? 0
                                                     : (from * 5 + to * 11 + number * 613) % 1500;
}

/// Every rank sends `rounds` messages to every rank, itself included; all are under way at once.
inline void check_exchanges_in_flight(Communicator& c, int rounds) {
  const std::int64_t bytes_before = c.bytes_sent();
  std::int64_t bytes = 0;
  std::vector<std::vector<int>> outgoing;
  std::vector<std::vector<int>> incoming;
  std::vector<std::unique_ptr<Exchange>> exchanges;
  for (int round = 0; round < rounds; ++round) {
    std::vector<Send> sends;
    std::vector<Receive> receives;
    for (int peer = 0; peer < c.size(); ++peer) {
      outgoing.push_back(message(c.rank(), peer, round, length_of(c.rank(), peer, round)));
      incoming.emplace_back(static_cast<std::size_t>(length_of(peer, c.rank(), round)), -1);
      const auto out = static_cast<std::int64_t>(outgoing.back().size() * sizeof(int));
      sends.push_back({peer, outgoing.back().data(), out});
      receives.push_back({peer, incoming.back().data(),
                          static_cast<std::int64_t>(incoming.back().size() * sizeof(int))});
      if (peer != c.rank()) bytes += out;
    }
    exchanges.push_back(c.exchange(sends, receives));
  }
  // Complete in an order of one's own.
  std::mt19937 random(static_cast<unsigned>(c.rank() + 17));
  std::vector<std::size_t> order(exchanges.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  for (const std::size_t i : order) {
    if (i % 2 == 0) {
      while (!exchanges[i]->test()) {
      }
    }
    exchanges[i]->wait();
  }
  for (int round = 0; round < rounds; ++round) {
    for (int peer = 0; peer < c.size(); ++peer) {
      const auto at = static_cast<std::size_t>(round * c.size() + peer);
      EXPECT_EQ(incoming[at], message(peer, c.rank(), round, length_of(peer, c.rank(), round)))
          << "rank " << c.rank() << " of " << c.size() << ", from " << peer << ", round " << round;
    }
  }
  EXPECT_EQ(c.bytes_sent() - bytes_before, bytes);
}

inline void check_all_gather(Communicator& c, std::size_t bytes) {
  std::vector<std::byte> mine(bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    mine[i] = static_cast<std::byte>(static_cast<std::size_t>(c.rank() * 13) + i);
  }
  std::vector<std::byte> all(bytes * static_cast<std::size_t>(c.size()));
  c.all_gather(mine, all);
  for (std::size_t i = 0; i < all.size(); ++i) {
    ASSERT_EQ(all[i], static_cast<std::byte>(i / bytes * 13 + i % bytes)) << "byte " << i;
  }
}

/// The sum is taken in rank order: values of very different sizes show any other order.
inline void check_all_reduce_sum(Communicator& c, std::size_t count) {
  const auto value = [](int rank, std::size_t i) {
    std::mt19937 random(static_cast<unsigned>(rank) * 7919U + static_cast<unsigned>(i));
    const float scale = std::ldexp(1.0F, static_cast<int>(random() % 40) - 20);
    return scale * (static_cast<float>(random() % 20001) - 10000.0F);
  };
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = value(c.rank(), i);
  c.all_reduce_sum(values);
  for (std::size_t i = 0; i < count; ++i) {
    float sum = 0.0F;
    for (int rank = 0; rank < c.size(); ++rank) sum += value(rank, i);
    ASSERT_EQ(sum, values[i]) << "element " << i << " of " << count;
  }
}

/// Odd and even ranks form groups in reverse order, and exchange within them.
inline void check_split(Communicator& c) {
  const std::unique_ptr<Communicator> part = c.split(c.rank() % 2, -c.rank());
  const int members = (c.size() + 1 - c.rank() % 2) / 2;
  ASSERT_EQ(part->size(), members);
  EXPECT_EQ(part->rank(), members - 1 - c.rank() / 2);
  check_exchanges_in_flight(*part, 3);
  check_all_reduce_sum(*part, 5);
}

/// A part is made once for its name.
inline void check_part(Communicator& c) {
  Communicator& part = c.part("parity", c.rank() % 2, c.rank());
  ASSERT_EQ(part.size(), (c.size() + 1 - c.rank() % 2) / 2);
  EXPECT_EQ(part.rank(), c.rank() / 2);
  check_exchanges_in_flight(part, 2);
  // Ranks that would all have to come to a split come to none.
  if (c.rank() == 0) {
    EXPECT_EQ(&c.part("parity", 0, 0), &part);
  }
  EXPECT_NE(&c.part("all", 0, c.rank()), &part);
  EXPECT_EQ(c.part("all", 0, c.rank()).size(), c.size());
}

/// Peers read one's memory in place, again after each fence.
inline void check_window(Communicator& c) {
  const std::unique_ptr<Window> window = c.expose(4 * static_cast<std::int64_t>(sizeof(int)));
  for (int round = 0; round < 3; ++round) {
    const std::vector<int> mine = message(c.rank(), 0, round, 4);
    std::memcpy(window->local(), mine.data(), sizeof(int) * 4);
    window->fence();
    for (int peer = 0; peer < c.size(); ++peer) {
      const void* memory = window->peer(peer);
      if (memory == nullptr) continue;
      std::vector<int> theirs(4);
      std::memcpy(theirs.data(), memory, sizeof(int) * 4);
      EXPECT_EQ(theirs, message(peer, 0, round, 4));
    }
    window->fence();
  }
  EXPECT_EQ(window->peer(c.rank()), window->local());
  // Null says that a peer is on another node, not that its part is empty.
  const std::unique_ptr<Window> uneven = c.expose(c.rank() % 2 * 64);
  for (int peer = 0; peer < c.size(); ++peer) {
    EXPECT_EQ(uneven->peer(peer) == nullptr, window->peer(peer) == nullptr);
  }
}

}  // namespace annulus::testing
