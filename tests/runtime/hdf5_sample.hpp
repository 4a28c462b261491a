#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/types.hpp"

namespace annulus::test {

/// A folder that is removed with everything in it.
class ScratchFolder {
 public:
  ScratchFolder();
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  const std::string& folder() const { return folder_; }
  /// Names of the files in it, sorted.
  std::vector<std::string> names() const;

 private:
  std::string folder_;
};

enum class Form : std::uint8_t {
  f32,
  f64,
  f16,
  bf16_float,
  bf16_opaque_named,
  bf16_opaque,
  bf16_uint16,
  i8,
  u8,
  i16,
  u16,
  i32,
  u32,
  i64,
  u64,
  boolean,
};

enum class Pack : std::uint8_t {
  contiguous,
  compact,
  chunked,
  gzip,
  shuffle_gzip,
  fletcher,
  shuffle_gzip_fletcher,
  gzip_fletcher_first,
  szip,
  nbit,
  scale_offset,
  missing_chunks,
};

const char* name(Form form);
const char* name(Pack pack);
bool is_float(Form form);
bool is_available(Pack pack);

/// A dataset made through HDF5's C API: element i of row-major order has the value value(i).
struct SampleDataset {
  std::string path = "query";
  std::vector<std::uint64_t> dims;
  Form form = Form::f32;
  Pack pack = Pack::contiguous;
  std::vector<std::uint64_t> chunk;
  bool big_endian = false;
  std::function<double(std::int64_t)> value;
};

/// Creates (or extends) a file. With missing_chunks only the first half of the rows is written and
/// the fill value is 1.5.
void write_sample(const std::string& file, const SampleDataset& dataset, bool append = false);

/// Values that every float form holds exactly.
double exact_value(std::int64_t i);

std::vector<char> file_bytes(const std::string& path);
void write_bytes(const std::string& path, const std::vector<char>& bytes);

}  // namespace annulus::test
