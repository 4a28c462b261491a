// Promise 27: errors that grow with the length of the sequence would show in a million keys.

#include <filesystem>
#include <nlohmann/json.hpp>

#include "launch/qkv_file.hpp"
#include "reliability/matrix_case.hpp"

namespace annulus::testing {
namespace {

TEST(Promise27, AMillionKeysInFp32) {
  Figures figures("27");
  const TemporaryFolder folder;
  QkvFile file;
  file.query = {1, 64, 1, 16};
  file.key = {1, 1 << 20, 1, 16};
  file.value = file.key;
  file.write(folder.file("in.h5"));
  JobOptions options;
  options.arguments = {"run",      "--op",
                       "ring",     "--mesh",
                       "sp=4",     "--no-causal",
                       "--input",  folder.file("in.h5"),
                       "--output", folder.file("out.h5")};
  const JobOutcome outcome = run_job(options);
  figures.add(outcome.seconds);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const Outcome verify =
      run_annulus(0, {"verify", folder.file("out.h5"), "--input", folder.file("in.h5"), "--json"});
  ASSERT_EQ(verify.exit_code, 0) << verify.err;
  const auto found = nlohmann::json::parse(verify.out);
  figures.note("max error " + found["max_error"].dump() + " in " + found["rows"].dump() + " rows");
  // Normal values reach 5 among so many; the bound is 1e-6 of the largest.
  EXPECT_LE(found["max_error"].get<double>(), 5e-6);
  EXPECT_GT(found["rows"].get<int>(), 0);
}

}  // namespace
}  // namespace annulus::testing
