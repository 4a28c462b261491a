// Messages that arrive with one bit changed: their digests tell.

#include <atomic>
#include <filesystem>

#include "reliability/matrix_case.hpp"

namespace annulus::testing {
namespace {

constexpr int kRanks = 4;

/// Ulysses, whose ranks of one machine exchange messages where a ring reads in place.
JobOptions exchanging_job(const std::string& output) {
  JobOptions options = ring_job(output);
  options.arguments[2] = "ulysses";
  return options;
}

struct Flip {
  int rank;
  long call;
};

std::vector<Flip> flips_of(const Counts& counts) {
  std::vector<Flip> flips;
  for (int rank = 0; rank < kRanks; ++rank) {
    const long last = counts.calls[static_cast<std::size_t>(rank)];
    for (const long call : points(last, 3, 12)) flips.push_back({rank, call});
  }
  return flips;
}

TEST(Transit, ADamagedMessageIsRefused) {
  Figures figures("none, a bit flipped in a message");
  const TemporaryFolder reference_folder;
  const std::string reference_path = reference_folder.file("out.h5");
  const Counts counts = count_points(exchanging_job(reference_path));
  ASSERT_EQ(counts.outcome.exit_code, 0) << counts.outcome.err;
  const std::string right = results_of(reference_path);
  const std::vector<Flip> flips = flips_of(counts);
  std::atomic<int> damaged{0};
  side_by_side(flips.size(), [&](std::size_t i) {
    const TemporaryFolder folder;
    const TemporaryFolder notes;
    JobOptions options = exchanging_job(folder.file("out.h5"));
    options.environment.merge(
        std::map<std::string, std::string>{{"F_ACT", "flip"},
                                           {"F_RANK", std::to_string(flips[i].rank)},
                                           {"F_CALL", std::to_string(flips[i].call)},
                                           {"F_SEED", std::to_string(i)},
                                           {"F_AT", notes.file("flipped")}});
    const JobOutcome outcome = run_job(options);
    figures.add(outcome.seconds);
    const std::string what = "a bit flipped from call " + std::to_string(flips[i].call) +
                             " of rank " + std::to_string(flips[i].rank);
    expect_clean_end(outcome, what);
    const std::string results = results_of(folder.file("out.h5"));
    if (!std::filesystem::exists(notes.file("flipped"))) {  // no message was left
      EXPECT_EQ(outcome.exit_code, 0) << what << "\n" << outcome.err;
      EXPECT_EQ(results, right) << what;
      return;
    }
    ++damaged;
    EXPECT_EQ(outcome.exit_code, 75) << what << "\n" << outcome.err;
    EXPECT_TRUE(says(outcome, "bytes from rank [0-9]+ arrived damaged")) << what << "\n"
                                                                         << outcome.err;
    EXPECT_TRUE(results.empty() || results == right) << what;
  });
  EXPECT_GT(damaged, 0);
  figures.note(std::to_string(damaged) + " messages were damaged, all refused");
}

}  // namespace
}  // namespace annulus::testing
