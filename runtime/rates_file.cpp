#include "runtime/rates_file.hpp"

#include <fstream>
#include <nlohmann/json.hpp>

#include "kernels/error.hpp"
#include "runtime/text_file.hpp"

namespace annulus {

Rates read_rates(const std::string& path) {
  std::ifstream file(path);
  require(file.good(), ExitCode::missing_input,
          "rates: cannot read {}; accepted: a file that `annulus bench ring --rates-out` wrote",
          path);
  try {
    const nlohmann::json json = nlohmann::json::parse(file);
    Rates rates;
    rates.forward_flops = json.at("forward_flops");
    rates.backward_flops = json.at("backward_flops");
    rates.copy_bandwidth = json.at("copy_bandwidth");
    rates.node_bandwidth = json.at("node_bandwidth");
    rates.network_bandwidth = json.at("network_bandwidth");
    rates.latency_seconds = json.at("latency_seconds");
    rates.call_seconds = json.at("call_seconds");
    rates.node_ranks = json.at("node_ranks");
    rates.hides_node_transfers = json.at("hides_node_transfers");
    rates.reads_in_place = json.at("reads_in_place");
    rates.tile_rows = json.value("tile_rows", std::int64_t{1});
    rates.forward_tile_seconds = json.value("forward_tile_seconds", 0.0);
    rates.backward_tile_seconds = json.value("backward_tile_seconds", 0.0);
    rates.one_launch = json.value("one_launch", false);
    rates.one_device = json.value("one_device", false);
    for (const double rate : {rates.forward_flops, rates.backward_flops, rates.copy_bandwidth,
                              rates.node_bandwidth, rates.network_bandwidth}) {
      require(rate > 0.0, ExitCode::bad_data, "rates: {}: a rate of {}; accepted: above 0", path,
              rate);
    }
    for (const double seconds : {rates.latency_seconds, rates.call_seconds,
                                 rates.forward_tile_seconds, rates.backward_tile_seconds}) {
      require(seconds >= 0.0, ExitCode::bad_data, "rates: {}: a time of {} s; accepted: 0 or more",
              path, seconds);
    }
    require(rates.tile_rows > 0, ExitCode::bad_data,
            "rates: {}: tiles of {} rows; accepted: 1 or more", path, rates.tile_rows);
    require(rates.node_ranks > 0, ExitCode::bad_data,
            "rates: {}: {} ranks a node; accepted: 1 or more", path, rates.node_ranks);
    return rates;
  } catch (const nlohmann::json::exception& error) {
    throw Error(ExitCode::bad_data, fmt::format("rates: {}: {}", path, printable(error.what())));
  }
}

void write_rates(const std::string& path, const Rates& rates) {
  const nlohmann::json json{{"forward_flops", rates.forward_flops},
                            {"backward_flops", rates.backward_flops},
                            {"tile_rows", rates.tile_rows},
                            {"forward_tile_seconds", rates.forward_tile_seconds},
                            {"backward_tile_seconds", rates.backward_tile_seconds},
                            {"copy_bandwidth", rates.copy_bandwidth},
                            {"node_bandwidth", rates.node_bandwidth},
                            {"network_bandwidth", rates.network_bandwidth},
                            {"latency_seconds", rates.latency_seconds},
                            {"call_seconds", rates.call_seconds},
                            {"node_ranks", rates.node_ranks},
                            {"hides_node_transfers", rates.hides_node_transfers},
                            {"reads_in_place", rates.reads_in_place},
                            {"one_launch", rates.one_launch},
                            {"one_device", rates.one_device}};
  write_text("rates", path, json.dump(2) + '\n');
}

}  // namespace annulus
