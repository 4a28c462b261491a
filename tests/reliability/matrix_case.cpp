#include "reliability/matrix_case.hpp"

#include <hdf5.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <mutex>
#include <regex>
#include <set>
#include <thread>

namespace annulus::testing {

namespace {

/// H5Literate's callback: adds the digest of one dataset.
herr_t add_dataset(hid_t group, const char* name, const H5L_info_t*, void* digest) {
  const hid_t dataset = H5Dopen(group, name, H5P_DEFAULT);
  if (dataset < 0) return -1;
  const hid_t space = H5Dget_space(dataset);
  const hid_t type = H5Dget_type(dataset);
  std::string bytes(
      static_cast<std::size_t>(H5Sget_simple_extent_npoints(space)) * H5Tget_size(type), '\0');
  const herr_t status = H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data());
  H5Tclose(type);
  H5Sclose(space);
  H5Dclose(dataset);
  *static_cast<std::string*>(digest) +=
      std::string(name) + ":" + std::to_string(std::hash<std::string>{}(bytes)) + " ";
  return status;
}

}  // namespace

std::string results_of(const std::string& path) {
  static std::mutex one_at_a_time;  // HDF5 is not thread-safe
  const std::lock_guard lock(one_at_a_time);
  if (!std::filesystem::exists(path)) return "";
  H5Eset_auto(H5E_DEFAULT, nullptr, nullptr);
  std::string digest;
  const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  if (file < 0) return "damaged";
  const hid_t group = H5Gopen(file, "output", H5P_DEFAULT);
  const bool good = group >= 0 && H5Literate(group, H5_INDEX_NAME, H5_ITER_INC, nullptr,
                                             add_dataset, &digest) >= 0;
  if (group >= 0) H5Gclose(group);
  H5Fclose(file);
  return good && !digest.empty() ? digest : "damaged";
}

void side_by_side(std::size_t count, const std::function<void(std::size_t)>& check) {
  const char* given = std::getenv("ANNULUS_FAULT_JOBS");
  const std::size_t at_once = given != nullptr ? std::strtoul(given, nullptr, 10) : 3;
  std::atomic<std::size_t> next{0};
  std::vector<std::jthread> threads;
  for (std::size_t i = 0; i < std::min(at_once, count); ++i) {
    threads.emplace_back([&] {
      for (std::size_t at = next++; at < count; at = next++) check(at);
    });
  }
}

void write_zeros(const std::string& path, const std::string& dataset,
                 const std::vector<unsigned long long>& shape, bool chunked) {
  const bool exists = std::filesystem::exists(path);
  const hid_t file = exists ? H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT)
                            : H5Fcreate(path.c_str(), H5F_ACC_EXCL, H5P_DEFAULT, H5P_DEFAULT);
  const std::vector<hsize_t> dims(shape.begin(), shape.end());
  const hid_t space = H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr);
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  const std::vector<hsize_t> chunk(dims.size(), 1);
  if (chunked) H5Pset_chunk(creation, static_cast<int>(chunk.size()), chunk.data());
  if (!chunked) H5Pset_alloc_time(creation, H5D_ALLOC_TIME_EARLY);
  H5Dclose(
      H5Dcreate(file, dataset.c_str(), H5T_IEEE_F32LE, space, H5P_DEFAULT, creation, H5P_DEFAULT));
  H5Pclose(creation);
  H5Sclose(space);
  H5Fclose(file);
}

const Reference& reference() {
  static const Reference value = [] {
    const TemporaryFolder folder;
    Reference result;
    result.counts = count_points(ring_job(folder.file("out.h5")));
    EXPECT_EQ(result.counts.outcome.exit_code, 0) << result.counts.outcome.err;
    result.results = results_of(folder.file("out.h5"));
    return result;
  }();
  return value;
}

bool says(const JobOutcome& outcome, const std::string& pattern) {
  return std::regex_search(outcome.err, std::regex(pattern));
}

bool whole_matrix() { return std::getenv("ANNULUS_FAULT_MATRIX") != nullptr; }

std::vector<long> points(long last, int quick, int whole) {
  const long wanted = std::min<long>(last, whole_matrix() ? whole : quick);
  std::set<long> result;
  for (long i = 0; i < wanted; ++i) {
    result.insert(wanted == 1 ? (last + 1) / 2 : 1 + i * (last - 1) / (wanted - 1));
  }
  return {result.begin(), result.end()};
}

JobOptions ring_job(const std::string& output, double timeout_seconds) {
  JobOptions options;
  options.environment["F_FOLDER"] = std::filesystem::path(output).parent_path().string();
  options.arguments = {"run",      "--op",    "ring",        "--mesh",
                       "sp=4",     "--input", sample_file(), "--causal",
                       "--output", output,    "--timeout",   std::to_string(timeout_seconds)};
  return options;
}

void expect_clean_end(const JobOutcome& outcome, const std::string& what) {
  EXPECT_TRUE(outcome.ended_itself) << what << ": had to be killed\n" << outcome.err;
  EXPECT_TRUE(outcome.left_behind.empty()) << what << ": left " << outcome.left_behind.front();
}

Figures::~Figures() {
  std::printf("figure: promise %s: %d cases, slowest %.1f s%s\n", promise_.c_str(), cases_,
              slowest_, notes_.c_str());
  std::fflush(stdout);
}

void Figures::add(double seconds) {
  const std::lock_guard lock(mutex_);
  ++cases_;
  slowest_ = std::max(slowest_, seconds);
}

}  // namespace annulus::testing
