#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "launch/program.hpp"
#include "launch/qkv_file.hpp"

namespace annulus::testing {
namespace {

struct Case {
  std::string name;
  int ranks = 1;
  std::vector<std::string> arguments;
  bool stored_reference = true;  // the file's own reference answers the same question
};

std::ostream& operator<<(std::ostream& stream, const Case& one) { return stream << one.name; }

std::vector<std::string> operator+(std::vector<std::string> a, const std::vector<std::string>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

class RunTest : public ::testing::TestWithParam<Case> {};

// The output is checked against a recomputation in double and the reference stored in the sample.
TEST_P(RunTest, EqualsTheReference) {
  const Case& one = GetParam();
  const TemporaryFolder folder;
  const std::string output = folder.file("out.h5");
  const Outcome run = run_annulus(
      one.ranks,
      std::vector<std::string>{"run", "--input", sample_file(), "--output", output, "--json"} +
          one.arguments);
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(nlohmann::json::parse(run.out)["ranks"], one.ranks);
  const Outcome verify = run_annulus(0, {"verify", output, "--input", sample_file(), "--json"});
  ASSERT_EQ(verify.exit_code, 0) << verify.out << verify.err;
  const nlohmann::json errors = nlohmann::json::parse(verify.out);
  EXPECT_LE(errors["max_error"], 2e-5);
  EXPECT_LE(errors["max_error_log_sum_exp"], 2e-5);
  EXPECT_GT(errors["rows"], 100);
  if (one.stored_reference) {
    EXPECT_LE(errors["max_error_stored_reference"], 2e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RunTest,
    ::testing::Values(
        Case{"ring_sp4", 4, {"--op", "ring", "--mesh", "sp=4"}},
        Case{"ring_sp2_tp3", 6, {"--op", "ring", "--mesh", "sp=2,tp=3", "--causal"}},
        Case{"ulysses_sp2_tp2", 4, {"--op", "ulysses", "--mesh", "sp=2,tp=2", "--causal"}},
        Case{"flash_tp3", 3, {"--op", "flash", "--mesh", "tp=3", "--causal"}},
        Case{"vanilla", 1, {"--op", "vanilla", "--causal", "--weights"}},
        Case{"ring_zigzag", 2, {"--op", "ring", "--layout", "zigzag"}}),
    [](const auto& info) { return info.param.name; });

Outcome run_sample(const TemporaryFolder& folder, int ranks,
                   const std::vector<std::string>& arguments) {
  return run_annulus(ranks, std::vector<std::string>{"run", "--input", sample_file(), "--output",
                                                     folder.file("out.h5")} +
                                arguments);
}

TEST(Run, OneLineReportsOnRankZero) {
  const TemporaryFolder folder;
  const Outcome run = run_sample(folder, 2, {"--op", "ring"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(run.err, "");
  EXPECT_EQ(run.out.find('\n'), run.out.size() - 1) << run.out;
  for (const std::string word :
       {"ring over", "sp=2", "TFLOP/s", "compute", "exposed communication", "sent", "imbalance"}) {
    EXPECT_NE(run.out.find(word), std::string::npos) << run.out;
  }
}

// The launcher ends the other ranks when it sees the first one fail: they have nothing to add.
TEST(Run, AFailureOfAllRanksIsOneLine) {
  const TemporaryFolder folder;
  for (int repeat = 0; repeat < 10; ++repeat) {
    const Outcome outcome = run_annulus(4, {"run", "--op", "ring", "--input", sample_file(),
                                            "--key", "nosuch", "--output", folder.file("out.h5")});
    EXPECT_EQ(outcome.exit_code, 66) << outcome.err;
    EXPECT_EQ(outcome.messages().size(), 1U) << outcome.err;
    EXPECT_EQ(outcome.err.find("SIGTERM"), std::string::npos) << outcome.err;
    EXPECT_TRUE(folder.listing().empty());
  }
}

TEST(Run, JsonHasTheDocumentedKeys) {
  const TemporaryFolder folder;
  const Outcome run = run_sample(folder, 2, {"--op", "ulysses", "--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const nlohmann::json json = nlohmann::json::parse(run.out);
  for (const std::string key :
       {"operation", "mesh", "ranks", "seconds", "compute_seconds", "exposed_communication_seconds",
        "bytes_sent", "imbalance", "tflops"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_EQ(json["operation"], "ulysses");
  EXPECT_GT(json["bytes_sent"], 0);
}

TEST(Run, OtherToolsReadTheOutput) {
  const TemporaryFolder folder;
  const std::string output = folder.file("out.h5");
  ASSERT_EQ(run_sample(folder, 2, {"--op", "ring"}).exit_code, 0);
  const Outcome dump = run_program({"h5dump", "-H", output});
  EXPECT_EQ(dump.exit_code, 0) << dump.err;
  for (const std::string word :
       {"GROUP \"output\"", "DATASET \"attention_outputs\"", "( 1, 1024, 9, 64 )",
        "DATASET \"log_sum_exp\"", "ATTRIBUTE \"operation\"", "ATTRIBUTE \"input_digest\""}) {
    EXPECT_NE(dump.out.find(word), std::string::npos) << word << "\n" << dump.out;
  }
  const Outcome reading = run_program(
      {python(), "-c",
       "import h5py, sys\n"
       "o = h5py.File(sys.argv[1])['output']\n"
       "i = h5py.File(sys.argv[2])['layers/14/attention']\n"
       "assert o.attrs['operation'].decode() == 'ring', o.attrs['operation']\n"
       "print(abs(o['attention_outputs'][:] - i['attention_outputs'][:]).max() < 2e-5)\n",
       output, sample_file()});
  EXPECT_EQ(reading.out, "True\n") << reading.err;
}

TEST(Run, AConfigurationFileAndTheKeptOptionsStartTheSameRun) {
  const TemporaryFolder folder;
  ASSERT_EQ(run_sample(folder, 2, {"--op", "ring", "--window", "100,0"}).exit_code, 0);
  const Outcome kept =
      run_program({python(), "-c",
                   "import h5py, sys\n"
                   "print(h5py.File(sys.argv[1])['output'].attrs['options'].decode())\n",
                   folder.file("out.h5")});
  ASSERT_EQ(kept.exit_code, 0) << kept.err;
  write_text(folder.file("run.toml"), kept.out);
  const std::string first = content_of(folder.file("out.h5"));
  const Outcome again = run_annulus(2, {"run", "--config", folder.file("run.toml"), "--force"});
  EXPECT_EQ(again.exit_code, 0) << again.err;
  const Outcome verify =
      run_annulus(2, {"verify", folder.file("out.h5"), "--input", sample_file()});
  EXPECT_EQ(verify.exit_code, 0) << verify.out << verify.err;
  EXPECT_NE(verify.out.find("causal, window 100,0"), std::string::npos) << verify.out;
}

TEST(Run, EveryMaskAndOptionOfAFileIsVerified) {
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  QkvFile file;
  file.query = {2, 61, 6, 32};
  file.key = file.value = {2, 61, 2, 32};
  file.extras = true;
  file.write(input);
  const std::vector<std::vector<std::string>> cases = {
      {"--op", "ring", "--documents", "documents"},
      {"--op", "ulysses", "--cu-seqlens", "cu_seqlens", "--no-causal"},
      {"--op", "ring", "--sinks", "sinks", "--soft-cap", "3", "--window", "20,4", "--no-causal"},
      {"--op", "vanilla", "--bias", "bias", "--scale", "0.3"},
      {"--op", "ring", "--scale", "30"},
      {"--op", "ring", "--scale", "0"},
      {"--op", "ulysses", "--scale", "-1"},
      {"--op", "ring", "--causal", "--no-causal"},
      {"--op", "flash", "--mask", "mask"},
      {"--op", "flash", "--dropout", "0.2", "--seed", "11", "--mesh", "dp=2"},
      {"--op", "ring", "--dtype", "bf16", "--output-dtype", "f32"},
  };
  for (const std::vector<std::string>& arguments : cases) {
    const std::string output = folder.file("out.h5");
    const Outcome run = run_annulus(
        2, std::vector<std::string>{"run", "--input", input, "--output", output, "--force"} +
               arguments);
    EXPECT_EQ(run.exit_code, 0) << run.err;
    const Outcome verify = run_annulus(0, {"verify", output, "--input", input});
    EXPECT_EQ(verify.exit_code, 0) << arguments[1] << arguments[2] << "\n"
                                   << verify.out << verify.err;
  }
}

TEST(Run, NumbersThatAreNotFiniteAreNamed) {
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  QkvFile file;
  file.nan_at = 5 * 2 * 16 + 16 + 3;  // [0, 5, 1, 3]
  file.write(input);
  const Outcome run = run_annulus(2, {"run", "--op", "ring", "--input", input, "--check-finite"});
  EXPECT_EQ(run.exit_code, 65);
  ASSERT_EQ(run.messages().size(), 1U) << run.err;
  EXPECT_NE(run.messages()[0].find("query is nan at [0, 5, 1, 3] on rank 0"), std::string::npos)
      << run.messages()[0];
}

TEST(Verify, CountsRowsThatAreNotFinite) {
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  const std::string output = folder.file("out.h5");
  QkvFile file;
  file.nan_at = 5 * 2 * 16 + 16 + 3;  // of the query [0, 5, 1], whose row alone has it
  file.write(input);
  ASSERT_EQ(run_annulus(2, {"run", "--op", "ring", "--input", input, "--output", output}).exit_code,
            0);
  const Outcome verify = run_annulus(0, {"verify", output, "--input", input, "--json"});
  EXPECT_EQ(verify.exit_code, 0) << verify.out << verify.err;
  EXPECT_EQ(nlohmann::json::parse(verify.out).at("rows_not_finite"), 1);
}

TEST(Verify, FindsAWrongOutput) {
  const TemporaryFolder folder;
  ASSERT_EQ(run_sample(folder, 1, {"--op", "flash", "--causal"}).exit_code, 0);
  // The same options say "causal"; results without it are wrong for them.
  const std::string wrong = folder.file("wrong.h5");
  ASSERT_EQ(run_annulus(1, {"run", "--op", "flash", "--no-causal", "--input", sample_file(),
                            "--output", wrong})
                .exit_code,
            0);
  const Outcome swapped =
      run_program({python(), "-c",
                   "import h5py, sys\n"
                   "good, wrong = h5py.File(sys.argv[1]), h5py.File(sys.argv[2], 'a')\n"
                   "wrong['output'].attrs['options'] = good['output'].attrs['options']\n",
                   folder.file("out.h5"), wrong});
  ASSERT_EQ(swapped.exit_code, 0) << swapped.err;
  const Outcome verify = run_annulus(0, {"verify", wrong, "--input", sample_file()});
  EXPECT_EQ(verify.exit_code, 65) << verify.out;
  EXPECT_EQ(verify.messages().size(), 1U) << verify.err;
}

TEST(Verify, RecomputesGradientsOfEveryMaskAndOption) {
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  const std::string output = folder.file("out.h5");
  QkvFile file;
  file.query = {2, 61, 6, 32};
  file.key = file.value = {2, 61, 2, 32};
  file.extras = true;
  file.write(input);
  const std::vector<std::vector<std::string>> cases = {
      {"--op", "ring", "--documents", "documents", "--layout", "balanced"},
      {"--op", "ulysses", "--no-causal"},
      {"--op", "ring", "--sinks", "sinks", "--soft-cap", "3", "--window", "20,4", "--no-causal"},
      {"--op", "flash", "--dropout", "0.2", "--seed", "11", "--mask", "mask"},
      {"--op", "flash", "--bias", "bias"},
      {"--op", "ring", "--dtype", "bf16"},
  };
  for (const std::vector<std::string>& arguments : cases) {
    const std::vector<std::string> common = {"run",           "--input", input,
                                             "--output",      output,    "--force",
                                             "--grad-output", "query",   "--backward"};
    const Outcome run = run_annulus(2, common + arguments);
    EXPECT_EQ(run.exit_code, 0) << run.err;
    const Outcome verify = run_annulus(2, {"verify", output, "--input", input, "--json"});
    EXPECT_EQ(verify.exit_code, 0) << arguments[1] << arguments[2] << "\n"
                                   << verify.out << verify.err;
    const nlohmann::json found = nlohmann::json::parse(verify.out);
    EXPECT_EQ(found.at("rows_grad_query"), 2 * 61 * 6);
    EXPECT_EQ(found.at("rows_grad_key"), 2 * 61 * 2);
    EXPECT_EQ(found.at("rows_grad_value"), 2 * 61 * 2);
  }
}

// Two parts of the query heads need the second of three KV heads; one of them writes its gradient.
TEST(Run, WritesGradientsOfHeadsThatSeveralRanksShare) {
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  const std::string output = folder.file("out.h5");
  QkvFile file;
  file.query = {2, 20, 6, 16};
  file.key = file.value = {2, 20, 3, 16};
  file.write(input);
  for (const auto& [ranks, mesh] : {std::pair{2, "tp=2"}, std::pair{4, "sp=2,tp=2"}}) {
    const Outcome run =
        run_annulus(ranks, {"run", "--op", "ring", "--mesh", mesh, "--input", input, "--output",
                            output, "--force", "--backward", "--grad-output", "query"});
    ASSERT_EQ(run.exit_code, 0) << run.err;
    const Outcome verify = run_annulus(0, {"verify", output, "--input", input});
    EXPECT_EQ(verify.exit_code, 0) << mesh << "\n" << verify.out << verify.err;
  }
}

// With one key dP is delta: what is left of dQ and dK are roundings of O, whatever its norm.
TEST(Verify, AcceptsGradientsThatCancel) {
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  const std::string output = folder.file("out.h5");
  for (const std::uint64_t queries : {1, 64}) {
    QkvFile file;
    file.query = {1, queries, 4, 16};
    file.key = file.value = {1, 1, 2, 16};
    file.write(input);
    for (const char* dtype : {"f32", "bf16"}) {
      const Outcome run =
          run_annulus(0, {"run", "--op", "flash", "--input", input, "--output", output, "--force",
                          "--output-dtype", dtype, "--backward", "--grad-output", "query"});
      ASSERT_EQ(run.exit_code, 0) << run.err;
      const Outcome verify = run_annulus(0, {"verify", output, "--input", input});
      EXPECT_EQ(verify.exit_code, 0) << queries << " " << dtype << "\n" << verify.out;
    }
  }
}

TEST(Verify, FindsAWrongGradient) {
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  const std::string output = folder.file("out.h5");
  QkvFile().write(input);
  for (const std::string name : {"query", "key", "value"}) {
    const Outcome run = run_annulus(2, {"run", "--op", "ring", "--input", input, "--output", output,
                                        "--force", "--backward", "--grad-output", "query"});
    ASSERT_EQ(run.exit_code, 0) << run.err;
    const Outcome spoiled =
        run_program({python(), "-c",
                     "import h5py, sys\n"
                     "h5py.File(sys.argv[1], 'a')['output/grad_' + sys.argv[2]][1, -1] += 0.01\n",
                     output, name});
    ASSERT_EQ(spoiled.exit_code, 0) << spoiled.err;
    const Outcome verify = run_annulus(0, {"verify", output, "--input", input});
    EXPECT_EQ(verify.exit_code, 65) << name << "\n" << verify.out;
    EXPECT_NE(verify.err.find("gradients are"), std::string::npos) << verify.err;
  }
}

TEST(Ops, ListsEveryOperationWithItsAliases) {
  const Outcome ops = run_annulus(0, {"ops"});
  EXPECT_EQ(ops.exit_code, 0);
  for (const std::string word : {"vanilla", "flash_attn2 (flash)", "ring", "ulysses"}) {
    EXPECT_NE(ops.out.find(word), std::string::npos) << ops.out;
  }
}

TEST(Info, CountsRanksAndNodes) {
  const Outcome info = run_annulus(2, {"info"});
  EXPECT_EQ(info.exit_code, 0);
  for (const std::string word : {"Open MPI", "HDF5", "2 on 1 node", "reference (cpu)"}) {
    EXPECT_NE(info.out.find(word), std::string::npos) << info.out;
  }
}

}  // namespace
}  // namespace annulus::testing
