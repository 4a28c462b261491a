#include "launch/bench_io.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "kernels/error.hpp"
#include "launch/bench_row.hpp"
#include "launch/number_option.hpp"
#include "launch/parse.hpp"
#include "launch/report.hpp"
#include "runtime/agreement.hpp"
#include "runtime/checkpoint_output.hpp"
#include "runtime/context.hpp"
#include "runtime/hdf5_file.hpp"
#include "runtime/hdf5_sample_file.hpp"
#include "runtime/posix_file.hpp"
#include "runtime/tensor.hpp"

namespace annulus::launch {
namespace {

constexpr std::int64_t kHeads = 8;
constexpr std::int64_t kHeadDim = 128;
constexpr std::int64_t kRowBytes = kHeads * kHeadDim * 4;
constexpr const char* kDataset = "query";
constexpr const char* kOutput = "output/attention_outputs";
// What a rank may hold beyond its own shard.
constexpr double kShardFactor = 1.3;
constexpr std::int64_t kSlackBytes = std::int64_t{256} << 20;

struct IoOptions {
  double gigabytes = 2.0;
  std::string folder = ".";
  int repeats = 3;
  bool collective = false;
  bool json = false;
};

// VmHWM, in bytes: the most memory this process has held since the last reset.
std::int64_t peak_bytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    std::int64_t kib = 0;
    if (word == "VmHWM:" && status >> kib) return kib << 10;
  }
  return 0;
}

void reset_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }

std::vector<std::int64_t> gather(Communicator& ranks, std::int64_t mine) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(ranks.size()));
  ranks.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
  return all;
}

std::int64_t largest(Communicator& ranks, std::int64_t mine) {
  const auto all = gather(ranks, mine);
  return *std::max_element(all.begin(), all.end());
}

// Seconds of the slowest rank.
double timed(Communicator& ranks, const std::function<void()>& step) {
  ranks.barrier();
  const auto start = std::chrono::steady_clock::now();
  agree(ranks, step);
  const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(
      std::chrono::steady_clock::now() - start);
  return 1e-9 * static_cast<double>(largest(ranks, nanoseconds.count()));
}

struct Measured {
  double plain = 1e30;
  double ours = 1e30;
  std::int64_t peak = 0;  // of ours, the largest of the ranks
};

// Scratch files that rank 0 removes, also when a measurement fails.
class ScratchFiles {
 public:
  ScratchFiles(const Context& context, const std::string& folder)
      : owner_(context.rank() == 0), stem_(fmt::format("{}/annulus_bench_io", folder)) {}
  ~ScratchFiles() {
    if (!owner_) return;
    for (const char* name : {".h5", "_out.h5", "_plain"}) {
      static_cast<void>(unlink((stem_ + name).c_str()));
    }
  }
  /// Every write makes a new file; freeing the old one is not timed.
  void remove_written() const {
    if (!owner_) return;
    static_cast<void>(unlink(output().c_str()));
    static_cast<void>(unlink(plain().c_str()));
  }
  ScratchFiles(const ScratchFiles&) = delete;
  ScratchFiles& operator=(const ScratchFiles&) = delete;
  std::string input() const { return stem_ + ".h5"; }
  std::string output() const { return stem_ + "_out.h5"; }
  std::string plain() const { return stem_ + "_plain"; }

 private:
  bool owner_;
  std::string stem_;
};

class IoBench {
 public:
  IoBench(Context& context, const IoOptions& options)
      : context_(context),
        ranks_(context.world()),
        options_(options),
        files_(context, options.folder),
        rows_(std::max<std::int64_t>(static_cast<std::int64_t>(options.gigabytes * 1e9) / kRowBytes,
                                     ranks_.size())),
        shape_{1, rows_, kHeads, kHeadDim},
        mine_{rows_ * ranks_.rank() / ranks_.size(), rows_ * (ranks_.rank() + 1) / ranks_.size()},
        shard_(DType::f32, {1, mine_.size(), kHeads, kHeadDim}) {
    fill();
  }

  std::vector<BenchRow> run() {
    make_input();
    const Measured reading = measure([&] { read_plain(); }, [&] { read_ours(); });
    check();
    const auto fresh = [&] { files_.remove_written(); };
    const Measured writing =
        measure([&] { write_plain(false); }, [&] { write_ours(false); }, fresh);
    const Measured durable = measure([&] { write_plain(true); }, [&] { write_ours(true); }, fresh);
    const Measured again = measure([&] { read_plain(); }, [&] { read_output(); });
    check();
    peaks_ = {reading.peak, std::max(writing.peak, durable.peak)};
    return {row("contiguous", "read", reading), row("checksummed chunks", "write", writing),
            row("the same, durable", "write", durable), row("checksummed chunks", "read", again)};
  }

  // Read and write.
  const std::array<std::int64_t, 2>& peaks() const { return peaks_; }
  std::int64_t bound() const {
    const auto shard = largest(ranks_, mine_.size() * kRowBytes);
    return static_cast<std::int64_t>(kShardFactor * static_cast<double>(shard)) + kSlackBytes;
  }

 private:
  std::int64_t bytes() const { return mine_.size() * kRowBytes; }
  float* values() { return static_cast<float*>(shard_.view().data); }
  static float value(std::int64_t element) { return static_cast<float>(element % 8191); }

  void fill() {
    const std::int64_t first = mine_.begin * kHeads * kHeadDim;
    for (std::int64_t i = 0; i < bytes() / 4; ++i) values()[i] = value(first + i);
  }

  void check() {
    agree(ranks_, [&] {
      const std::int64_t first = mine_.begin * kHeads * kHeadDim;
      for (std::int64_t i = 0; i < bytes() / 4; ++i) {
        require(values()[i] == value(first + i), ExitCode::internal,
                "bench io: element {} is {}, expected {}", first + i, values()[i],
                value(first + i));
      }
    });
  }

  Selection selection() const {
    Selection part(shape_);
    part.set(1, {mine_});
    return part;
  }

  // Plain and ours in turn, the best of each.
  Measured measure(
      const std::function<void()>& plain, const std::function<void()>& ours,
      const std::function<void()>& prepare = [] {}) {
    Measured measured;
    for (int i = 0; i < options_.repeats; ++i) {
      prepare();
      measured.plain = std::min(measured.plain, timed(ranks_, plain));
      prepare();
      reset_peak();
      measured.ours = std::min(measured.ours, timed(ranks_, ours));
      measured.peak = std::max(measured.peak, largest(ranks_, peak_bytes()));
    }
    return measured;
  }

  void make_input() {
    agree(ranks_, [&] {
      if (ranks_.rank() == 0) make_contiguous_file(files_.input(), kDataset, shape_, DType::f32);
    });
    agree(ranks_, [&] {
      input_offset_ =
          Hdf5File(files_.input(), {{kDataset}, {}, false}).describe(kDataset).file_offset;
      const FileDescriptor file = open_file(files_.input(), O_WRONLY);
      write_exactly(file.value(), values(), bytes(), nullptr, 0, offset(), files_.input());
    });
  }

  std::int64_t offset() const { return input_offset_ + mine_.begin * kRowBytes; }

  static FileDescriptor open_file(const std::string& path, int flags) {
    FileDescriptor file(open(path.c_str(), flags | O_CLOEXEC, 0666));
    require(static_cast<bool>(file), ExitCode::cannot_create, "{}: {}", path, errno_text(errno));
    return file;
  }

  void read_plain() {
    const FileDescriptor file = open_file(files_.input(), O_RDONLY);
    read_exactly(file.value(), values(), bytes(), offset(), files_.input());
  }

  void read_ours() {
    const Hdf5File file(ranks_, files_.input(), Hdf5Questions{{kDataset}, {}, false});
    const DatasetInfo dataset = file.describe(kDataset);
    const auto mpi = context_.mpi();
    if (options_.collective && mpi) {
      file.read_collectively(*mpi, dataset, selection(), shard_.view());
    } else {
      file.read(dataset, selection(), shard_.view());
    }
  }

  void read_output() {
    const Hdf5File file(ranks_, files_.output(), Hdf5Questions{{kOutput}, {}, false});
    file.read(file.describe(kOutput), selection(), shard_.view());
  }

  void write_plain(bool durable) {
    const FileDescriptor file = open_file(files_.plain(), O_WRONLY | O_CREAT);
    write_exactly(file.value(), values(), bytes(), nullptr, 0, mine_.begin * kRowBytes,
                  files_.plain());
    if (durable) synchronize_file(file.value(), files_.plain());
  }

  void write_ours(bool durable) {
    OutputOptions options;
    options.force = true;
    options.durable = durable;
    const OutputDataset dataset{kOutput, shape_, DType::f32, selection(), shard_.view()};
    write_checkpoint(ranks_, files_.output(), {&dataset, 1}, {}, options);
  }

  BenchRow row(const std::string& name, const std::string& direction, const Measured& measured) {
    const double gigabytes = 1e-9 * static_cast<double>(rows_ * kRowBytes);
    BenchRow result;
    result.name = name;
    result.direction = direction;
    result.dtype = "f32";
    result.batch = 1;
    result.heads = kHeads;
    result.seq_q = rows_;
    result.head_dim = kHeadDim;
    result.ranks = ranks_.size();
    result.seconds = measured.ours;
    result.rate = gigabytes / measured.ours;
    result.unit = "GB/s";
    result.ceiling = gigabytes / measured.plain;
    return result;
  }

  Context& context_;
  Communicator& ranks_;
  IoOptions options_;
  ScratchFiles files_;
  std::int64_t rows_;
  Shape shape_;
  Span mine_;
  Tensor shard_;
  std::int64_t input_offset_ = 0;
  std::array<std::int64_t, 2> peaks_{};
};

}  // namespace

void bench_io(Arguments arguments) {
  IoOptions options;
  CLI::App app("Reads and writes f32 tensors beside plain pread and pwrite.", "annulus bench io");
  app.add_option("--gigabytes", options.gigabytes, "size of the tensor over all ranks")
      ->check(CLI::Range(0.001, 10000.0))
      ->capture_default_str();
  app.add_option("--folder", options.folder, "where the scratch files go")->capture_default_str();
  app.add_option("--repeats", options.repeats, "the best of so many")
      ->check(whole_number<int>(1, 1000))
      ->capture_default_str();
  app.add_flag("--collective", options.collective, "read by collective MPI-IO");
  app.add_flag("--json", options.json, "rows as JSON");
  if (!parse(app, arguments)) return;
  Context context;
  IoBench bench(context, options);
  const std::vector<BenchRow> rows = bench.run();
  const std::int64_t bound = bench.bound();
  if (context.rank() != 0) return;
  print_rows(rows, options.json);
  if (options.json) return;
  fmt::print("peak memory of a rank: {} reading, {} writing; bound {} (1.3 x shard + 256 MB)\n",
             format_bytes(bench.peaks()[0]), format_bytes(bench.peaks()[1]), format_bytes(bound));
}

}  // namespace annulus::launch
