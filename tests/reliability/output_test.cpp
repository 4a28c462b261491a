// Promises 10 to 13: writes that fail, ranks that are killed while they write, damaged files.

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>

#include "reliability/matrix_case.hpp"

namespace annulus::testing {
namespace {

constexpr int kRanks = 4;

void copy(const std::string& from, const std::string& to) {
  std::filesystem::copy_file(from, to, std::filesystem::copy_options::overwrite_existing);
}

/// Another run's output, which must not be harmed: here the input itself.
std::string earlier_output(const TemporaryFolder& folder) {
  copy(sample_file(), folder.file("out.h5"));
  return sha256_of(folder.file("out.h5"));
}

JobOptions replacing_job(const TemporaryFolder& folder,
                         double timeout_seconds = kUnhurriedSeconds) {
  JobOptions options = ring_job(folder.file("out.h5"), timeout_seconds);
  options.arguments.emplace_back("--force");
  return options;
}

Counts counts_of_replacing() {
  const TemporaryFolder folder;
  earlier_output(folder);
  return count_points(replacing_job(folder));
}

/// A write of one rank that fails, or that the rank is killed or stopped in.
struct Failing {
  std::string act;
  std::string kind;  // F_WRITE or F_CALL
  int rank;
  long point;
  long last;

  std::string what() const {
    return act + " at " + kind + " " + std::to_string(point) + " of rank " + std::to_string(rank);
  }
  std::map<std::string, std::string> environment() const {
    return {{"F_ACT", act}, {"F_RANK", std::to_string(rank)}, {kind, std::to_string(point)}};
  }
};

TEST(Promise10, AWriteThatFailsEndsTheJobAndKeepsTheEarlierOutput) {
  Figures figures("10");
  const Counts counts = counts_of_replacing();
  std::vector<Failing> cases;
  for (const std::string error : {"ENOSPC", "EIO", "EFBIG"}) {
    for (int rank = 0; rank < kRanks; ++rank) {
      const long last = counts.writes[static_cast<std::size_t>(rank)];
      if (!whole_matrix() && (rank > 1 || error != "ENOSPC")) continue;
      for (const long write : points(last, 2, rank == 0 ? 7 : 2)) {
        cases.push_back({error, "F_WRITE", rank, write, last});
      }
    }
  }
  side_by_side(cases.size(), [&](std::size_t i) {
    const TemporaryFolder folder;
    const std::string before = earlier_output(folder);
    JobOptions options = replacing_job(folder);
    options.environment.merge(cases[i].environment());
    const JobOutcome outcome = run_job(options);
    figures.add(outcome.seconds);
    const std::string what = cases[i].what();
    EXPECT_EQ(outcome.exit_code, 74) << what << "\n" << outcome.err;
    EXPECT_TRUE(says(outcome, "out\\.h5.*\\(errno [0-9]+\\)")) << what << "\n" << outcome.err;
    // The last change is that of the folder, made durable when the new file has its name.
    const bool named =
        cases[i].point == cases[i].last && results_of(folder.file("out.h5")) == reference().results;
    EXPECT_TRUE(named || sha256_of(folder.file("out.h5")) == before) << what;
    EXPECT_EQ(folder.listing(), std::vector<std::string>{"out.h5"}) << what;
    expect_clean_end(outcome, what);
  });
}

TEST(Promise10, ARealFullDiskAndFileSizeLimit) {
  if (run_program({"unshare", "--mount", "true"}).exit_code != 0) {
    GTEST_SKIP() << "no mount namespaces here";
  }
  Figures figures("10, tmpfs and RLIMIT_FSIZE");
  for (const std::string limit : {"disk", "size"}) {
    const TemporaryFolder folder;
    JobOptions options = replacing_job(folder);
    // A small file system over the folder, which the job alone sees; it says what is in it then.
    const std::string script =
        (limit == "disk" ? "mount -t tmpfs -o size=2m tmpfs \"$0\" || exit 99;" : std::string()) +
        "echo earlier > \"$0/out.h5\"; \"$@\"; code=$?;"
        "echo \"holds $(cat \"$0\"/*)\"; exit $code";
    options.wrapper = {"unshare", "--mount", "bash", "-c", script, folder.file("")};
    if (limit == "size") options.environment["F_FILE_SIZE"] = "100000";
    const JobOutcome outcome = run_job(options);
    if (outcome.exit_code == 99) GTEST_SKIP() << "no mounts here";
    figures.add(outcome.seconds);
    EXPECT_EQ(outcome.exit_code, 74) << limit << "\n" << outcome.err;
    EXPECT_TRUE(says(outcome, limit == "disk" ? "errno 28" : "errno 27")) << outcome.err;
    EXPECT_NE(outcome.out.find("holds earlier"), std::string::npos) << outcome.out;
    expect_clean_end(outcome, limit);
  }
}

/// How often what was found after a writer was killed.
struct Found {
  std::atomic<int> old_files{0};
  std::atomic<int> new_files{0};
  std::atomic<int> cleared{0};
};

void kill_a_writer(const Failing& failing, Figures& figures, Found& found) {
  const TemporaryFolder folder;
  const std::string before = earlier_output(folder);
  JobOptions options = replacing_job(folder);
  options.environment.merge(failing.environment());
  const JobOutcome outcome = run_job(options);
  figures.add(outcome.seconds);
  const std::string what = failing.what();
  const bool is_old = sha256_of(folder.file("out.h5")) == before;
  const bool is_new = results_of(folder.file("out.h5")) == reference().results;
  EXPECT_NE(outcome.exit_code, 0) << what;
  EXPECT_TRUE(is_old || is_new) << what << "\n" << outcome.err;
  expect_clean_end(outcome, what);
  if (folder.listing().size() > 1) {
    // Killed between the two steps that give the file its name: the next run clears up.
    EXPECT_EQ(failing.kind, "F_WRITE") << what;
    options.environment.clear();
    EXPECT_EQ(run_job(options).exit_code, 0) << what;
    ++found.cleared;
  }
  EXPECT_EQ(folder.listing(), std::vector<std::string>{"out.h5"}) << what;
  ++(is_old ? found.old_files : found.new_files);
}

TEST(Promise11, AKilledWriterLeavesTheOldFileOrTheNewOne) {
  Figures figures("11");
  const Counts counts = counts_of_replacing();
  std::vector<Failing> cases;
  for (int rank = 0; rank < (whole_matrix() ? kRanks : 1); ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    const long last = counts.writes[at];
    for (const long write : points(last, 2, 100)) {
      cases.push_back({"kill", "F_WRITE", rank, write, last});
      if (whole_matrix()) cases.push_back({"torn", "F_WRITE", rank, write, last});
    }
    if (!whole_matrix()) continue;
    // The calls of MPI in the second half are those of writing.
    const long calls = counts.calls[at];
    for (long call = calls / 2; call <= calls; call += 2) {
      cases.push_back({"kill", "F_CALL", rank, call, calls});
    }
  }
  Found found;
  side_by_side(cases.size(), [&](std::size_t i) { kill_a_writer(cases[i], figures, found); });
  figures.note(std::to_string(found.old_files) + " times the old file, " +
               std::to_string(found.new_files) + " times the new one, " +
               std::to_string(found.cleared) + " temporary files left to the next run");
}

TEST(Promise11, AWriterThatIsStoppedAndGoesOnTooLate) {
  Figures figures("2 and 11, a writer stopped and continued after the deadline");
  const std::vector<int> ranks = {0, 2};
  side_by_side(ranks.size(), [&](std::size_t i) {
    const TemporaryFolder folder;
    const std::string before = earlier_output(folder);
    JobOptions options = replacing_job(folder, kTimeoutSeconds);
    options.environment.merge(Failing{"stop", "F_WRITE", ranks[i], 2, 0}.environment());
    const JobOutcome outcome = run_job(options);  // the launcher continues what it ends
    figures.add(outcome.seconds);
    EXPECT_EQ(outcome.exit_code, 75) << outcome.err;
    EXPECT_TRUE(says(outcome, "phase writing.*suspect rank " + std::to_string(ranks[i]) + " "))
        << outcome.err;
    EXPECT_EQ(sha256_of(folder.file("out.h5")), before);
    EXPECT_EQ(folder.listing(), std::vector<std::string>{"out.h5"});
    expect_clean_end(outcome, "a stopped writer");
    options.environment.erase("F_ACT");
    EXPECT_EQ(run_job(options).exit_code, 0) << "the same command again";
    EXPECT_EQ(results_of(folder.file("out.h5")), reference().results);
  });
}

/// What of a run's output a reader gets, through the command a user would run.
struct Reading {
  int exit_code = 0;
  std::string values;
  std::string err;
};

Reading read_back(const std::string& path, const std::string& scratch) {
  const Outcome outcome =
      run_annulus(0, {"run", "--op", "flash", "--input", path, "--query",
                      "output/attention_outputs", "--key", "output/attention_outputs", "--value",
                      "output/attention_outputs", "--output", scratch, "--force"});
  return {outcome.exit_code, outcome.exit_code == 0 ? results_of(scratch) : "", outcome.err};
}

void flip_bit(const std::string& path, std::uint64_t bit) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(bit / 8));
  const int byte = file.get();
  file.seekp(static_cast<std::streamoff>(bit / 8));
  file.put(static_cast<char>(byte ^ (1 << (bit % 8))));
}

TEST(Promise12, AFlippedBitIsDetectedOrChangesNothing) {
  const TemporaryFolder folder;
  const std::string path = folder.file("out.h5");
  ASSERT_EQ(run_job(ring_job(path)).exit_code, 0);
  const Reading right = read_back(path, folder.file("scratch.h5"));
  ASSERT_EQ(right.exit_code, 0) << right.err;
  const unsigned seed = std::random_device{}();
  std::mt19937_64 random(seed);
  const auto all = static_cast<std::uint64_t>(std::filesystem::file_size(path)) * 8;
  std::vector<std::uint64_t> bits(whole_matrix() ? 300 : 10);
  // Half of them anywhere, half in the first 64 KiB, where the metadata is.
  for (std::size_t i = 0; i < bits.size(); ++i) {
    bits[i] = random() % (i % 2 == 0 ? all : std::min<std::uint64_t>(all, 524288));
  }
  std::atomic<int> detected{0};
  std::atomic<int> harmless{0};
  side_by_side(bits.size(), [&](std::size_t i) {
    const TemporaryFolder own;
    copy(path, own.file("out.h5"));
    flip_bit(own.file("out.h5"), bits[i]);
    const Reading reading = read_back(own.file("out.h5"), own.file("scratch.h5"));
    const bool same = reading.exit_code == 0 && reading.values == right.values;
    const bool refused = reading.exit_code == 65 || reading.exit_code == 66;
    EXPECT_TRUE(same || refused) << "seed " << seed << ", bit " << bits[i] << ": exit code "
                                 << reading.exit_code << "\n"
                                 << reading.err;
    ++(same ? harmless : detected);
  });
  std::printf(
      "figure: promise 12: seed %u, %zu flips: %d detected, %d outside the content, 0 silent\n",
      seed, bits.size(), detected.load(), harmless.load());
}

TEST(Promise13, ATruncatedInputIsRefusedByName) {
  Figures figures("13");
  const auto size = std::filesystem::file_size(sample_file());
  const std::vector<long> percents = points(100, 3, 100);
  side_by_side(percents.size(), [&](std::size_t i) {
    const TemporaryFolder folder;
    const std::string path = folder.file("in.h5");
    copy(sample_file(), path);
    std::filesystem::resize_file(path, size * static_cast<unsigned long>(percents[i] - 1) / 100);
    JobOptions options;
    options.ranks = 1;
    options.arguments = {"run", "--op", "ring", "--input", path, "--output", folder.file("out.h5")};
    const JobOutcome outcome = run_job(options);
    figures.add(outcome.seconds);
    const std::string what = "the first " + std::to_string(percents[i] - 1) + "%";
    EXPECT_EQ(outcome.exit_code, 65) << what << "\n" << outcome.err;
    EXPECT_LE(outcome.seconds, 5.0) << what;
    EXPECT_TRUE(says(outcome, "in\\.h5")) << what << "\n" << outcome.err;
    EXPECT_EQ(folder.listing(), std::vector<std::string>{"in.h5"}) << what;
  });
}

}  // namespace
}  // namespace annulus::testing
