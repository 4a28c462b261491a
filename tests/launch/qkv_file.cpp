#include "launch/qkv_file.hpp"

#include <hdf5.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <stdexcept>

namespace annulus::testing {
namespace {

void check(bool good) {
  if (!good) throw std::runtime_error("cannot write a test file");
}

using Extents = std::vector<std::uint64_t>;

std::size_t product(const Extents& shape) {
  std::size_t elements = 1;
  for (const std::uint64_t extent : shape) elements *= extent;
  return elements;
}

void write_values(hid_t file, const char* name, const Extents& shape, hid_t stored, hid_t memory,
                  const void* values) {
  const std::vector<hsize_t> dims(shape.begin(), shape.end());
  const hid_t space = H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr);
  const hid_t dataset =
      H5Dcreate2(file, name, stored, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  check(H5Dwrite(dataset, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0);
  check(H5Dclose(dataset) >= 0 && H5Sclose(space) >= 0);
}

std::vector<float> random_values(std::size_t elements, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(elements);
  for (float& x : values) x = normal(random);
  return values;
}

void write_floats(hid_t file, const char* name, const Extents& shape, unsigned seed) {
  const std::vector<float> values = random_values(product(shape), seed);
  write_values(file, name, shape, H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, values.data());
}

// Three documents and padding, of unequal lengths that no rank boundary meets.
void write_extras(hid_t file, const Extents& query, const Extents& key) {
  const std::uint64_t batch = query[0];
  const std::uint64_t seq = query[1];
  std::vector<std::int32_t> documents(batch * seq);
  for (std::uint64_t b = 0; b < batch; ++b) {
    for (std::uint64_t t = 0; t < seq; ++t) {
      const int document = t < 7 + b ? 0 : t < 40 ? 1 : t + 5 < seq ? 2 : -1;
      documents[b * seq + t] = document;
    }
  }
  write_values(file, "documents", {batch, seq}, H5T_STD_I32LE, H5T_NATIVE_INT32, documents.data());
  const std::vector<std::int32_t> offsets = {0, 7, 40, static_cast<std::int32_t>(seq)};
  write_values(file, "cu_seqlens", {4}, H5T_STD_I32LE, H5T_NATIVE_INT32, offsets.data());
  const Extents pairs = {batch, 1, seq, key[1]};
  std::vector<std::uint8_t> mask(product(pairs));
  std::mt19937 random(3);
  for (std::uint8_t& keep : mask) keep = random() % 3 == 0 ? 0 : 1;
  const hid_t boolean = H5Tenum_create(H5T_NATIVE_INT8);
  const std::int8_t no = 0;
  const std::int8_t yes = 1;
  check(H5Tenum_insert(boolean, "FALSE", &no) >= 0 && H5Tenum_insert(boolean, "TRUE", &yes) >= 0);
  write_values(file, "mask", pairs, boolean, boolean, mask.data());
  H5Tclose(boolean);
  write_floats(file, "bias", {1, query[2], seq, key[1]}, 5);
  write_floats(file, "sinks", {query[2]}, 6);
}

}  // namespace

void QkvFile::set_heads(std::uint64_t q_heads, std::uint64_t kv_heads) {
  query[2] = q_heads;
  key[2] = value[2] = kv_heads;
}

void QkvFile::write(const std::string& path) const {
  if (absent) return;
  if (garbage) {
    std::ofstream(path) << std::string(4096, 'x');
    return;
  }
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  std::vector<float> q = random_values(product(query), 7);
  if (nan_at >= 0) q[static_cast<std::size_t>(nan_at)] = std::numeric_limits<float>::quiet_NaN();
  write_values(file, "query", query, integer_query ? H5T_STD_I32LE : H5T_IEEE_F32LE,
               H5T_NATIVE_FLOAT, q.data());
  write_floats(file, "key", key, 8);
  if (!value.empty()) write_floats(file, "value", value, 9);
  if (extras) write_extras(file, query, key);
  check(H5Fclose(file) >= 0);
  if (truncate_to < 1.0) {
    const auto bytes = static_cast<double>(std::filesystem::file_size(path));
    std::filesystem::resize_file(path, static_cast<std::uintmax_t>(bytes * truncate_to));
  }
}

}  // namespace annulus::testing
