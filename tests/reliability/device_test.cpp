// Promise 6 on a GPU: ranks that share one and talk by NCCL, which fails, hangs or loses a peer.

#include "kernels/cuda_support.hpp"
#include "reliability/matrix_case.hpp"
#include "runtime/nccl_communicator.hpp"

namespace annulus::testing {
namespace {

// A device's context and NCCL's start take seconds, more beside another job.
constexpr double kDeviceTimeoutSeconds = 6.0;

JobOptions nccl_job(const std::string& output, const std::string& act) {
  JobOptions options;
  options.ranks = 2;
  options.arguments = {"run",         "--op",      "ring",
                       "--mesh",      "sp=2",      "--backend",
                       "cuda",        "--dtype",   "bf16",
                       "--transport", "nccl",      "--input",
                       sample_file(), "--causal",  "--output",
                       output,        "--timeout", std::to_string(kDeviceTimeoutSeconds)};
  options.environment = {{"F_RANK", "1"}, {"F_NCCL", act}, {"NCCL_NVLS_ENABLE", "0"}};
  return options;
}

TEST(Promise06, NcclThatFailsOrHangsEndsTheJob) {
  if (!has_nccl() || kernels::cuda::device_count() == 0) GTEST_SKIP() << "no NCCL or no GPU";
  Figures figures("6");
  for (const std::string act : {"error", "stuck", "stop", "kill"}) {
    const TemporaryFolder folder;
    const JobOutcome outcome = run_job(nccl_job(folder.file("out.h5"), act));
    figures.add(outcome.seconds);
    figures.note(act + " " + std::to_string(outcome.seconds) + " s");
    EXPECT_EQ(outcome.exit_code, act == "kill" ? 137 : 75) << act << "\n" << outcome.err;
    EXPECT_LE(outcome.seconds, kDeviceTimeoutSeconds + 10.0) << act;
    EXPECT_TRUE(says(outcome, act == "kill" ? "signal 9" : "nccl: ")) << act << "\n" << outcome.err;
    EXPECT_EQ(folder.listing(), std::vector<std::string>{}) << act;
    expect_clean_end(outcome, act);
  }
}

}  // namespace
}  // namespace annulus::testing
