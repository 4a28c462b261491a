#pragma once

#include "sharding/execution.hpp"

namespace annulus {

/// The backward pass of ulysses where copy engines move the rows: a rank's own rows are read and
/// their gradients added where they lie, and only those of the others change hands.
///
/// First come the own rows beside the own keys for half of the heads, under which all else arrives.
/// Then come the others' rows beside all keys, the own rows beside the others' keys, and last the
/// own rows and keys for the other heads, while gradients travel back. False where it cannot be
/// done, on all ranks, and then nothing was done. See execute_backward.
bool backward_own_rows_in_place(Communicator& heads, const AttentionPlan& plan,
                                const BackwardCall& local, const ExecuteOptions& options);

}  // namespace annulus
