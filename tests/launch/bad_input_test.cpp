#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "launch/program.hpp"
#include "launch/qkv_file.hpp"

namespace annulus::testing {
namespace {

struct BadInput {
  std::string name;
  int exit_code = 64;
  std::vector<std::string> words;      // that the message has to hold
  std::vector<std::string> arguments;  // besides --input and --output
  QkvFile file;
  std::string output = "out.h5";
};

std::ostream& operator<<(std::ostream& stream, const BadInput& bad) { return stream << bad.name; }

class BadInputTest : public ::testing::TestWithParam<BadInput> {};

// What, where, expected and found in one line, the exit code, and no output.
TEST_P(BadInputTest, IsRefusedInOneLine) {
  const BadInput& bad = GetParam();
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  bad.file.write(input);
  std::vector<std::string> arguments = {"run", "--input", input, "--output",
                                        folder.file(bad.output)};
  arguments.insert(arguments.end(), bad.arguments.begin(), bad.arguments.end());
  const Outcome outcome = run_annulus(2, arguments);
  EXPECT_EQ(outcome.exit_code, bad.exit_code) << outcome.err;
  const std::vector<std::string> messages = outcome.messages();
  ASSERT_EQ(messages.size(), 1U) << outcome.err;
  for (const std::string& word : bad.words) {
    EXPECT_NE(messages[0].find(word), std::string::npos) << "no \"" << word << "\" in\n"
                                                         << messages[0];
  }
  EXPECT_EQ(outcome.out, "");
  EXPECT_EQ(folder.listing(),
            bad.file.absent ? std::vector<std::string>{} : std::vector<std::string>{"in.h5"});
}

const std::vector<std::string> kRing = {"--op", "ring", "--mesh", "sp=2"};

std::vector<BadInput> bad_inputs() {
  std::vector<BadInput> all;
  const auto add = [&](const std::string& name, int code, std::vector<std::string> words,
                       std::vector<std::string> arguments = kRing) -> QkvFile& {
    all.push_back({name, code, std::move(words), std::move(arguments), {}, "out.h5"});
    return all.back().file;
  };
  add("missing_file", 66, {"in.h5"}).absent = true;
  add("missing_dataset", 66, {"in.h5", "nowhere", "query"},
      {"--op", "ring", "--mesh", "sp=2", "--query", "nowhere", "--key", "key", "--value", "value"});
  add("no_value", 66, {"in.h5", "value"}).value = {};
  add("rank_3", 65, {"in.h5", "query", "[2, 12, 16]", "batch"}).query = {2, 12, 16};
  add("integers", 65, {"in.h5", "query", "i32", "f32, f16, bf16"}).integer_query = true;
  add("batch", 65, {"in.h5", "batch", "1", "2"}).key = {1, 12, 2, 16};
  add("heads_do_not_group", 65, {"in.h5", "6", "4"}).set_heads(6, 4);
  add("head_dim", 65, {"in.h5", "16", "8"}).key = {2, 12, 2, 8};
  add("mesh", 64, {"sp=3", "3", "2"}, {"--op", "ring", "--mesh", "sp=3"});
  add("mesh_axis", 64, {"xx", "sp"}, {"--op", "ring", "--mesh", "xx=2"});
  add("operation", 64, {"rong", "ring", "ulysses", "flash_attn2", "vanilla"},
      {"--op", "rong", "--mesh", "sp=2"});
  add("truncated", 65, {"in.h5", "truncated"}).truncate_to = 0.5;
  add("no_hdf5", 65, {"in.h5", "HDF5"}).garbage = true;
  add("option", 64, {"--windoww"}, {"--op", "ring", "--windoww", "3"});
  add("value_of_option", 64, {"--soft-cap", "-3"}, {"--op", "ring", "--soft-cap", "-3"});
  add("scale", 64, {"--scale", "nan", "finite"}, {"--op", "ring", "--scale", "nan"});
  add("large_scale", 64, {"--scale", "1e39", "finite"}, {"--op", "ring", "--scale", "1e39"});
  add("soft_cap", 64, {"--soft-cap", "inf", "finite"}, {"--op", "ring", "--soft-cap", "inf"});
  add("negative_seed", 64, {"--seed", "-1", "0 or more"}, {"--op", "ring", "--seed", "-1"});
  add("large_seed", 64, {"--seed", "18446744073709551616"},
      {"--op", "ring", "--seed", "18446744073709551616"});
  add("timeout", 64, {"--timeout", "inf", "at most 1000000000"},
      {"--op", "ring", "--timeout", "inf"});
  add("weights", 64, {"ring", "weights", "vanilla"},
      {"--op", "ring", "--mesh", "sp=2", "--weights"});
  add("rates", 64, {"--rates", "auto", "ring"},
      {"--op", "ring", "--mesh", "sp=2", "--rates", "rates.json"});
  add("no_rates", 66, {"rates.json", "--rates-out"},
      {"--op", "auto", "--mesh", "sp=2", "--rates", "rates.json"});
  add("trace_folder", 73, {"nowhere/t.json"},
      {"--op", "ring", "--mesh", "sp=2", "--trace", "nowhere/t.json"});
  add("output_folder", 73, {"nowhere/out.h5"});
  all.back().output = "nowhere/out.h5";
  return all;
}

INSTANTIATE_TEST_SUITE_P(Cases, BadInputTest, ::testing::ValuesIn(bad_inputs()),
                         [](const auto& info) { return info.param.name; });

TEST(BadInput, AnExistingOutputIsKeptUnlessForced) {
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  const std::string output = folder.file("out.h5");
  QkvFile{}.write(input);
  QkvFile{}.write(output);
  const std::string before = content_of(output);
  std::vector<std::string> arguments = {"run",     "--op", "ring",     "--mesh", "sp=2",
                                        "--input", input,  "--output", output};
  const Outcome refused = run_annulus(2, arguments);
  EXPECT_EQ(refused.exit_code, 73);
  ASSERT_EQ(refused.messages().size(), 1U) << refused.err;
  EXPECT_NE(refused.messages()[0].find("--force"), std::string::npos) << refused.messages()[0];
  EXPECT_EQ(content_of(output), before);
  arguments.emplace_back("--force");
  EXPECT_EQ(run_annulus(2, arguments).exit_code, 0);
  EXPECT_NE(content_of(output), before);
  EXPECT_EQ(folder.listing(), (std::vector<std::string>{"in.h5", "out.h5"}));
}

TEST(BadInput, AnInputIsNoPlaceForAnOutput) {
  const TemporaryFolder folder;
  const std::string input = folder.file("in.h5");
  QkvFile{}.write(input);
  std::filesystem::create_symlink(input, folder.file("link.h5"));
  std::filesystem::create_hard_link(input, folder.file("hard.h5"));
  const std::string before = content_of(input);
  const auto refused = [&](std::vector<std::string> arguments) {
    std::vector<std::string> all = {ANNULUS_PROGRAM, "run", "--op",   "ring",
                                    "--input",       input, "--force"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    const Outcome outcome = run_program(all);
    EXPECT_EQ(outcome.exit_code, 64) << outcome.err;
    ASSERT_EQ(outcome.messages().size(), 1U) << outcome.err;
    EXPECT_NE(outcome.messages()[0].find("are the same file"), std::string::npos)
        << outcome.messages()[0];
    EXPECT_EQ(content_of(input), before);
  };
  for (const char* option : {"--output", "--trace"}) {
    for (const std::string& path :
         {input, folder.file("./in.h5"), folder.file("link.h5"), folder.file("hard.h5")}) {
      refused({option, path});
    }
  }
  refused({"--output", folder.file("out"), "--trace", folder.file("./out")});
  EXPECT_EQ(folder.listing(), (std::vector<std::string>{"hard.h5", "in.h5", "link.h5"}));
}

TEST(BadInput, AReportThatDoesNotArriveIsAnError) {
  for (const std::string arguments : {"ops", "--version", "run --help", "plan --json"}) {
    const Outcome outcome =
        run_program({"sh", "-c", std::string(ANNULUS_PROGRAM) + " " + arguments + " >/dev/full"});
    EXPECT_EQ(outcome.exit_code, 74) << arguments << ": " << outcome.err;
    ASSERT_EQ(outcome.messages().size(), 1U) << outcome.err;
    EXPECT_NE(outcome.messages()[0].find("No space left on device"), std::string::npos)
        << outcome.messages()[0];
  }
}

TEST(BadInput, MoreThreadsThanThereCanBeAreRefused) {
  const Outcome outcome = run_program(
      {"sh", "-c", std::string("OMP_NUM_THREADS=99999999 ") + ANNULUS_PROGRAM + " ops"});
  EXPECT_EQ(outcome.exit_code, 64) << outcome.err;
  ASSERT_EQ(outcome.messages().size(), 1U) << outcome.err;
  EXPECT_NE(outcome.messages()[0].find("OMP_NUM_THREADS: 99999999"), std::string::npos)
      << outcome.messages()[0];
}

TEST(BadInput, AWrongCommandListsTheCommands) {
  const Outcome outcome = run_annulus(0, {"walk"});
  EXPECT_EQ(outcome.exit_code, 64);
  EXPECT_EQ(outcome.err.rfind("rank 0: annulus: no command \"walk\"; there are run, verify", 0), 0U)
      << outcome.err;
}

}  // namespace
}  // namespace annulus::testing
