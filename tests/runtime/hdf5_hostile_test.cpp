// Promises 13, 15 and 22: truncated files, claims that cannot be true, and files that would make
// HDF5 read other files, load code or fill the memory.

#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <zlib.h>

#include <cstring>
#include <functional>

#include "kernels/error.hpp"
#include "runtime/hdf5_file.hpp"
#include "runtime/hdf5_sample.hpp"

namespace annulus {
namespace {

using test::Form;
using test::Pack;
using test::ScratchFolder;

// Opens the file, describes the dataset and reads all of it.
void read_all(const std::string& path, const std::string& dataset) {
  const Hdf5File file(path);
  const DatasetInfo info = file.describe(dataset);
  ASSERT_LT(info.shape.elements(), 1 << 28);
  std::vector<double> values(static_cast<std::size_t>(info.shape.elements()));
  if (info.type.kind == StoredType::Kind::floating) {
    file.read(info, Selection(info.shape), TensorView(values.data(), DType::f64, info.shape));
  } else {
    file.read(info, Selection(info.shape), TensorView(values.data(), DType::i64, info.shape));
  }
}

std::string refusal(const std::string& path, const std::string& dataset) {
  try {
    read_all(path, dataset);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::bad_data) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    EXPECT_TRUE(std::string(error.what()).starts_with(path)) << error.what();
    return error.what();
  }
  ADD_FAILURE() << dataset << " was read";
  return {};
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

long peak_kib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

class HostileFile : public testing::Test {
 protected:
  std::string path(const std::string& name = "in.h5") const { return folder_.path(name); }

  hid_t create() const {
    return H5Fcreate(path().c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  }
  // A dataset of floats with the given storage and no data.
  static void add(hid_t file, const std::vector<hsize_t>& dims, hid_t storage) {
    const hid_t space = H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr);
    const hid_t dataset =
        H5Dcreate2(file, "query", H5T_IEEE_F32LE, space, H5P_DEFAULT, storage, H5P_DEFAULT);
    ASSERT_GE(dataset, 0);
    H5Dclose(dataset);
    H5Sclose(space);
  }

  ScratchFolder folder_;
};

TEST_F(HostileFile, TruncatedAtEveryPercent) {
  for (const Pack pack : {Pack::contiguous, Pack::gzip}) {
    test::write_sample(
        path(),
        {"query", {1, 64, 4, 16}, Form::f32, pack, {1, 16, 4, 16}, false, test::exact_value});
    const std::vector<char> whole = test::file_bytes(path());
    for (std::size_t percent = 0; percent < 100; ++percent) {
      SCOPED_TRACE(percent);
      const auto kept = static_cast<std::ptrdiff_t>(whole.size() * percent / 100);
      test::write_bytes(path(), {whole.begin(), whole.begin() + kept});
      refusal(path(), "query");
    }
  }
}

TEST_F(HostileFile, SaysTruncatedWithTheSizes) {
  test::write_sample(
      path(), {"query", {1, 64, 4, 16}, Form::f32, Pack::contiguous, {}, false, test::exact_value});
  std::vector<char> whole = test::file_bytes(path());
  whole.resize(whole.size() / 2);
  test::write_bytes(path(), whole);
  EXPECT_TRUE(contains(refusal(path(), "query"), "truncated file: eof = "))
      << refusal(path(), "query");
}

TEST_F(HostileFile, ExternalLinkIsNotFollowed) {
  test::write_sample(path("other.h5"),
                     {"query", {4}, Form::f32, Pack::contiguous, {}, false, test::exact_value});
  const hid_t file = create();
  H5Lcreate_external(path("other.h5").c_str(), "/", file, "group", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_external(path("other.h5").c_str(), "/query", file, "query", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_soft("/group/query", file, "soft", H5P_DEFAULT, H5P_DEFAULT);
  H5Fclose(file);
  for (const char* name : {"query", "group/query", "soft"}) {
    EXPECT_TRUE(contains(refusal(path(), name), "link to another file")) << refusal(path(), name);
  }
}

TEST_F(HostileFile, SoftLinkInsideTheFileIsFollowed) {
  test::write_sample(path(),
                     {"a/b", {4}, Form::f32, Pack::contiguous, {}, false, test::exact_value});
  const hid_t file = H5Fopen(path().c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
  H5Lcreate_soft("/a/b", file, "query", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_soft("/nowhere", file, "dangling", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_soft("/loop", file, "loop", H5P_DEFAULT, H5P_DEFAULT);
  H5Fclose(file);
  read_all(path(), "query");
  refusal(path(), "dangling");
  refusal(path(), "loop");
}

TEST_F(HostileFile, ExternalStorageIsNotRead) {
  test::write_bytes(path("secret"), std::vector<char>(64, 's'));
  const hid_t file = create();
  const hid_t storage = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_external(storage, path("secret").c_str(), 0, 64);
  add(file, {16}, storage);
  H5Pclose(storage);
  H5Fclose(file);
  EXPECT_TRUE(contains(refusal(path(), "query"), "external storage"));
}

TEST_F(HostileFile, VirtualDatasetIsNotRead) {
  test::write_sample(path("other.h5"),
                     {"query", {16}, Form::f32, Pack::contiguous, {}, false, test::exact_value});
  const hid_t file = create();
  const hid_t storage = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t dims[] = {16};
  const hid_t space = H5Screate_simple(1, dims, nullptr);
  H5Pset_virtual(storage, space, path("other.h5").c_str(), "/query", space);
  add(file, {16}, storage);
  H5Sclose(space);
  H5Pclose(storage);
  H5Fclose(file);
  EXPECT_TRUE(contains(refusal(path(), "query"), "virtual dataset"));
}

std::size_t pass(unsigned, std::size_t, const unsigned*, std::size_t bytes, std::size_t*, void**) {
  return bytes;
}

TEST_F(HostileFile, FiltersOutsideTheListAreNotLookedFor) {
  const H5Z_class2_t filter = {H5Z_CLASS_T_VERS, 32015, 1, 1, "zstd", nullptr, nullptr, pass};
  H5Zregister(&filter);
  const hid_t file = create();
  const hid_t storage = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk[] = {8};
  H5Pset_chunk(storage, 1, chunk);
  H5Pset_filter(storage, 32015, 0, 0, nullptr);
  add(file, {16}, storage);
  H5Pclose(storage);
  H5Fclose(file);
  H5Zunregister(32015);
  const std::string text = refusal(path(), "query");
  EXPECT_TRUE(contains(text, "filter 32015 (zstd) is not accepted; accepted: deflate")) << text;
}

TEST_F(HostileFile, ClaimsOfAstronomicalSizeCostNoMemory) {
  const long before = peak_kib();
  for (const bool chunked : {false, true}) {
    const hid_t file = create();
    const hid_t storage = H5Pcreate(H5P_DATASET_CREATE);
    const hsize_t chunk[] = {1 << 10, 1 << 10};
    if (chunked) H5Pset_chunk(storage, 2, chunk);
    add(file, {hsize_t{1} << 40, hsize_t{1} << 20}, storage);
    H5Pclose(storage);
    H5Fclose(file);
    const std::string text = refusal(path(), "query");
    EXPECT_TRUE(contains(text, chunked ? "more than a file of" : "no data was ever written"))
        << text;
  }
  EXPECT_LT(peak_kib() - before, 50 << 10);
}

TEST_F(HostileFile, ClaimsBeyond63BitsAreRefused) {
  const hid_t file = create();
  const hid_t storage = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk[] = {16, 16, 8};
  H5Pset_chunk(storage, 3, chunk);
  add(file, {hsize_t{1} << 30, hsize_t{1} << 30, hsize_t{1} << 3}, storage);
  H5Pclose(storage);
  H5Fclose(file);
  EXPECT_TRUE(contains(refusal(path(), "query"), "more than 63 bits count"));
}

// A chunk whose stored stream inflates to far more than the chunk's size.
TEST_F(HostileFile, ChunkThatInflatesBeyondItsSizeIsCutOff) {
  const std::vector<Bytef> zeros(std::size_t{256} << 20);
  uLongf packed_bytes = compressBound(zeros.size());
  std::vector<Bytef> packed(packed_bytes);
  ASSERT_EQ(compress2(packed.data(), &packed_bytes, zeros.data(), zeros.size(), 9), Z_OK);
  const hid_t file = create();
  const hid_t storage = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t dims[] = {1024};
  H5Pset_chunk(storage, 1, dims);
  H5Pset_deflate(storage, 9);
  add(file, {1024}, storage);
  const hid_t dataset = H5Dopen2(file, "query", H5P_DEFAULT);
  const hsize_t origin[] = {0};
  ASSERT_GE(H5Dwrite_chunk(dataset, H5P_DEFAULT, 0, origin, packed_bytes, packed.data()), 0);
  H5Dclose(dataset);
  H5Pclose(storage);
  H5Fclose(file);
  EXPECT_TRUE(contains(refusal(path(), "query"), "a chunk inflates to more than its 4100 bytes"))
      << refusal(path(), "query");
}

TEST_F(HostileFile, PipesAndFoldersDoNotHang) {
  ASSERT_EQ(mkfifo(path("pipe").c_str(), 0600), 0);
  EXPECT_TRUE(contains(refusal(path("pipe"), "query"), "is not a regular file"));
  EXPECT_TRUE(contains(refusal(folder_.folder(), "query"), "is not a regular file"));
}

TEST_F(HostileFile, TypesThatAreNoNumbersAreNamed) {
  const hid_t file = create();
  const hsize_t dims[] = {4};
  const hid_t space = H5Screate_simple(1, dims, nullptr);
  const hid_t text = H5Tcopy(H5T_C_S1);
  H5Tset_size(text, H5T_VARIABLE);
  const hid_t compound = H5Tcreate(H5T_COMPOUND, 8);
  H5Tinsert(compound, "re", 0, H5T_NATIVE_FLOAT);
  H5Tinsert(compound, "im", 4, H5T_NATIVE_FLOAT);
  const hid_t opaque = H5Tcreate(H5T_OPAQUE, 3);
  const std::vector<std::pair<hid_t, std::string>> cases = {{text, "strings"},
                                                            {compound, "compound elements"},
                                                            {opaque, "opaque elements of 3 bytes"},
                                                            {H5T_STD_REF_OBJ, "references"}};
  for (const auto& [type, wanted] : cases) {
    const std::string name = wanted.substr(0, 4);
    H5Dclose(H5Dcreate2(file, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  }
  H5Sclose(space);
  H5Fclose(file);
  for (const auto& [type, wanted] : cases) {
    EXPECT_TRUE(contains(refusal(path(), wanted.substr(0, 4)), "stores " + wanted));
  }
}

}  // namespace
}  // namespace annulus
