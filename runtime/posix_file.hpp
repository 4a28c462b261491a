#pragma once

#include <cstdint>
#include <string>

namespace annulus {

/// Owns a file descriptor.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int value) : value_(value) {}
  ~FileDescriptor();
  FileDescriptor(FileDescriptor&& other) noexcept;
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;

  int value() const { return value_; }
  explicit operator bool() const { return value_ >= 0; }
  /// Closes and checks, since network file systems report lost writes here; throws io.
  void close(const std::string& path);

 private:
  int value_ = -1;
};

/// Reads exactly `bytes` at `offset`. Throws bad_data when the file ends before, io on an error.
void read_exactly(int file, void* data, std::int64_t bytes, std::int64_t offset,
                  const std::string& path);

/// Writes exactly `bytes` at `offset`, then `tail_bytes` of `tail`. Throws io with path and errno;
/// a file size limit ends in EFBIG here, not in the signal SIGXFSZ.
void write_exactly(int file, const void* data, std::int64_t bytes, const void* tail,
                   std::int64_t tail_bytes, std::int64_t offset, const std::string& path);

/// Sets the file's length; throws io.
void resize_file(int file, std::int64_t bytes, const std::string& path);

/// Makes data and metadata durable; throws io.
void synchronize_file(int file, const std::string& path);

/// "No space left on device (errno 28)".
std::string errno_text(int error);

}  // namespace annulus
