#include "launch/options.hpp"

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "kernels/error.hpp"
#include "launch/program.hpp"

namespace annulus::launch {
namespace {

using annulus::testing::TemporaryFolder;

RunOptions parsed(std::vector<std::string> more) {
  std::vector<std::string> arguments = {"--op", "ring", "--input", "in.h5"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return parse_run_options(arguments).value();
}

std::string refusal(std::vector<std::string> more, ExitCode code = ExitCode::usage) {
  try {
    static_cast<void>(parsed(std::move(more)));
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    return error.what();
  }
  return "accepted";
}

TEST(RunOptions, DefaultsLeaveTheChoiceToTheOperation) {
  const RunOptions options = parsed({});
  EXPECT_EQ(options.causal, std::nullopt);
  EXPECT_EQ(options.scale, std::nullopt);
  EXPECT_EQ(options.dtype, std::nullopt);
  EXPECT_EQ(options.window, (std::array<std::int64_t, 2>{-1, -1}));
  EXPECT_EQ(options.layout, "contiguous");
  EXPECT_EQ(options.transport, "auto");
  EXPECT_EQ(options.input.layout, InputLayout::bthd);
}

TEST(RunOptions, EveryOptionOfTheCommandLineIsRead) {
  const RunOptions options = parsed({"--mesh",
                                     "sp=4,tp=2",
                                     "--query",
                                     "a/q",
                                     "--key",
                                     "a/k",
                                     "--value",
                                     "a/v",
                                     "--causal",
                                     "--window",
                                     "128,0",
                                     "--documents",
                                     "d",
                                     "--mask",
                                     "m",
                                     "--bias",
                                     "b",
                                     "--sinks",
                                     "s",
                                     "--soft-cap",
                                     "30",
                                     "--scale",
                                     "0.25",
                                     "--dropout",
                                     "0.1",
                                     "--seed",
                                     "7",
                                     "--dtype",
                                     "bf16",
                                     "--output-dtype",
                                     "f32",
                                     "--layout",
                                     "zigzag",
                                     "--backend",
                                     "cpu",
                                     "--transport",
                                     "mpi",
                                     "--backward",
                                     "--grad-output",
                                     "g",
                                     "--weights",
                                     "--reproducible",
                                     "--check-finite",
                                     "--timeout",
                                     "5",
                                     "--trace",
                                     "t.json",
                                     "--json",
                                     "--force",
                                     "--output",
                                     "o.h5",
                                     "--input-layout",
                                     "bhtd",
                                     "--cu-seqlens",
                                     "c"});
  EXPECT_EQ(options.mesh, "sp=4,tp=2");
  EXPECT_EQ(options.input.dataset(CheckpointField::query), "a/q");
  EXPECT_EQ(options.input.dataset(CheckpointField::key), "a/k");
  EXPECT_EQ(options.input.dataset(CheckpointField::value), "a/v");
  EXPECT_EQ(options.input.dataset(CheckpointField::documents), "d");
  EXPECT_EQ(options.input.dataset(CheckpointField::cu_seqlens), "c");
  EXPECT_EQ(options.input.dataset(CheckpointField::mask), "m");
  EXPECT_EQ(options.input.dataset(CheckpointField::bias), "b");
  EXPECT_EQ(options.input.dataset(CheckpointField::sinks), "s");
  EXPECT_EQ(options.input.dataset(CheckpointField::grad_output), "g");
  EXPECT_EQ(options.input.layout, InputLayout::bhtd);
  EXPECT_EQ(options.causal, true);
  EXPECT_EQ(options.window, (std::array<std::int64_t, 2>{128, 0}));
  EXPECT_EQ(options.soft_cap, 30.0F);
  EXPECT_EQ(options.scale, 0.25F);
  EXPECT_EQ(options.dropout, 0.1F);
  EXPECT_EQ(options.seed, 7U);
  EXPECT_EQ(options.dtype, DType::bf16);
  EXPECT_EQ(options.output_dtype, DType::f32);
  EXPECT_EQ(options.layout, "zigzag");
  EXPECT_EQ(options.backend, "cpu");
  EXPECT_EQ(options.transport, "mpi");
  EXPECT_TRUE(options.backward && options.weights && options.reproducible && options.check_finite &&
              options.json && options.force);
  EXPECT_EQ(options.timeout_seconds, 5.0);
  EXPECT_EQ(options.trace, "t.json");
  EXPECT_EQ(options.output, "o.h5");
}

TEST(RunOptions, TheTextOfARunGivesTheSameOptions) {
  for (const std::string flag : {"--causal", "--no-causal"}) {
    const RunOptions options = parsed({flag, "--window", "-1,5", "--scale", "0.125", "--dtype",
                                       "f16", "--query", "a b/\"q\"", "--input-layout", "bhtd"});
    const RunOptions restored = restore_run_options(options.text);
    EXPECT_EQ(restored.operation, "ring");
    EXPECT_EQ(restored.input.path, "in.h5");
    EXPECT_EQ(restored.causal, flag == "--causal");
    EXPECT_EQ(restored.window, options.window);
    EXPECT_EQ(restored.scale, options.scale);
    EXPECT_EQ(restored.dtype, DType::f16);
    EXPECT_EQ(restored.input.layout, InputLayout::bhtd);
  }
  EXPECT_EQ(restore_run_options(parsed({}).text).causal, std::nullopt);
}

TEST(RunOptions, AConfigurationFileHoldsOptionsAndTheCommandLineWins) {
  const TemporaryFolder folder;
  const std::string config = folder.file("run.toml");
  std::ofstream(config) << "op = \"ulysses\"\ninput = \"in.h5\"\nwindow = [3, 4]\nsoft-cap = 20\n";
  const std::vector<std::string> arguments = {"--config", config, "--soft-cap", "10"};
  const RunOptions options = parse_run_options(arguments).value();
  EXPECT_EQ(options.operation, "ulysses");
  EXPECT_EQ(options.window, (std::array<std::int64_t, 2>{3, 4}));
  EXPECT_EQ(options.soft_cap, 10.0F);
}

TEST(RunOptions, BadValuesAreRefusedInOneLine) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"--window", "3", "--json"}, "--window: --json is not a side of L,R"},
      {{"--window", "3,-2"}, "--window: -2 is not a side of L,R, each -1 or more"},
      {{"--window", "3,4,5"}, "--window"},
      {{"--soft-cap", "-1"}, "--soft-cap: -1 is not 0 or more"},
      {{"--dropout", "1"}, "--dropout: 1 is not in [0, 1)"},
      {{"--dtype", "f99"}, "--dtype: f99 not in {f32,bf16,f16}"},
      {{"--layout", "spiral"}, "contiguous"},
      {{"--seed", "x"}, "--seed"},
      {{"--timeout", "0"}, "--timeout: 0 is not above 0"},
      {{"--causal=maybe"}, "causal"},
      {{"--nothing"}, "--nothing"},
      {{"one", "two"}, "one"},
      {{"--op", "flash"}, "--op"},
  };
  for (const auto& [arguments, word] : cases) {
    const std::string message = refusal(arguments);
    EXPECT_NE(message.find(word), std::string::npos) << message;
    EXPECT_EQ(message.rfind("annulus run: ", 0), 0U) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_LT(message.size(), 160U) << message;
  }
  EXPECT_NE(refusal({"--config", "nowhere.toml"}, ExitCode::missing_input).find("nowhere.toml"),
            std::string::npos);
}

}  // namespace
}  // namespace annulus::launch
