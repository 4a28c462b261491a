#include "launch/info.hpp"

#include <fmt/format.h>
#include <hdf5.h>
#include <mpi.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/cuda_support.hpp"
#include "launch/parse.hpp"
#include "runtime/context.hpp"
#include "runtime/nccl_communicator.hpp"

namespace annulus::launch {
namespace {

constexpr std::size_t kHostLength = 64;
using HostName = std::array<char, kHostLength>;

void line(const std::string& what, const std::string& value) {
  fmt::print("{:<10} {}\n", what, value);
}

std::string mpi_library() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  MPI_Get_library_version(text.data(), &length);
  const std::string_view all(text.data(), static_cast<std::size_t>(length));
  return std::string(all.substr(0, all.find(',')));
}

std::string hdf5_library() {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned release = 0;
  H5get_libversion(&major, &minor, &release);
#ifdef H5_HAVE_PARALLEL
  constexpr std::string_view kind = "parallel";
#else
  constexpr std::string_view kind = "serial";
#endif
  return fmt::format("{}.{}.{}, {}", major, minor, release, kind);
}

std::string backends() {
  std::string text;
  for (const AttentionBackend& backend : attention_backends()) {
    text += fmt::format("{}{} ({})", text.empty() ? "" : ", ", backend.name, name(backend.device));
  }
  return text;
}

std::vector<HostName> host_names(Communicator& ranks) {
  HostName mine{};
  gethostname(mine.data(), mine.size() - 1);
  std::vector<HostName> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)));
  return all;
}

void print_nodes(const Context& context, const std::vector<HostName>& hosts) {
  for (int node = 0; node < context.nodes(); ++node) {
    int first = -1;
    int ranks = 0;
    for (int rank = 0; rank < context.size(); ++rank) {
      if (context.node_of(rank) != node) continue;
      if (first < 0) first = rank;
      ++ranks;
    }
    line("node " + std::to_string(node),
         fmt::format("{}, {} rank{}", hosts[static_cast<std::size_t>(first)].data(), ranks,
                     ranks == 1 ? "" : "s"));
  }
}

}  // namespace

void show_info(Arguments arguments) {
  CLI::App app("The build, MPI, HDF5, kernels, devices and ranks per node.", "annulus info");
  if (!parse(app, arguments)) return;
  const Context context;
  const std::vector<HostName> hosts = host_names(context.world());
  if (context.rank() != 0) return;
  line("annulus", fmt::format("{}, {} build", ANNULUS_VERSION, ANNULUS_BUILD_TYPE));
  line("MPI", mpi_library());
  line("HDF5", hdf5_library());
  line("NCCL", has_nccl() ? nccl_version() : "not built in");
  line("kernels", backends());
  line("devices", fmt::format("{} on the node of rank 0", kernels::cuda::device_count()));
  line("ranks", fmt::format("{} on {} node{}", context.size(), context.nodes(),
                            context.nodes() == 1 ? "" : "s"));
  print_nodes(context, hosts);
}

}  // namespace annulus::launch
