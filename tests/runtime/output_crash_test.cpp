// Promises 10, 11, 12 and 23, and that our outputs are HDF5 to others. The parts that need a
// process of their own run in a forked child.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <functional>
#include <random>
#include <thread>

#include "kernels/error.hpp"
#include "runtime/checkpoint_output.hpp"
#include "runtime/hdf5_file.hpp"
#include "runtime/hdf5_sample.hpp"
#include "sharding/thread_communicator.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kRows = 6000;  // 6 MB: a dozen chunks
const Shape kShape{1, kRows, 4, 64};

std::vector<float> values_of(std::int64_t rows, float seed) {
  std::vector<float> values(static_cast<std::size_t>(rows * 4 * 64));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = seed + static_cast<float>(i % 4099);
  }
  return values;
}

// Two ranks write a tensor whose values follow from `seed`.
void write_output(const std::string& path, float seed, std::int64_t rows = kRows) {
  const Shape shape{1, rows, 4, 64};
  const std::vector<float> values = values_of(rows, seed);
  testing::run_ranks(2, [&](Communicator& ranks) {
    Selection mine(shape);
    const Span half = ranks.rank() == 0 ? Span{0, rows / 2} : Span{rows / 2, rows};
    mine.set(1, {half});
    const OutputDataset dataset{
        "output/attention_outputs", shape, DType::f32, mine,
        ConstTensorView(values.data() + half.begin * 256, DType::f32, mine.shape())};
    OutputOptions options;
    options.force = true;
    write_checkpoint(ranks, path, {&dataset, 1}, {}, options);
  });
}

std::vector<float> read_output(const std::string& path) {
  const Hdf5File file(path);
  const DatasetInfo info = file.describe("output/attention_outputs");
  std::vector<float> values(static_cast<std::size_t>(info.shape.elements()));
  file.read(info, Selection(info.shape), TensorView(values.data(), DType::f32, info.shape));
  return values;
}

pid_t fork_child(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child != 0) return child;
  // What the failing ranks print would hide the test's own words.
  const int null = open("/dev/null", O_WRONLY);
  static_cast<void>(dup2(null, STDERR_FILENO));
  int code = 99;
  try {
    code = body();
  } catch (const Error& error) {
    code = static_cast<int>(error.code());
  } catch (...) {
  }
  _exit(code);
}

int exit_code(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

TEST(OutputCrash, KilledAtAnyPointTheDestinationIsOldOrNew) {
  const test::ScratchFolder folder;
  const std::string path = folder.path("out.h5");
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const auto start = std::chrono::steady_clock::now();
  ASSERT_EQ(exit_code(fork_child([&] { return write_output(path, 0.0F), 0; })), 0);
  const auto whole = std::chrono::duration_cast<std::chrono::microseconds>(
      std::chrono::steady_clock::now() - start);
  float current = 0.0F;
  int killed = 0;
  int replaced = 0;
  for (int trial = 1; killed < 100 && trial < 1000; ++trial) {
    const auto next = static_cast<float>(trial);
    const pid_t child = fork_child([&] { return write_output(path, next), 0; });
    std::this_thread::sleep_for(
        std::chrono::microseconds(random() % static_cast<unsigned>(whole.count())));
    kill(child, SIGKILL);
    killed += exit_code(child) == -SIGKILL ? 1 : 0;
    const std::vector<float> found = read_output(path);
    if (found[0] == next) {
      current = next;
      ++replaced;
    }
    ASSERT_EQ(found, values_of(kRows, current)) << "trial " << trial;
    // A forced replacement has a name of its own for the instant between link and rename; the next
    // run removes what a kill in that instant left.
    ASSERT_LE(folder.names().size(), 2U) << folder.names()[2];
  }
  write_output(path, 1.0F);
  EXPECT_EQ(folder.names(), std::vector<std::string>{"out.h5"});
  EXPECT_GE(killed, 100);
  RecordProperty("killed", killed);
  RecordProperty("replaced", replaced);
}

// Runs `body` in a mount namespace of its own with an 8 MB file system at `place`; -1: not allowed.
int in_small_disk(const std::string& place, bool with_proc, const std::function<int()>& body) {
  return exit_code(fork_child([&] {
    const bool mounted = unshare(CLONE_NEWNS) == 0 &&
                         mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                         mount("none", place.c_str(), "tmpfs", 0, "size=8m") == 0;
    if (!mounted) return 255;
    if (!with_proc && umount2("/proc", MNT_DETACH) != 0) return 255;
    return body();
  }));
}

std::size_t files_in(const std::string& folder) {
  const std::filesystem::directory_iterator all(folder);
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

// With /proc the file has no name before the commit, without it a random one; both must end alike.
TEST(OutputCrash, AFullDiskLeavesTheEarlierOutputAndNothingElse) {
  const test::ScratchFolder folder;
  const std::string path = folder.path("out.h5");
  for (const bool with_proc : {true, false}) {
    const int code = in_small_disk(folder.folder(), with_proc, [&] {
      write_output(path, 1.0F, 3000);
      const std::vector<char> before = test::file_bytes(path);
      int failed = 0;
      try {
        write_output(path, 2.0F, 9000);
      } catch (const Error& error) {
        failed = static_cast<int>(error.code());
        const std::string text = error.what();
        if (text.find("No space left on device (errno 28)") == std::string::npos) return 1;
      }
      if (failed != static_cast<int>(ExitCode::io)) return 2;
      if (test::file_bytes(path) != before) return 3;
      if (files_in(folder.folder()) != 1) return 4;
      write_output(path, 3.0F, 3500);
      return read_output(path) == values_of(3500, 3.0F) && files_in(folder.folder()) == 1 ? 0 : 5;
    });
    if (code == 255) GTEST_SKIP() << "no mount namespaces here";
    EXPECT_EQ(code, 0) << (with_proc ? "nameless" : "named");
  }
}

TEST(OutputCrash, OnlyUnlockedTemporaryFilesOfTheSameOutputAreStale) {
  const test::ScratchFolder folder;
  const std::string path = folder.path("out.h5");
  for (const char* name :
       {"out.h5.partial-dead", "out.h5.partial-alive", "other.h5.partial-dead"}) {
    test::write_bytes(folder.path(name), {'x'});
  }
  ASSERT_EQ(symlink(folder.path("other.h5.partial-dead").c_str(),
                    folder.path("out.h5.partial-link").c_str()),
            0);
  const int alive = open(folder.path("out.h5.partial-alive").c_str(), O_RDONLY);
  ASSERT_EQ(flock(alive, LOCK_EX), 0);
  write_output(path, 1.0F, 4);
  close(alive);
  EXPECT_EQ(folder.names(),
            (std::vector<std::string>{"other.h5.partial-dead", "out.h5", "out.h5.partial-alive",
                                      "out.h5.partial-link"}));
}

TEST(OutputCrash, AnInstantAfterTheOtherNothingIsReplacedWithoutForce) {
  const test::ScratchFolder folder;
  const std::string path = folder.path("out.h5");
  test::write_bytes(path, {'o', 'l', 'd'});
  const Shape shape{1, 8, 1, 8};
  std::vector<float> values(64);
  EXPECT_THROW(testing::run_ranks(1,
                                  [&](Communicator& ranks) {
                                    const OutputDataset dataset{
                                        "output/x", shape, DType::f32, Selection(shape),
                                        ConstTensorView(values.data(), DType::f32, shape)};
                                    write_checkpoint(ranks, path, {&dataset, 1}, {}, {});
                                  }),
               Error);
  EXPECT_EQ(test::file_bytes(path), (std::vector<char>{'o', 'l', 'd'}));
}

// Promise 12: half of the flips in a small file, mostly metadata, half in one that is mostly data.
TEST(OutputCrash, AThousandFlippedBitsAreDetectedOrOutsideTheContent) {
  const test::ScratchFolder folder;
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (const std::int64_t rows : {2, 1100}) {
    write_output(folder.path("out.h5"), 5.0F, rows);
    const std::vector<float> wanted = values_of(rows, 5.0F);
    const std::string path = folder.path("flipped.h5");
    std::vector<char> bytes = test::file_bytes(folder.path("out.h5"));
    test::write_bytes(path, bytes);
    const int file = open(path.c_str(), O_WRONLY);
    int detected = 0;
    for (int trial = 0; trial < 500; ++trial) {
      const std::size_t bit = random() % (bytes.size() * 8);
      const char flipped = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
      ASSERT_EQ(pwrite(file, &flipped, 1, static_cast<off_t>(bit / 8)), 1);
      try {
        ASSERT_EQ(read_output(path), wanted) << "bit " << bit << " of " << bytes.size() * 8;
      } catch (const Error& error) {
        ++detected;
      }
      ASSERT_EQ(pwrite(file, &bytes[bit / 8], 1, static_cast<off_t>(bit / 8)), 1);
    }
    close(file);
    EXPECT_GT(detected, rows > 1000 ? 400 : 50);
    RecordProperty(rows > 1000 ? "detected_in_data" : "detected_in_metadata", detected);
  }
}

// ---- other readers ------------------------------------------------------------------------------

bool succeeds(const std::string& command) {
  const int status = std::system((command + " >/dev/null 2>&1").c_str());
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST(OutputReaders, H5pyAndH5dumpReadEveryType) {
  const std::string system = "/usr/bin/python3";
  const std::string python = succeeds(system + " -c 'import h5py'") ? system : "python3";
  if (!succeeds(python + " -c 'import h5py'") || !succeeds("h5dump --version")) {
    GTEST_SKIP() << "h5py or h5dump is missing";
  }
  const test::ScratchFolder folder;
  const std::string path = folder.path("out.h5");
  const Shape shape{2, 300, 4, 64};
  std::vector<float> values(static_cast<std::size_t>(shape.elements()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(test::exact_value(static_cast<std::int64_t>(i)));
  }
  testing::run_ranks(2, [&](Communicator& ranks) {
    Selection mine(shape);
    mine.set(0, {{ranks.rank(), ranks.rank() + 1}});
    const ConstTensorView view(values.data() + ranks.rank() * 300 * 256, DType::f32, mine.shape());
    const std::vector<OutputDataset> datasets = {{"output/f32", shape, DType::f32, mine, view},
                                                 {"output/f16", shape, DType::f16, mine, view},
                                                 {"output/bf16", shape, DType::bf16, mine, view},
                                                 {"output/f64", shape, DType::f64, mine, view}};
    const OutputAttribute attributes[] = {
        {"operation", std::string("ring")}, {"ranks", std::int64_t{2}}, {"scale", 0.125}};
    write_checkpoint(ranks, path, datasets, attributes, {});
  });
  EXPECT_TRUE(succeeds("h5dump " + path));
  const std::string script =
      "import h5py, numpy, sys\n"
      "f = h5py.File(sys.argv[1])\n"
      "a = f['output'].attrs\n"
      "text = a['operation']\n"
      "text = text.decode() if isinstance(text, bytes) else text\n"
      "assert text == 'ring' and a['ranks'] == 2 and a['scale'] == 0.125, dict(a)\n"
      "n = numpy.arange(2 * 300 * 4 * 64, dtype=numpy.int64)\n"
      "want = (((n * 2654435761) >> 7) % 255 - 127) / 8.0\n"
      "for name in ('f32', 'f16', 'bf16', 'f64'):\n"
      "    d = f['output'][name]\n"
      "    assert d.fletcher32 and d.shape == (2, 300, 4, 64), d\n"
      "    assert (d[...].astype(float).ravel() == want).all(), name\n";
  test::write_bytes(folder.path("read.py"), {script.begin(), script.end()});
  EXPECT_TRUE(succeeds(python + " " + folder.path("read.py") + " " + path));
}

}  // namespace
}  // namespace annulus
