#include "runtime/hdf5_loader.hpp"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/checkpoint.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus::test {
namespace {

constexpr std::int64_t kMostElements = 1 << 17;

// A file without a place on any disk.
class MemoryFile {
 public:
  explicit MemoryFile(std::span<const std::uint8_t> bytes)
      : descriptor_(memfd_create("annulus_fuzz", MFD_CLOEXEC)) {
    if (descriptor_ < 0 ||
        pwrite(descriptor_, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
      throw std::runtime_error("no memory file");
    }
  }
  ~MemoryFile() { close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return fmt::format("/proc/self/fd/{}", descriptor_); }

 private:
  int descriptor_;
};

void expect_refusal(const auto& step) {
  try {
    step();
  } catch (const Error&) {
  }
}

void read_some(const Hdf5File& file, const std::string& dataset) {
  const DatasetInfo info = file.describe(dataset);
  Selection part(info.shape);
  std::int64_t room = kMostElements;
  for (int dim = info.shape.rank() - 1; dim >= 0; --dim) {
    const std::int64_t extent = std::min(info.shape[dim], room);
    part.set(dim, {{info.shape[dim] - extent, info.shape[dim]}});
    room = std::max<std::int64_t>(1, room / std::max<std::int64_t>(extent, 1));
  }
  const bool floating = info.type.kind == StoredType::Kind::floating;
  std::vector<double> values(static_cast<std::size_t>(part.shape().elements()));
  file.read(info, part,
            TensorView(values.data(), floating ? DType::f64 : DType::i64, part.shape()));
}

}  // namespace

void load_hostile(std::span<const std::uint8_t> bytes) {
  const MemoryFile memory(bytes);
  expect_refusal([&] {
    testing::run_ranks(1, [&](Communicator& ranks) {
      expect_refusal([&] {
        CheckpointRequest request;
        request.path = memory.path();
        const Checkpoint checkpoint(ranks, request);
      });
    });
  });
  expect_refusal([&] {
    const Hdf5File file(memory.path());
    for (const std::string& dataset : file.dataset_paths()) {
      expect_refusal([&] { read_some(file, dataset); });
    }
  });
}

}  // namespace annulus::test
