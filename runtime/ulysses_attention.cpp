#include "runtime/ulysses_attention.hpp"

#include "runtime/sequence_attention.hpp"

namespace annulus {

OperationEntry ulysses_attention() {
  return sequence_attention({"ulysses"}, "heads exchanged against rows along the sequence axis",
                            Scheme::ulysses);
}

}  // namespace annulus
