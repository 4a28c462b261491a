// The main of tests that run under mpirun: every rank runs the same tests, rank 0 prints the
// failures of all ranks, and a fatal failure ends all ranks, since the others would wait for ever.

#include <gtest/gtest.h>
#include <mpi.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "runtime/leak_check.hpp"

namespace {

// How long a failed rank waits for the others to reach the end of the test before it aborts.
constexpr std::chrono::seconds kPatience{10};

class RankListener : public testing::EmptyTestEventListener {
 public:
  explicit RankListener(MPI_Comm comm) : comm_(comm) {
    MPI_Comm_rank(comm, &rank_);
    MPI_Comm_size(comm, &size_);
  }
  bool any_failed() const { return any_failed_; }

  void OnTestStart(const testing::TestInfo&) override {
    failures_.clear();
    fatal_ = 0;
  }

  void OnTestPartResult(const testing::TestPartResult& part) override {
    if (part.passed() || part.skipped()) return;
    failures_ += std::string(part.file_name() ? part.file_name() : "?") + ":" +
                 std::to_string(part.line_number()) + ": " + part.message() + "\n";
    if (part.fatally_failed()) fatal_ = 1;
  }

  void OnTestEnd(const testing::TestInfo& test) override {
    meet_or_abort(test);
    const int mine = static_cast<int>(failures_.size());
    std::vector<int> sizes(static_cast<std::size_t>(size_));
    MPI_Allgather(&mine, 1, MPI_INT, sizes.data(), 1, MPI_INT, comm_);
    std::vector<int> offsets(sizes.size());
    int total = 0;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      offsets[i] = total;
      total += sizes[i];
    }
    if (total == 0) return;
    any_failed_ = true;
    std::string all(static_cast<std::size_t>(total), '\0');
    MPI_Allgatherv(failures_.data(), mine, MPI_CHAR, all.data(), sizes.data(), offsets.data(),
                   MPI_CHAR, comm_);
    if (rank_ == 0) print(test, all, sizes, offsets);
    int any_fatal = 0;
    MPI_Allreduce(&fatal_, &any_fatal, 1, MPI_INT, MPI_MAX, comm_);
    if (any_fatal != 0) MPI_Abort(comm_, 1);
  }

 private:
  // A rank that failed may have left its peers inside a collective call: then it reports alone.
  void meet_or_abort(const testing::TestInfo& test) {
    MPI_Request request = MPI_REQUEST_NULL;
    MPI_Ibarrier(comm_, &request);
    if (failures_.empty()) {
      MPI_Wait(&request, MPI_STATUS_IGNORE);
      return;
    }
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    int done = 0;
    while (done == 0 && std::chrono::steady_clock::now() < deadline) {
      MPI_Test(&request, &done, MPI_STATUS_IGNORE);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (done != 0) return;
    std::fprintf(stderr, "rank %d: %s.%s failed and the other ranks do not reach its end\n%s",
                 rank_, test.test_suite_name(), test.name(), failures_.c_str());
    MPI_Abort(comm_, 1);
  }

  void print(const testing::TestInfo& test, const std::string& all, const std::vector<int>& sizes,
             const std::vector<int>& offsets) const {
    for (std::size_t r = 0; r < sizes.size(); ++r) {
      if (sizes[r] == 0) continue;
      const std::string text =
          all.substr(static_cast<std::size_t>(offsets[r]), static_cast<std::size_t>(sizes[r]));
      std::printf("rank %zu: %s.%s\n%s", r, test.test_suite_name(), test.name(), text.c_str());
    }
    std::fflush(stdout);
  }

  MPI_Comm comm_;
  int rank_ = 0;
  int size_ = 1;
  int fatal_ = 0;
  bool any_failed_ = false;
  std::string failures_;
};

}  // namespace

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  testing::InitGoogleTest(&argc, argv);
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &comm);
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) delete listeners.Release(listeners.default_result_printer());
  auto* listener = new RankListener(comm);  // owned by the listeners
  listeners.Append(listener);
  const int status = RUN_ALL_TESTS();
  const bool failed = listener->any_failed() || status != 0;
  MPI_Comm_free(&comm);
  annulus::check_for_leaks();
  MPI_Finalize();
  return failed ? 1 : 0;
}
