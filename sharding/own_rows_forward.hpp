#pragma once

#include "sharding/execution.hpp"

namespace annulus {

/// The forward pass of ulysses where copy engines move the rows: a rank's own rows are read and
/// written where they lie, and only those of the others change hands.
///
/// First come the own rows of half of the heads, a kernel that waits for the others' keys while it
/// has its own; under it arrive their queries. Then come the others' rows, and last the own rows of
/// the other heads, under which results travel. False where it cannot be done, on all ranks, and
/// then nothing was done. See execute_forward.
bool forward_own_rows_in_place(Communicator& heads, const AttentionPlan& plan,
                               const ForwardCall& local, const ExecuteOptions& options);

}  // namespace annulus
