#include "runtime/ring_attention.hpp"

#include "runtime/sequence_attention.hpp"

namespace annulus {

OperationEntry ring_attention() {
  return sequence_attention({"ring"}, "ring attention over the sequence axis", Scheme::ring);
}

}  // namespace annulus
