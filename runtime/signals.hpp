#pragma once

namespace annulus {

/// Takes over the signals that end a job, so that each rank says where it was: TERM, USR1: exit
/// status 143, INT: 130, after one line with phase, step and peer; what `on_signal_end` registered
/// runs before. USR2: the last steps are dumped and the work goes on. CONT: a process that stood
/// still for longer than set_stalled_after() waits up to two seconds for the TERM that a launcher
/// sends next. XFSZ is ignored, so that the write fails. SEGV, BUS, FPE, ILL, ABRT: the line, the
/// dump, then the signal's own end, without Open MPI's stack walk, which can hang in the allocator
/// that just broke.
void install_signal_handlers();

/// For a rank among others: who writes to one that has gone gets SIGPIPE, which would end this rank
/// without a word, and were it ignored, MPI would at once. From the first one on such threads wait
/// up to five seconds for the TERM that the launcher sends; then the write fails. A process on its
/// own keeps the signal: `annulus plan | head`.
void hold_at_broken_pipes() noexcept;

/// Adds an async-signal-safe action, such as removing unfinished files; at most eight.
void on_signal_end(void (*action)() noexcept);

/// All ranks have agreed to end with `status` and have said why: a launcher that sees the first of
/// them end sends TERM to the others, which from now on end with that status and without a line.
void set_agreed_end(int status) noexcept;

/// A rank that has waited longer than this dumps its steps when it is told to end: it hung. Of
/// pauses it learns from OperationLog::note_running().
void set_stalled_after(double seconds) noexcept;

}  // namespace annulus
