#include "random_slices.hpp"

#include <algorithm>

namespace annulus {

std::vector<Slice> causal_slices(std::int64_t seq_q, std::int64_t seq_kv) {
  return {{{0, seq_q}, {0, seq_kv}, {-kUnbounded, seq_kv - seq_q}}};
}

std::vector<Slice> random_slices(std::mt19937& random, std::int64_t seq_q, std::int64_t seq_kv) {
  const std::int64_t corner = seq_kv - seq_q;
  const auto some = static_cast<std::int64_t>(random() % 150);
  switch (random() % 7) {
    case 0:
      return {{{0, seq_q}, {0, seq_kv}, {}}};
    case 1:
      return causal_slices(seq_q, seq_kv);
    case 2:
      return {{{0, seq_q}, {0, seq_kv}, {corner - some, corner + some / 3}}};
    case 3:
      return {{{0, seq_q}, {0, seq_kv}, {-kUnbounded, -1 - some}}};  // rows without keys
    case 4:
      return {{{seq_q / 3, seq_q}, {seq_kv / 2, seq_kv}, {}}};
    case 5:  // several slices over a key, as a balanced layout has them
      return {{{0, seq_q / 2}, {0, seq_kv}, {-kUnbounded, corner}},
              {{seq_q / 2, seq_q}, {seq_kv / 5, seq_kv / 2}, {}},
              {{seq_q / 2, seq_q}, {seq_kv / 2, seq_kv}, {-some, some}}};
    default:
      break;
  }
  std::vector<Slice> slices;  // documents of unequal lengths, the last tokens being padding
  const std::int64_t seq = std::min(seq_q, seq_kv);
  for (std::int64_t begin = 0; begin < seq - seq / 8;) {
    const std::int64_t end = std::min(seq, begin + 1 + static_cast<std::int64_t>(random() % 90));
    slices.push_back({{begin, end}, {begin, end}, {-kUnbounded, 0}});
    begin = end;
  }
  return slices;
}

}  // namespace annulus
