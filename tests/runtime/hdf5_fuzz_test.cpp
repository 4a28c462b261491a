// Promise 24: damaged files of every form end in an Error. HDF5 1.10.8 itself crashes or loops on
// some, in the child process that reads the metadata; this process must survive all of them.
// ANNULUS_FUZZ_SEED and ANNULUS_FUZZ_CASES ask for certain files, or for more. The same loader is a
// libFuzzer target (ANNULUS_FUZZ).

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <random>

#include "runtime/hdf5_loader.hpp"
#include "runtime/hdf5_sample.hpp"

namespace annulus {
namespace {

using test::Form;
using test::Pack;

constexpr int kCases = 1000;
constexpr int kCasesPerChild = 10;
constexpr unsigned kSecondsPerChild = 250;  // each may meet a loop in HDF5, which is ended after 20

std::vector<std::vector<char>> seeds() {
  const test::ScratchFolder folder;
  std::vector<std::vector<char>> files;
  for (int p = 0; p <= static_cast<int>(Pack::missing_chunks); ++p) {
    const auto pack = static_cast<Pack>(p);
    if (!test::is_available(pack)) continue;
    const Form form = p % 2 == 0 ? Form::f32 : Form::bf16_float;
    for (const char* name : {"query", "key", "value"}) {
      test::write_sample(folder.path("in.h5"),
                         {name, {1, 12, 2, 8}, form, pack, {1, 5, 2, 8}, false, test::exact_value},
                         name[0] != 'q');
    }
    files.push_back(test::file_bytes(folder.path("in.h5")));
  }
  return files;
}

// Flips, words that break arithmetic, moved blocks, cut ends.
void mutate(std::mt19937& random, std::vector<char>& bytes) {
  constexpr std::uint64_t kWords[] = {0,
                                      1,
                                      0x7f,
                                      0xff,
                                      0xffff,
                                      0x7fffffff,
                                      0xffffffff,
                                      0x7fffffffffffffff,
                                      0xffffffffffffffff,
                                      0x8000000000000000};
  const auto count = random() % 6 + 1;
  for (unsigned i = 0; i < count && bytes.size() > 16; ++i) {
    const std::size_t at = random() % (bytes.size() - 8);
    switch (random() % 6) {
      case 0:
        bytes[at] = static_cast<char>(random());
        break;
      case 1:
      case 2:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << (random() % 8)));
        break;
      case 3:
        std::memcpy(&bytes[at], &kWords[random() % 10], std::size_t{1} << (random() % 4));
        break;
      case 4:
        std::memmove(&bytes[at], &bytes[random() % (bytes.size() - 8)], 8);
        break;
      default:
        if (random() % 8 == 0) bytes.resize(random() % bytes.size());
    }
  }
}

int load(const std::vector<char>& bytes) {
  return test::load_hostile({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()});
}

bool loads_or_refuses(const std::vector<char>& bytes) {
  try {
    load(bytes);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

TEST(Hdf5Fuzz, DamagedFilesAreRefused) {
  const char* given = std::getenv("ANNULUS_FUZZ_SEED");
  const unsigned seed =
      given != nullptr ? static_cast<unsigned>(std::atoi(given)) : std::random_device{}();
  const auto files = seeds();
  for (const std::vector<char>& bytes : files) {
    ASSERT_EQ(load(bytes), 3) << "an intact file is refused, so that nothing is tested";
  }
  const char* cases = std::getenv("ANNULUS_FUZZ_CASES");
  const int last = cases != nullptr ? std::atoi(cases) : kCases;
  for (int first = 0; first < last; first += kCasesPerChild) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(kSecondsPerChild);
      for (int i = first; i < first + kCasesPerChild; ++i) {
        std::mt19937 random(seed + static_cast<unsigned>(i));
        std::vector<char> bytes = files[random() % files.size()];
        mutate(random, bytes);
        if (given != nullptr) test::write_bytes("/tmp/fuzz_case.h5", bytes);
        if (!loads_or_refuses(bytes)) _exit(1);
      }
      _exit(0);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_FALSE(WIFEXITED(status) && WEXITSTATUS(status) != 0)
        << "cases " << first << " on of seed " << seed << ": an exception escaped";
    ASSERT_FALSE(WIFSIGNALED(status)) << "cases " << first << " on of seed " << seed << ": "
                                      << strsignal(WTERMSIG(status));
  }
}

}  // namespace
}  // namespace annulus
