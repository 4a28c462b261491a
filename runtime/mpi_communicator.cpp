#include "runtime/mpi_communicator.hpp"

#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <limits>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/checked_gather.hpp"
#include "runtime/message_digest.hpp"
#include "runtime/mpi_check.hpp"
#include "runtime/mpi_window.hpp"
#include "runtime/operation_log.hpp"

namespace annulus {
namespace {

/// Tags count the pieces between two ranks, modulo what MPI guarantees (MPI_TAG_UB >= 32767), and
/// mark the last piece of a message: a message in another's place is then seen, whatever its size.
constexpr std::int64_t kTagPeriod = 16384;

int piece_tag(std::int64_t piece, bool last) {
  return static_cast<int>(piece % kTagPeriod) * 2 + (last ? 1 : 0);
}

/// Whether the ranks of this node outnumber the cores that they may run on.
bool ranks_outnumber_cores(MPI_Comm all) {
  MPI_Comm node = MPI_COMM_NULL;
  ANNULUS_CHECK_MPI(MPI_Comm_split_type(all, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node));
  int ranks = 1;
  cpu_set_t cores;
  CPU_ZERO(&cores);  // and so it stays where there are more than it can name
  static_cast<void>(sched_getaffinity(0, sizeof(cores), &cores));
  ANNULUS_CHECK_MPI(MPI_Comm_size(node, &ranks));
  ANNULUS_CHECK_MPI(
      MPI_Allreduce(MPI_IN_PLACE, &cores, int{sizeof(cores)}, MPI_BYTE, MPI_BOR, node));
  ANNULUS_CHECK_MPI(MPI_Comm_free(&node));
  return CPU_COUNT(&cores) > 0 && ranks > CPU_COUNT(&cores);
}

/// As MPI_Wait, but asleep most of the time.
int wait_asleep(MPI_Request* request, MPI_Status* status) {
  constexpr int kTriesAwake = 32;  // most messages between ranks at work need fewer
  constexpr std::chrono::microseconds kNap(100);
  for (int tries = 0;; ++tries) {
    int complete = 0;
    const int code = MPI_Test(request, &complete, status);
    if (code != MPI_SUCCESS || complete != 0) return code;
    if (tries >= kTriesAwake) std::this_thread::sleep_for(kNap);
  }
}

/// A receive under way, and what must arrive.
struct Expected {
  int peer = 0;
  int bytes = 0;
  int tag = 0;
};

/// A message under way, and the digest that follows its last piece.
struct Digested {
  const void* data = nullptr;
  std::int64_t bytes = 0;
  int peer = 0;
  std::uint64_t digest = 0;
};

class MpiExchange final : public Exchange {
 public:
  MpiExchange(OperationGroup& group, std::span<const int> peers, std::int64_t bytes,
              MpiOptions::Waiting waiting)
      : step_("exchange", group, peers, bytes),
        wait_(waiting == MpiOptions::Waiting::asleep ? wait_asleep : MPI_Wait) {}
  ~MpiExchange() override { abandon(); }
  MpiExchange(const MpiExchange&) = delete;
  MpiExchange& operator=(const MpiExchange&) = delete;

  /// Receives come first in `requests_`, in the order of `expected_`.
  void receive(MPI_Comm comm, void* data, const Expected& expected) {
    requests_.push_back(MPI_REQUEST_NULL);
    expected_.push_back(expected);
    ANNULUS_CHECK_MPI(MPI_Irecv(data, expected.bytes, MPI_BYTE, expected.peer, MPI_ANY_TAG, comm,
                                &requests_.back()));
  }
  void send(MPI_Comm comm, const void* data, int bytes, int peer, int tag) {
    requests_.push_back(MPI_REQUEST_NULL);
    sent_.push_back(bytes);
    ANNULUS_CHECK_MPI(MPI_Isend(data, bytes, MPI_BYTE, peer, tag, comm, &requests_.back()));
  }

  /// After the message's pieces, before the next message to that peer: the receiver may take them
  /// in another exchange.
  void receive_digest(MPI_Comm comm, const Receive& message, int tag) {
    incoming_.push_back({message.data, message.bytes, message.peer, 0});
    receive(comm, &incoming_.back().digest, {message.peer, kDigestBytes, tag});
  }
  void send_digest(MPI_Comm comm, const Send& message, int tag) {
    outgoing_.push_back(message_digest(message.data, message.bytes));
    send(comm, &outgoing_.back(), kDigestBytes, message.peer, tag);
  }

  /// Requests are completed one by one, in order: MPI moves all of them meanwhile, the error of
  /// each is its own, and Open MPI 4.1's MPI_Waitall hangs after a truncated message.
  bool test() override {
    for (; done_ < requests_.size(); ++done_) {
      int complete = 0;
      MPI_Status status;
      check(MPI_Test(&requests_[done_], &complete, &status), status);
      if (complete == 0) return false;
      step_.moved(bytes_of(done_));
    }
    check_arrived();
    return true;
  }

  void wait(Stream) override {
    const WaitForStep wait(step_);
    for (; done_ < requests_.size(); ++done_) {
      MPI_Status status;
      check(wait_(&requests_[done_], &status), status);
      step_.moved(bytes_of(done_));
    }
    check_arrived();
  }

 private:
  static constexpr int kDigestBytes = sizeof(std::uint64_t);
  static constexpr double kAbandonSeconds = 1.0;

  /// MPI, the network and memory have checks of their own; what slips through them is seen here.
  void check_arrived() {
    for (; !incoming_.empty(); incoming_.pop_front()) {
      const Digested& message = incoming_.front();
      require(message.digest == message_digest(message.data, message.bytes), ExitCode::peer,
              "exchange: {} bytes from rank {} arrived damaged", message.bytes, message.peer);
    }
  }

  int bytes_of(std::size_t request) const {
    const std::size_t receives = expected_.size();
    return request < receives ? expected_[request].bytes : sent_[request - receives];
  }

  /// MPI lets a short message into a longer receive without an error.
  void check(int code, const MPI_Status& status) const {
    if (done_ >= expected_.size()) {
      require(code == MPI_SUCCESS, ExitCode::peer, "exchange: a send failed: {}",
              mpi_error_text(code));
      return;
    }
    const Expected& expected = expected_[done_];
    require(code == MPI_SUCCESS, ExitCode::peer,
            "exchange: receiving {} bytes from rank {} failed: {}", expected.bytes, expected.peer,
            mpi_error_text(code));
    if (requests_[done_] != MPI_REQUEST_NULL) return;
    int bytes = 0;
    ANNULUS_CHECK_MPI(MPI_Get_count(&status, MPI_BYTE, &bytes));
    require(bytes == expected.bytes && status.MPI_TAG == expected.tag, ExitCode::peer,
            "exchange: expected piece {} of {} bytes from rank {}, got piece {} of {} bytes",
            expected.tag, expected.bytes, expected.peer, status.MPI_TAG, bytes);
  }

  /// Only a rank that is about to end the job leaves requests behind. The memory they read and
  /// write is freed next, and MPI still runs for the report: what is matched already has to come to
  /// an end, as long as the peer does its part.
  void abandon() noexcept {
    if (done_ >= requests_.size()) return;
    for (std::size_t i = done_; i < expected_.size(); ++i) {
      if (requests_[i] != MPI_REQUEST_NULL) static_cast<void>(MPI_Cancel(&requests_[i]));
    }
    const double end = MPI_Wtime() + kAbandonSeconds;
    for (std::size_t i = done_; i < requests_.size(); ++i) {
      int complete = requests_[i] == MPI_REQUEST_NULL ? 1 : 0;
      while (complete == 0 && MPI_Wtime() < end) {
        if (MPI_Test(&requests_[i], &complete, MPI_STATUS_IGNORE) != MPI_SUCCESS) break;
      }
      if (complete == 0) static_cast<void>(MPI_Request_free(&requests_[i]));
    }
  }

  std::vector<MPI_Request> requests_;
  std::vector<Expected> expected_;
  std::vector<int> sent_;          // bytes of the sends
  std::deque<Digested> incoming_;  // until they are checked; MPI writes the digests
  std::deque<std::uint64_t> outgoing_;
  LoggedStep step_;
  int (*wait_)(MPI_Request*, MPI_Status*);
  std::size_t done_ = 0;  // requests before this one are complete
};

class MpiCommunicator final : public Communicator {
 public:
  /// Takes over `comm`.
  MpiCommunicator(MPI_Comm comm, const MpiOptions& options)
      : comm_(comm), options_(options), group_(world_ranks_of({MPI_Comm_c2f(comm)})) {
    ANNULUS_CHECK_MPI(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN));
    ANNULUS_CHECK_MPI(MPI_Comm_rank(comm_, &rank_));
    ANNULUS_CHECK_MPI(MPI_Comm_size(comm_, &size_));
    sent_pieces_.resize(static_cast<std::size_t>(size_));
    received_pieces_.resize(static_cast<std::size_t>(size_));
    windows_.emplace(MpiHandle{MPI_Comm_c2f(comm_)}, group_);
  }
  ~MpiCommunicator() override {
    windows_.reset();
    int finalized = 0;
    static_cast<void>(MPI_Finalized(&finalized));
    if (finalized == 0) static_cast<void>(MPI_Comm_free(&comm_));
  }
  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::unique_ptr<Communicator> split(int color, int key) override {
    MPI_Comm part = MPI_COMM_NULL;
    const WaitingStep step("split", group_, 0);
    ANNULUS_CHECK_MPI(MPI_Comm_split(comm_, color, key, &part));
    return std::make_unique<MpiCommunicator>(part, options_);
  }

  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override;
  void all_reduce_sum(std::span<float> values) override;

  std::unique_ptr<Window> expose(std::int64_t bytes, std::int64_t granule) override {
    return windows_->expose(bytes, granule);
  }

 protected:
  std::unique_ptr<Exchange> start(std::span<const Send> sends, std::span<const Receive> receives,
                                  Stream stream) override;

 private:
  MPI_Comm comm_;
  MpiOptions options_;
  OperationGroup group_;
  int rank_ = 0;
  int size_ = 0;
  std::vector<std::int64_t> sent_pieces_;      // to each peer, so far
  std::vector<std::int64_t> received_pieces_;  // from each peer, so far
  std::optional<MpiWindows> windows_;
};

std::unique_ptr<Exchange> MpiCommunicator::start(std::span<const Send> sends,
                                                 std::span<const Receive> receives, Stream) {
  std::vector<int> peers;
  std::int64_t total = 0;
  for (const Receive& receive : receives) {
    peers.push_back(receive.peer);
    total += receive.bytes + static_cast<std::int64_t>(kDigestBytes);
  }
  for (const Send& send : sends) {
    peers.push_back(send.peer);
    total += send.bytes + static_cast<std::int64_t>(kDigestBytes);
  }
  auto exchange = std::make_unique<MpiExchange>(group_, peers, total, options_.waiting);
  const std::int64_t chunk = options_.chunk_bytes;
  for (const Receive& receive : receives) {
    std::int64_t& piece = received_pieces_[static_cast<std::size_t>(receive.peer)];
    for (std::int64_t begin = 0; begin < receive.bytes; begin += chunk) {
      const int bytes = static_cast<int>(std::min(chunk, receive.bytes - begin));
      const int tag = piece_tag(piece++, begin + bytes == receive.bytes);
      exchange->receive(comm_, static_cast<std::byte*>(receive.data) + begin,
                        {receive.peer, bytes, tag});
    }
    exchange->receive_digest(comm_, receive, piece_tag(piece++, true));
  }
  for (const Send& send : sends) {
    std::int64_t& piece = sent_pieces_[static_cast<std::size_t>(send.peer)];
    for (std::int64_t begin = 0; begin < send.bytes; begin += chunk) {
      const int bytes = static_cast<int>(std::min(chunk, send.bytes - begin));
      const int tag = piece_tag(piece++, begin + bytes == send.bytes);
      exchange->send(comm_, static_cast<const std::byte*>(send.data) + begin, bytes, send.peer,
                     tag);
    }
    exchange->send_digest(comm_, send, piece_tag(piece++, true));
  }
  return exchange;
}

void MpiCommunicator::all_gather(std::span<const std::byte> mine, std::span<std::byte> all) {
  const std::size_t ranks = static_cast<std::size_t>(size_);
  require(all.size() == mine.size() * ranks, ExitCode::internal,
          "all_gather: {} bytes from each of {} ranks do not make {}", mine.size(), size_,
          all.size());
  const WaitingStep step("all_gather", group_, static_cast<std::int64_t>(mine.size()));
  const auto chunk = static_cast<std::size_t>(options_.chunk_bytes);
  std::size_t begin = 0;
  do {  // also for nothing: all ranks have come here
    const std::size_t length = std::min(chunk, mine.size() - begin);
    checked_all_gather(MpiHandle{MPI_Comm_c2f(comm_)}, mine.subspan(begin, length),
                       all.data() + begin, mine.size());
    begin += chunk;
  } while (begin < mine.size());
}

/// MPI_Allreduce may add in any order; here each rank adds its part of every block in rank order.
/// Parts travel with their digests.
void MpiCommunicator::all_reduce_sum(std::span<float> values) {
  const WaitingStep step("all_reduce_sum", group_, static_cast<std::int64_t>(values.size_bytes()));
  const auto ranks = static_cast<std::size_t>(size_);
  const std::size_t most = static_cast<std::size_t>(options_.chunk_bytes) / sizeof(float);
  const std::size_t part =
      std::max<std::size_t>(1, std::min((values.size() + ranks - 1) / ranks, most));
  const std::size_t block = part * ranks;
  const std::size_t part_bytes = part * sizeof(float);
  const std::size_t width = part_bytes + kDigestBytes;
  std::vector<std::byte> mine(width * ranks);
  std::vector<std::byte> parts(width * ranks);
  std::vector<float> padded(block);
  std::vector<float> sum(part);
  for (std::size_t begin = 0; begin < values.size(); begin += block) {
    const std::span<float> now = values.subspan(begin, std::min(block, values.size() - begin));
    std::copy(now.begin(), now.end(), padded.begin());
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      std::memcpy(&mine[rank * width], &padded[rank * part], part_bytes);
      put_digest(&mine[rank * width], part_bytes);
    }
    const int count = static_cast<int>(width);
    ANNULUS_CHECK_MPI(
        MPI_Alltoall(mine.data(), count, MPI_BYTE, parts.data(), count, MPI_BYTE, comm_));
    std::fill(sum.begin(), sum.end(), 0.0F);
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      check_arrived(&parts[rank * width], part_bytes, static_cast<int>(rank), "all_reduce_sum");
      const auto* theirs = reinterpret_cast<const float*>(&parts[rank * width]);
      for (std::size_t i = 0; i < part; ++i) sum[i] += theirs[i];
    }
    checked_all_gather(MpiHandle{MPI_Comm_c2f(comm_)}, std::as_bytes(std::span(sum)),
                       reinterpret_cast<std::byte*>(padded.data()), part_bytes);
    std::copy_n(padded.begin(), now.size(), now.begin());
  }
}

}  // namespace

std::vector<int> world_ranks_of(MpiHandle handle) {
  MPI_Group world = MPI_GROUP_NULL;
  MPI_Group group = MPI_GROUP_NULL;
  int size = 0;
  ANNULUS_CHECK_MPI(MPI_Comm_group(MPI_COMM_WORLD, &world));
  ANNULUS_CHECK_MPI(MPI_Comm_group(MPI_Comm_f2c(handle.fortran), &group));
  ANNULUS_CHECK_MPI(MPI_Group_size(group, &size));
  std::vector<int> own(static_cast<std::size_t>(size));
  std::iota(own.begin(), own.end(), 0);
  std::vector<int> result(own.size());
  ANNULUS_CHECK_MPI(MPI_Group_translate_ranks(group, size, own.data(), world, result.data()));
  ANNULUS_CHECK_MPI(MPI_Group_free(&world));
  ANNULUS_CHECK_MPI(MPI_Group_free(&group));
  return result;
}

std::unique_ptr<Communicator> make_mpi_communicator(MpiHandle handle, const MpiOptions& options) {
  require(options.chunk_bytes > 0 && options.chunk_bytes <= std::numeric_limits<int>::max(),
          ExitCode::usage, "mpi: chunk_bytes {} is outside 1 to 2^31 - 1", options.chunk_bytes);
  MPI_Comm own = MPI_COMM_NULL;
  OperationGroup group(world_ranks_of(handle));
  const WaitingStep step("communicator", group, 0);
  ANNULUS_CHECK_MPI(MPI_Comm_dup(MPI_Comm_f2c(handle.fortran), &own));
  MpiOptions chosen = options;
  if (chosen.waiting == MpiOptions::Waiting::by_cores) {
    chosen.waiting =
        ranks_outnumber_cores(own) ? MpiOptions::Waiting::asleep : MpiOptions::Waiting::awake;
  }
  return std::make_unique<MpiCommunicator>(own, chosen);
}

}  // namespace annulus
