#include "runtime/hybrid_attention.hpp"

#include "runtime/sequence_attention.hpp"

namespace annulus {

OperationEntry hybrid_attention() {
  return sequence_attention({"hybrid"},
                            "heads exchanged inside a node, keys and values moved between nodes",
                            Scheme::hybrid);
}

}  // namespace annulus
