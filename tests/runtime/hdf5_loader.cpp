#include "runtime/hdf5_loader.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/error.hpp"
#include "runtime/checkpoint.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus::test {
namespace {

constexpr std::int64_t kMostElements = 1 << 17;

// One file in memory for the life of the process, since HDF5 wants a name that can be resolved.
class MemoryFile {
 public:
  MemoryFile() : descriptor_(mkstemp(path_.data())) {
    if (descriptor_ < 0) throw std::runtime_error("no file in memory");
  }
  ~MemoryFile() {
    close(descriptor_);
    unlink(path_.c_str());
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  const std::string& hold(std::span<const std::uint8_t> bytes) {
    if (ftruncate(descriptor_, 0) != 0 ||
        pwrite(descriptor_, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
      throw std::runtime_error("no room in memory");
    }
    return path_;
  }

 private:
  std::string path_ = "/dev/shm/annulus_fuzz_XXXXXX";
  int descriptor_;
};

// True when `step` was not refused.
bool passes(const auto& step) {
  try {
    step();
    return true;
  } catch (const Error&) {
    return false;
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

int load_hostile(std::span<const std::uint8_t> bytes) {
  // Of this process: children that a fuzzing test forks must not share it.
  static const pid_t owner = getpid();
  static MemoryFile shared;
  std::optional<MemoryFile> own;
  const std::string path = (getpid() == owner ? shared : own.emplace()).hold(bytes);
  int read = 0;
  testing::run_ranks(1, [&](Communicator& ranks) {
    passes([&] {
      CheckpointRequest request;
      request.path = path;
      const Checkpoint checkpoint(ranks, request);
      for (const auto field :
           {CheckpointField::query, CheckpointField::key, CheckpointField::value}) {
        read += passes([&] { read_some(checkpoint.file(), checkpoint.dataset(field).path); });
      }
    });
  });
  return read;
}

}  // namespace annulus::test
