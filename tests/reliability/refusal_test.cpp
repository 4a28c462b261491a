// Promises 5, 8, 14, 15 and 21: ranks that disagree, memory that is not there, inputs that do not
// fit, ranks that each believe to be alone.

#include <atomic>
#include <filesystem>

#include "reliability/matrix_case.hpp"

namespace annulus::testing {
namespace {

TEST(Promise05, RanksThatDisagreeAreRefused) {
  Figures figures("5");
  struct Difference {
    std::vector<std::string> of_rank_0;
    std::vector<std::string> of_the_others;
    std::string named;
  };
  const TemporaryFolder folder;
  const std::string other_input = folder.file("other.h5");
  for (const char* name : {"query", "key", "value"}) write_zeros(other_input, name, {1, 64, 2, 16});
  const std::string of_same_size = folder.file("same.h5");
  std::filesystem::copy_file(other_input, of_same_size);
  std::filesystem::resize_file(of_same_size, std::filesystem::file_size(sample_file()));
  const std::vector<Difference> differences = {
      {{"--causal"}, {"--no-causal"}, "causal"},
      {{"--scale", "0.5"}, {"--scale", "0.25"}, "scale"},
      {{"--dtype", "f32"}, {"--dtype", "bf16"}, "dtype"},
      {{"--window", "64,0"}, {"--window", "32,0"}, "window"},
      {{"--input", sample_file()},
       {"--input", other_input},
       "other.* bytes here, [0-9]+ on rank 0"},
      {{"--input", of_same_size}, {"--input", sample_file()}, "another file here than on rank 0"},
      {{"--op", "ring"}, {"--op", "ulysses"}, "op is"},
      {{"--layout", "zigzag"}, {"--layout", "contiguous"}, "layout"},
      {{"--soft-cap", "30"}, {}, "soft-cap"},
      {{"--timeout", "5"}, {"--timeout", "6"}, "timeout"},
  };
  side_by_side(whole_matrix() ? differences.size() : 2, [&](std::size_t i) {
    const Difference& difference = differences[i];
    const TemporaryFolder outputs;
    const auto arguments = [&](const std::vector<std::string>& own) {
      std::vector<std::string> result = {"run", "--mesh", "sp=4", "--output",
                                         outputs.file("out.h5")};
      const std::string first = own.empty() ? "" : own.front();
      if (first != "--input") result.insert(result.end(), {"--input", sample_file()});
      if (first != "--op") result.insert(result.end(), {"--op", "ring"});
      result.insert(result.end(), own.begin(), own.end());
      return result;
    };
    JobOptions options;
    options.first_rank_arguments = arguments(difference.of_rank_0);
    options.arguments = arguments(difference.of_the_others);
    const JobOutcome outcome = run_job(options);
    figures.add(outcome.seconds);
    const std::string what = difference.of_rank_0.front();
    EXPECT_TRUE(outcome.exit_code == 64 || outcome.exit_code == 65)
        << what << ": " << outcome.exit_code << "\n"
        << outcome.err;
    EXPECT_LE(outcome.seconds, 5.0) << what;
    EXPECT_TRUE(says(outcome, difference.named)) << what << "\n" << outcome.err;
    EXPECT_TRUE(says(outcome, "rank 0|ranks 0")) << what << "\n" << outcome.err;
    EXPECT_EQ(outputs.listing(), std::vector<std::string>{}) << what;
    expect_clean_end(outcome, what);
  });
}

TEST(Promise08, AFailedAllocationEndsAllRanks) {
  Figures figures("8");
  struct Failing {
    int rank;
    long allocation;
  };
  std::vector<Failing> cases;
  for (int rank = 0; rank < 4; ++rank) {
    if (!whole_matrix() && rank != 1) continue;
    const long last = reference().counts.allocations[static_cast<std::size_t>(rank)];
    for (const long allocation : points(last, 2, 30)) cases.push_back({rank, allocation});
  }
  std::atomic<int> done_without{0};
  side_by_side(cases.size(), [&](std::size_t i) {
    const auto [rank, allocation] = cases[i];
    const TemporaryFolder folder;
    JobOptions options = ring_job(folder.file("out.h5"));
    options.environment.merge(std::map<std::string, std::string>{
        {"F_RANK", std::to_string(rank)}, {"F_ALLOCATION", std::to_string(allocation)}});
    const JobOutcome outcome = run_job(options);
    figures.add(outcome.seconds);
    const std::string what =
        "allocation " + std::to_string(allocation) + " of rank " + std::to_string(rank);
    expect_clean_end(outcome, what);
    if (outcome.exit_code == 0) {  // some library could do without
      EXPECT_EQ(results_of(folder.file("out.h5")), reference().results) << what;
      ++done_without;
      return;
    }
    EXPECT_EQ(outcome.exit_code, 71) << what << "\n" << outcome.err;
    EXPECT_LE(outcome.seconds, 10.0) << what;
    EXPECT_TRUE(says(outcome, "memory: [0-9]+ bytes wanted on the host, [0-9]+ available"))
        << what << "\n"
        << outcome.err;
    EXPECT_EQ(folder.listing(), std::vector<std::string>{}) << what;
  });
  figures.note("in " + std::to_string(done_without) + " of them the job did without the memory");
}

JobOptions job_alone(const std::vector<std::string>& arguments) {
  JobOptions options;
  options.ranks = 1;
  options.arguments = {"run", "--op", "ring"};
  options.arguments.insert(options.arguments.end(), arguments.begin(), arguments.end());
  return options;
}

JobOutcome run_alone(const std::vector<std::string>& arguments) {
  return run_job(job_alone(arguments));
}

TEST(Promise14, AllProblemsOfAnInputAreNamedInOneRun) {
  const TemporaryFolder folder;
  const std::string path = folder.file("in.h5");
  write_zeros(path, "query", {1, 64, 4, 16});
  write_zeros(path, "key", {1, 64, 4, 32});
  write_zeros(path, "value", {64, 4, 16});
  const JobOutcome wrong =
      run_alone({"--input", path, "--query", "query", "--key", "key", "--value", "value"});
  EXPECT_EQ(wrong.exit_code, 65) << wrong.err;
  EXPECT_TRUE(says(wrong, "key")) << wrong.err;
  EXPECT_TRUE(says(wrong, "value")) << wrong.err;
  const JobOutcome missing =
      run_alone({"--input", path, "--query", "query", "--key", "nokey", "--value", "novalue"});
  EXPECT_EQ(missing.exit_code, 66) << missing.err;
  EXPECT_TRUE(says(missing, "nokey")) << missing.err;
  EXPECT_TRUE(says(missing, "novalue")) << missing.err;
  EXPECT_EQ(run_alone({"--input", folder.file("none.h5")}).exit_code, 66);
}

TEST(Promise15, AHugeClaimIsRefusedBeforeMemoryIsTaken) {
  Figures figures("15");
  const TemporaryFolder folder;
  const std::string path = folder.file("in.h5");
  constexpr unsigned long long kHuge = 1ULL << 40;
  for (const char* name : {"query", "key", "value"}) {
    write_zeros(path, name, {1, kHuge, 1ULL << 10, 1ULL << 10}, true);
  }
  const Counts counts = count_points(job_alone({"--input", path}));
  figures.add(counts.outcome.seconds);
  figures.note(std::to_string(counts.peak_kib[0] / 1024) + " MiB resident");
  const int code = counts.outcome.exit_code;
  EXPECT_TRUE(code == 65 || code == 71) << code << "\n" << counts.outcome.err;
  JobOptions loading = job_alone({});
  loading.arguments = {"--version"};
  const long loaded = count_points(loading).peak_kib[0];
  figures.note(std::to_string(loaded / 1024) + " MiB of them by loading the program");
  constexpr long kBound = 100 * 1024;
  EXPECT_LT(counts.peak_kib[0], kBound);
}

TEST(Promise21, RanksThatAreEachAloneAreRefused) {
  JobOptions options;
  options.ranks = 1;
  options.arguments = {"run", "--op", "ring", "--input", sample_file()};
  options.environment = {{"SLURM_STEP_ID", "0"}, {"SLURM_NTASKS", "4"}};
  const JobOutcome outcome = run_job(options);
  EXPECT_EQ(outcome.exit_code, 64) << outcome.err;
  EXPECT_TRUE(says(outcome, "4 tasks")) << outcome.err;
}

}  // namespace
}  // namespace annulus::testing
