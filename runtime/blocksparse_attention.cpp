#include "runtime/blocksparse_attention.hpp"

#include "runtime/sequence_attention.hpp"

namespace annulus {

OperationEntry blocksparse_attention() {
  return sequence_attention({"blocksparse", "splash"},
                            "attention under a mask of kept blocks, over the sequence axis",
                            Scheme::ring, "kept blocks, ");
}

}  // namespace annulus
