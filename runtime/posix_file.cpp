#include "runtime/posix_file.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

#include "kernels/error.hpp"

namespace annulus {
namespace {

// One call moves at most this much: Linux ends at 2^31 - 4096 anyhow, and pieces let a signal in.
constexpr std::int64_t kLargestCall = std::int64_t{64} << 20;

// A write beyond RLIMIT_FSIZE raises SIGXFSZ in the writing thread, which ends the process; held
// back here and consumed, it leaves only EFBIG.
class FileSizeSignalBlock {
 public:
  FileSizeSignalBlock() {
    sigemptyset(&signal_);
    sigaddset(&signal_, SIGXFSZ);
    blocked_ = pthread_sigmask(SIG_BLOCK, &signal_, &before_) == 0;
  }
  ~FileSizeSignalBlock() {
    if (!blocked_ || sigismember(&before_, SIGXFSZ) == 1) return;
    const timespec at_once{};
    while (sigtimedwait(&signal_, nullptr, &at_once) > 0) {
    }
    static_cast<void>(pthread_sigmask(SIG_SETMASK, &before_, nullptr));
  }
  FileSizeSignalBlock(const FileSizeSignalBlock&) = delete;
  FileSizeSignalBlock& operator=(const FileSizeSignalBlock&) = delete;

 private:
  sigset_t signal_{};
  sigset_t before_{};
  bool blocked_ = false;
};

iovec piece(const void* data, std::int64_t bytes, std::int64_t done) {
  return {const_cast<char*>(static_cast<const char*>(data)) + done,
          static_cast<std::size_t>(std::min(bytes - done, kLargestCall))};
}

}  // namespace

FileDescriptor::~FileDescriptor() {
  if (value_ >= 0) static_cast<void>(::close(value_));
}

FileDescriptor::FileDescriptor(FileDescriptor&& other) noexcept
    : value_(std::exchange(other.value_, -1)) {}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  std::swap(value_, other.value_);
  return *this;
}

void FileDescriptor::close(const std::string& path) {
  const int value = std::exchange(value_, -1);
  const bool closed = value < 0 || ::close(value) == 0;
  require(closed, ExitCode::io, "{}: close failed: {}", path, errno_text(errno));
}

std::string errno_text(int error) {
  return fmt::format("{} (errno {})", std::generic_category().message(error), error);
}

void read_exactly(int file, void* data, std::int64_t bytes, std::int64_t offset,
                  const std::string& path) {
  for (std::int64_t done = 0; done < bytes;) {
    const iovec part = piece(data, bytes, done);
    const ssize_t count = pread(file, part.iov_base, part.iov_len, offset + done);
    if (count < 0 && errno == EINTR) continue;
    require(count >= 0, ExitCode::io, "{}: reading {} bytes at {} failed: {}", path, bytes, offset,
            errno_text(errno));
    require(count > 0, ExitCode::bad_data,
            "{}: truncated: {} bytes at {} wanted, the file ends after {} of them", path, bytes,
            offset, done);
    done += count;
  }
}

void write_exactly(int file, const void* data, std::int64_t bytes, const void* tail,
                   std::int64_t tail_bytes, std::int64_t offset, const std::string& path) {
  const FileSizeSignalBlock block;
  const std::int64_t total = bytes + tail_bytes;
  for (std::int64_t done = 0; done < total;) {
    std::array<iovec, 2> parts{};
    int count = 0;
    if (done < bytes) parts[static_cast<std::size_t>(count++)] = piece(data, bytes, done);
    if (tail_bytes > 0 && bytes - done <= kLargestCall) {
      const std::int64_t tail_done = std::max<std::int64_t>(done - bytes, 0);
      parts[static_cast<std::size_t>(count++)] = piece(tail, tail_bytes, tail_done);
    }
    const ssize_t written = pwritev(file, parts.data(), count, offset + done);
    if (written < 0 && errno == EINTR) continue;
    require(written > 0, ExitCode::io, "{}: writing {} bytes at {} failed: {}", path, total, offset,
            errno_text(written < 0 ? errno : ENOSPC));
    done += written;
  }
}

void resize_file(int file, std::int64_t bytes, const std::string& path) {
  const FileSizeSignalBlock block;
  while (ftruncate(file, bytes) != 0) {
    require(errno == EINTR, ExitCode::io, "{}: extending it to {} bytes failed: {}", path, bytes,
            errno_text(errno));
  }
}

void synchronize_file(int file, const std::string& path) {
  while (fsync(file) != 0) {
    require(errno == EINTR, ExitCode::io, "{}: making it durable failed: {}", path,
            errno_text(errno));
  }
}

}  // namespace annulus
