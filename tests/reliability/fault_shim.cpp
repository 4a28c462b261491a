// A library to preload into a rank: it counts the calls of MPI, of file output or of large
// allocations and lets one of them go wrong.
//
//   F_RANK=2        the rank it happens on; without it on every rank
//   F_CALL=7        the call of MPI by the main thread, from 1
//   F_WRITE=3       the same for calls that change files below F_FOLDER (pwritev, fsync, ftruncate,
//                   linkat, renameat, unlinkat)
//   F_NCCL=error|stuck|stop|kill  at the first group of NCCL transfers; error: from then on NCCL
//                   reports a system error; stuck: ncclCommAbort does not return either
//   F_FILE_SIZE=100000  a limit on the size of files from the first such call on
//   F_ALLOCATION=5  the same for allocations of at least F_BYTES (default 65536) outside of
//                   MPI's own calls; it fails
//   F_ACT=kill|torn|stop|term|segv|pipe|delay|jitter|flip|ENOSPC|EIO|EFBIG
//                   torn: SIGKILL after half a write, or right after another call that changes
//                   files; flip: one bit of the first message, sent or received, that this call of
//                   MPI or a later one has; pipe: a write to a pipe that nobody reads any more, as
//                   to the socket of a dead rank
//   F_DELAY_MS=100  how long delay sleeps; jitter sleeps a random part of it at every call
//   F_SEED=1        of jitter, and of the bit that flips
//   F_ONCE=FILE     only the first time: the fault makes this file
//   F_AT=FILE       gets the nanoseconds of the steady clock at which the fault happened
//   F_READY=FILE    FILE.RANK appears at the fifth call of MPI
//   F_COUNTS=FILE   FILE.RANK gets "calls writes allocations KiB" when the process ends
#include <dlfcn.h>
#include <fcntl.h>
#include <mpi.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace {

struct Plan {
  bool here = false;
  long call = 0;
  long write = 0;
  long allocation = 0;
  std::size_t bytes = 65536;
  char act[16] = "";
  long delay_ms = 100;
  unsigned seed = 1;
};

long number(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atol(text);
}

long rank_here() { return number("OMPI_COMM_WORLD_RANK", number("PMIX_RANK", 0)); }

Plan read_plan() {
  Plan plan;
  plan.here = std::getenv("F_RANK") == nullptr || number("F_RANK", -1) == rank_here();
  plan.call = number("F_CALL", 0);
  plan.write = number("F_WRITE", 0);
  plan.allocation = number("F_ALLOCATION", 0);
  plan.bytes = static_cast<std::size_t>(number("F_BYTES", 65536));
  plan.delay_ms = number("F_DELAY_MS", 100);
  plan.seed = static_cast<unsigned>(number("F_SEED", 1) * 1000 + rank_here());
  const char* act = std::getenv("F_ACT");
  if (act != nullptr) std::snprintf(plan.act, sizeof plan.act, "%s", act);
  return plan;
}

std::atomic<long> calls{0};
std::atomic<long> writes{0};
std::atomic<long> allocations{0};
std::atomic<bool> ready{false};
thread_local int calls_of_mpi = 0;  // that this thread is inside of
bool mpi_runs = false;
Plan plan;

/// Memory that was resident at most since exec; what getrusage tells begins before it.
long peak_kib() {
  long kib = 0;
  char line[256];
  std::FILE* status = std::fopen("/proc/self/status", "r");
  while (status != nullptr && std::fgets(line, sizeof line, status) != nullptr) {
    if (std::sscanf(line, "VmHWM: %ld", &kib) == 1) break;
  }
  if (status != nullptr) std::fclose(status);
  return kib;
}

void write_counts() {
  const char* folder = std::getenv("F_COUNTS");
  if (folder == nullptr) return;
  char path[512];
  std::snprintf(path, sizeof path, "%s.%ld", folder, rank_here());
  if (std::FILE* file = std::fopen(path, "w")) {
    std::fprintf(file, "%ld %ld %ld %ld\n", calls.load(), writes.load(), allocations.load(),
                 peak_kib());
    std::fclose(file);
  }
}

/// mpirun's own helpers inherit the environment as well; only our program is meant.
bool is_our_program() {
  char path[512] = "";
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  return length > 7 && std::strstr(path, "/annulus") != nullptr;
}

[[gnu::constructor]] void begin() {
  if (!is_our_program()) return;
  plan = read_plan();
  ready = true;
  std::atexit(write_counts);
}

void sleep_ms(long milliseconds) {
  timespec time{milliseconds / 1000, milliseconds % 1000 * 1'000'000};
  while (nanosleep(&time, &time) != 0 && errno == EINTR) {
  }
}

bool is(const char* act) { return std::strcmp(plan.act, act) == 0; }

bool has_happened() {
  const char* path = std::getenv("F_ONCE");
  if (path == nullptr) return false;
  const int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file >= 0) close(file);
  return file < 0;
}

void note_time() {
  const char* path = std::getenv("F_AT");
  if (path == nullptr) return;
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  if (std::FILE* file = std::fopen(path, "w")) {
    std::fprintf(file, "%lld\n", static_cast<long long>(now.tv_sec) * 1000000000 + now.tv_nsec);
    std::fclose(file);
  }
}

void write_to_nobody() {
  int ends[2];
  if (pipe(ends) != 0) return;
  close(ends[0]);
  const char byte = 0;
  const ssize_t written = write(ends[1], &byte, 1);
  close(ends[1]);
  if (written != -1 || errno != EPIPE) std::abort();
}

/// Returns the errno to fail with, or 0.
int act() {
  if (has_happened()) return 0;
  note_time();
  if (is("kill")) raise(SIGKILL);
  if (is("stop")) raise(SIGSTOP);
  if (is("term")) raise(SIGTERM);
  if (is("segv")) raise(SIGSEGV);
  if (is("pipe")) write_to_nobody();
  if (is("delay")) sleep_ms(plan.delay_ms);
  if (is("ENOSPC")) return ENOSPC;
  if (is("EIO")) return EIO;
  if (is("EFBIG")) return EFBIG;
  return 0;
}

void announce() {
  const char* prefix = std::getenv("F_READY");
  if (prefix == nullptr) return;
  char path[512];
  std::snprintf(path, sizeof path, "%s.%ld", prefix, rank_here());
  const int file = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (file >= 0) close(file);
}

void before_call() {
  // The watchdog's questions depend on time; the program's own calls do not.
  if (!ready || gettid() != getpid()) return;
  const long count = ++calls;
  if (count == 5) announce();
  if (!plan.here) return;
  if (is("jitter")) return sleep_ms(rand_r(&plan.seed) % (plan.delay_ms + 1));
  if (count == plan.call && !is("flip")) act();
}

bool flipped = false;

/// Whether the call at hand, counted already, damages its message if it has one.
bool flips() {
  return ready && plan.here && is("flip") && !flipped && calls >= plan.call && gettid() == getpid();
}

/// Flips a bit between bytes `begin` and `end`, unless there are none.
void flip_a_bit(void* data, std::size_t begin, std::size_t end) {
  if (begin >= end) return;
  const std::size_t bit = (static_cast<std::size_t>(rand_r(&plan.seed)) << 20 ^
                           static_cast<std::size_t>(rand_r(&plan.seed))) %
                          ((end - begin) * 8);
  static_cast<unsigned char*>(data)[begin + bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
  flipped = true;
  note_time();
}

/// A copy of a message with one bit flipped, kept as long as the process: what the sender holds
/// stays right.
const void* damaged(const void* data, std::size_t bytes) {
  void* copy = std::malloc(bytes + 1);
  std::memcpy(copy, data, bytes);
  flip_a_bit(copy, 0, bytes);
  return copy;
}

std::size_t bytes_of(int count, MPI_Datatype type) {
  int size = 0;
  PMPI_Type_size(type, &size);
  return static_cast<std::size_t>(count) * static_cast<std::size_t>(size);
}

/// Flips a bit of what came from other ranks, `bytes` from each of them in rank order.
void flip_received(void* data, std::size_t bytes, MPI_Comm comm) {
  int rank = 0;
  int ranks = 1;
  PMPI_Comm_rank(comm, &rank);
  PMPI_Comm_size(comm, &ranks);
  const int other = (rank + 1) % ranks;
  if (other == rank) return;
  flip_a_bit(data, static_cast<std::size_t>(other) * bytes,
             static_cast<std::size_t>(other + 1) * bytes);
}

bool is_below_folder(int file) {
  const char* folder = std::getenv("F_FOLDER");
  if (folder == nullptr) return false;
  char link[64];
  char path[512] = "";
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  return readlink(link, path, sizeof path - 1) > 0 &&
         std::strncmp(path, folder, std::strlen(folder)) == 0;
}

/// Returns the errno to fail with, or 0.
int before_write(int file) {
  if (!ready || !is_below_folder(file)) return 0;
  const long count = ++writes;
  if (const long bytes = number("F_FILE_SIZE", 0); count == 1 && bytes > 0) {
    const rlimit limit{static_cast<rlim_t>(bytes), static_cast<rlim_t>(bytes)};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  return plan.here && count == plan.write ? act() : 0;
}

/// Whether this write, counted already, is the one to be torn.
bool is_torn(int file) {
  return ready && plan.here && is("torn") && writes == plan.write && is_below_folder(file);
}

bool allocation_fails(std::size_t bytes) {
  if (!ready || !mpi_runs || calls_of_mpi > 0 || bytes < plan.bytes) return false;
  const long count = ++allocations;
  return plan.here && count == plan.allocation;
}

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

std::atomic<long> nccl_groups{0};

bool nccl_fails() {
  const char* act = std::getenv("F_NCCL");
  const bool fails =
      act != nullptr && (std::strcmp(act, "error") == 0 || std::strcmp(act, "stuck") == 0);
  return ready && plan.here && fails && nccl_groups >= 1;
}

void before_nccl_group() {
  const char* act = std::getenv("F_NCCL");
  if (!ready || !plan.here || act == nullptr || ++nccl_groups != 1) return;
  note_time();
  if (std::strcmp(act, "stop") == 0) raise(SIGSTOP);
  if (std::strcmp(act, "kill") == 0) raise(SIGKILL);
}

}  // namespace

extern "C" {

// ---- NCCL, whose types are all pointers and ints here ------------------------------------------

int ncclGroupEnd() {
  before_nccl_group();
  return next<int()>("ncclGroupEnd")();
}

int ncclCommGetAsyncError(void* comm, int* state) {
  constexpr int kSystemError = 2;
  const int result = next<int(void*, int*)>("ncclCommGetAsyncError")(comm, state);
  if (nccl_fails()) *state = kSystemError;
  return result;
}

int ncclCommAbort(void* comm) {
  while (nccl_fails() && std::strcmp(std::getenv("F_NCCL"), "stuck") == 0) pause();
  return next<int(void*)>("ncclCommAbort")(comm);
}

// ---- MPI ----------------------------------------------------------------------------------------

#define FORWARD(name, parameters, arguments) \
  int name parameters {                      \
    before_call();                           \
    ++calls_of_mpi;                          \
    const int code = P##name arguments;      \
    --calls_of_mpi;                          \
    mpi_runs = true;                         \
    return code;                             \
  }

FORWARD(MPI_Init_thread, (int* argc, char*** argv, int wanted, int* given),
        (argc, argv, wanted, given))
int MPI_Finalize() {
  before_call();
  mpi_runs = false;
  return PMPI_Finalize();
}
FORWARD(MPI_Comm_dup, (MPI_Comm comm, MPI_Comm* copy), (comm, copy))
FORWARD(MPI_Comm_split, (MPI_Comm comm, int color, int key, MPI_Comm* part),
        (comm, color, key, part))
FORWARD(MPI_Comm_split_type, (MPI_Comm comm, int type, int key, MPI_Info info, MPI_Comm* part),
        (comm, type, key, info, part))
FORWARD(MPI_Comm_free, (MPI_Comm * comm), (comm))
FORWARD(MPI_Barrier, (MPI_Comm comm), (comm))
FORWARD(MPI_Ibarrier, (MPI_Comm comm, MPI_Request* request), (comm, request))
FORWARD(MPI_Irecv,
        (void* to, int count, MPI_Datatype type, int from, int tag, MPI_Comm comm,
         MPI_Request* request),
        (to, count, type, from, tag, comm, request))
FORWARD(MPI_Wait, (MPI_Request * request, MPI_Status* status), (request, status))
FORWARD(MPI_Win_allocate_shared,
        (MPI_Aint bytes, int unit, MPI_Info info, MPI_Comm comm, void* data, MPI_Win* window),
        (bytes, unit, info, comm, data, window))
FORWARD(MPI_Win_free, (MPI_Win * window), (window))

// Calls with a message that a fault may damage.
#define FORWARD_MESSAGE(name, parameters, arguments, damage) \
  int name parameters {                                      \
    before_call();                                           \
    ++calls_of_mpi;                                          \
    const int code = P##name arguments;                      \
    --calls_of_mpi;                                          \
    if (flips()) damage;                                     \
    return code;                                             \
  }

FORWARD_MESSAGE(MPI_Allgather,
                (const void* from, int count, MPI_Datatype type, void* to, int to_count,
                 MPI_Datatype to_type, MPI_Comm comm),
                (from, count, type, to, to_count, to_type, comm),
                flip_received(to, bytes_of(to_count, to_type), comm))
FORWARD_MESSAGE(MPI_Alltoall,
                (const void* from, int count, MPI_Datatype type, void* to, int to_count,
                 MPI_Datatype to_type, MPI_Comm comm),
                (from, count, type, to, to_count, to_type, comm),
                flip_received(to, bytes_of(to_count, to_type), comm))
FORWARD_MESSAGE(MPI_Allreduce,
                (const void* from, void* to, int count, MPI_Datatype type, MPI_Op op,
                 MPI_Comm comm),
                (from, to, count, type, op, comm), flip_a_bit(to, 0, bytes_of(count, type)))

int MPI_Isend(const void* from, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm,
              MPI_Request* request) {
  before_call();
  const void* sent = flips() ? damaged(from, bytes_of(count, type)) : from;
  ++calls_of_mpi;
  const int code = PMPI_Isend(sent, count, type, to, tag, comm, request);
  --calls_of_mpi;
  return code;
}

#undef FORWARD_MESSAGE
#undef FORWARD

// ---- files --------------------------------------------------------------------------------------

#define FORWARD(type, name, file, parameters, arguments)    \
  type name parameters {                                    \
    static auto* const real = next<type parameters>(#name); \
    if (const int error = before_write(file); error != 0) { \
      errno = error;                                        \
      return -1;                                            \
    }                                                       \
    const auto result = real arguments;                     \
    if (is_torn(file)) raise(SIGKILL);                      \
    return result;                                          \
  }

ssize_t pwritev(int file, const iovec* parts, int count, off_t offset) {
  static auto* const real = next<ssize_t(int, const iovec*, int, off_t)>("pwritev");
  if (const int error = before_write(file); error != 0) {
    errno = error;
    return -1;
  }
  if (!is_torn(file) || count == 0) return real(file, parts, count, offset);
  const iovec half{parts[0].iov_base, parts[0].iov_len / 2};
  real(file, &half, 1, offset);
  raise(SIGKILL);
  return -1;
}
FORWARD(ssize_t, pwrite, file, (int file, const void* data, size_t bytes, off_t offset),
        (file, data, bytes, offset))
FORWARD(int, fsync, file, (int file), (file))
FORWARD(int, ftruncate, file, (int file, off_t size), (file, size))
FORWARD(int, linkat, to_dir,
        (int from_dir, const char* from, int to_dir, const char* to, int flags),
        (from_dir, from, to_dir, to, flags))
FORWARD(int, renameat, to_dir, (int from_dir, const char* from, int to_dir, const char* to),
        (from_dir, from, to_dir, to))
FORWARD(int, renameat2, to_dir,
        (int from_dir, const char* from, int to_dir, const char* to, unsigned flags),
        (from_dir, from, to_dir, to, flags))
FORWARD(int, unlinkat, folder, (int folder, const char* name, int flags), (folder, name, flags))

#undef FORWARD

// ---- memory: operator new and the aligned buffers both come here ------------------------------

void* __libc_malloc(size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

void* malloc(size_t bytes) {
  if (!allocation_fails(bytes)) return __libc_malloc(bytes);
  errno = ENOMEM;
  return nullptr;
}

void* aligned_alloc(size_t alignment, size_t bytes) {
  if (!allocation_fails(bytes)) return __libc_memalign(alignment, bytes);
  errno = ENOMEM;
  return nullptr;
}

}  // extern "C"
