#include "runtime/rates_file.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "kernels/error.hpp"

namespace annulus {
namespace {

class RatesFile : public testing::Test {
 protected:
  void SetUp() override { write_rates(path_, written()); }
  void TearDown() override { std::filesystem::remove(path_); }

  static Rates written() {
    Rates rates;
    rates.tile_rows = 128;
    rates.forward_flops = 3e14;
    rates.backward_flops = 2e14;
    rates.forward_tile_seconds = 1e-7;
    rates.backward_tile_seconds = 2e-7;
    rates.one_launch = true;
    rates.one_device = true;
    return rates;
  }

  /// What is said of the file with another value for a key.
  std::string said_of(const std::string& key, const nlohmann::json& value) const {
    nlohmann::json json = nlohmann::json::parse(std::ifstream(path_));
    json.at(key) = value;
    std::ofstream(path_) << json;
    try {
      read_rates(path_);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::bad_data);
      return error.what();
    }
    return "nothing";
  }

  std::string path_ = testing::TempDir() + "annulus-rates-" + std::to_string(getpid()) + ".json";
};

TEST_F(RatesFile, ComesBackAsItWasWritten) {
  const Rates read = read_rates(path_);
  EXPECT_EQ(read.tile_rows, 128);
  EXPECT_EQ(read.forward_flops, 3e14);
  EXPECT_EQ(read.backward_flops, 2e14);
  EXPECT_EQ(read.forward_tile_seconds, 1e-7);
  EXPECT_EQ(read.backward_tile_seconds, 2e-7);
  EXPECT_TRUE(read.one_launch);
  EXPECT_TRUE(read.one_device);
}

TEST_F(RatesFile, RefusesTimesBelowZero) {
  for (const char* key :
       {"latency_seconds", "call_seconds", "forward_tile_seconds", "backward_tile_seconds"}) {
    EXPECT_EQ(said_of(key, -0.5), "rates: " + path_ + ": a time of -0.5 s; accepted: 0 or more")
        << key;
    write_rates(path_, written());
  }
}

TEST_F(RatesFile, RefusesTilesWithoutRows) {
  EXPECT_EQ(said_of("tile_rows", 0), "rates: " + path_ + ": tiles of 0 rows; accepted: 1 or more");
}

}  // namespace
}  // namespace annulus
