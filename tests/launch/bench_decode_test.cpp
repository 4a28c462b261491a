#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "launch/program.hpp"

namespace annulus::testing {
namespace {

std::vector<std::string> tiny_bench() {
  return {"bench", "decode",     "--backend", "cpu",         "--shape", "2x64",      "--heads",
          "4:2",   "--head-dim", "16",        "--mla-heads", "2",       "--repeats", "1"};
}

TEST(BenchDecode, HasARowForEveryCache) {
  std::vector<std::string> arguments = tiny_bench();
  arguments.emplace_back("--json");
  const Outcome outcome = run_annulus(0, arguments);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const nlohmann::json rows = nlohmann::json::parse(outcome.out);
  ASSERT_EQ(rows.size(), 3U);
  // Keys and values of two heads, or the latent and rope parts of one, two bytes each.
  const double keys = 2.0 * 64.0;
  const double bytes[] = {keys * 2 * 2 * 16 * 2, keys * 2 * 2 * 16 * 2, keys * 576 * 2};
  const char* caches[] = {"contiguous", "paged 16", "mla 16"};
  for (std::size_t i = 0; i < 3; ++i) {
    const nlohmann::json& row = rows[i];
    EXPECT_TRUE(row.at("name").get<std::string>().ends_with(caches[i])) << row;
    EXPECT_EQ(row.at("direction"), "decode");
    EXPECT_EQ(row.at("batch"), 2);
    EXPECT_EQ(row.at("seq_q"), 1);
    EXPECT_EQ(row.at("seq_kv"), 64);
    EXPECT_EQ(row.at("unit"), "GB/s");
    EXPECT_GT(row.at("ceiling"), 0.0);
    const double moved = row.at("rate").get<double>() * row.at("seconds").get<double>() * 1e9;
    EXPECT_NEAR(moved, bytes[i], 1e-6 * bytes[i]);
  }
}

TEST(BenchDecode, RefusesWhatItCannotMeasure) {
  for (const auto& [option, value, word] : {std::tuple{"--shape", "8by32", "SEQUENCESxTOKENS"},
                                            {"--heads", "4:3", "KV divides QUERY"},
                                            {"--head-dim", "0", "1 to 512"},
                                            {"--page-size", "300", "1 to 256"},
                                            {"--cache", "ring", "contiguous"}}) {
    const Outcome outcome = run_annulus(0, {"bench", "decode", option, value});
    EXPECT_EQ(outcome.exit_code, 64) << option;
    EXPECT_NE(outcome.err.find(word), std::string::npos) << outcome.err;
  }
}

}  // namespace
}  // namespace annulus::testing
