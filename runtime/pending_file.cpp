#include "runtime/pending_file.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string_view>

#include "kernels/error.hpp"
#include "runtime/agreement.hpp"

namespace annulus {
namespace {

constexpr mode_t kMode = 0666;  // less the umask
// Names end at 255 bytes; the tail of a long one gives way to what marks a temporary file.
constexpr std::size_t kLongestStem = 200;

std::string folder_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string name_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

FileDescriptor open_folder(const std::string& path) {
  const std::string name = name_of(path);
  require(!name.empty() && name != "." && name != "..", ExitCode::cannot_create,
          "{}: is no name for a file", path);
  FileDescriptor folder(open(folder_of(path).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  require(static_cast<bool>(folder), ExitCode::cannot_create, "{}: cannot be created: {}: {}", path,
          folder_of(path), errno_text(errno));
  return folder;
}

void check_existing(int folder, const std::string& name, const std::string& path, bool force) {
  struct stat status {};
  if (fstatat(folder, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) {
    require(errno == ENOENT, ExitCode::cannot_create, "{}: cannot be created: {}", path,
            errno_text(errno));
    return;
  }
  require(S_ISREG(status.st_mode) || S_ISLNK(status.st_mode), ExitCode::cannot_create,
          "{}: exists and is not a regular file", path);
  require(force, ExitCode::cannot_create, "{}: exists; use --force to replace it", path);
}

std::string random_suffix() {
  std::array<unsigned char, 16> bytes{};
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t count = getrandom(bytes.data() + done, bytes.size() - done, 0);
    require(count > 0 || errno == EINTR, ExitCode::internal, "no random bytes: {}",
            errno_text(errno));
    if (count > 0) done += static_cast<std::size_t>(count);
  }
  std::string text;
  for (const unsigned char byte : bytes) text += fmt::format("{:02x}", byte);
  return text;
}

constexpr std::string_view kTemporaryMark = ".partial-";

std::string temporary_name(const std::string& name) {
  return name.substr(0, kLongestStem) + std::string(kTemporaryMark) + random_suffix();
}

// A run that was killed in the instant of its commit, or on a file system without nameless files,
// leaves a temporary file. Its lock went with it; that of a run at work is held.
void remove_stale(int folder, const std::string& name) {
  const int copy = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (copy < 0) return;
  const std::unique_ptr<DIR, int (*)(DIR*)> list(fdopendir(copy), closedir);
  if (!list) return;
  const std::string stem = name.substr(0, kLongestStem) + std::string(kTemporaryMark);
  while (const dirent* entry = readdir(list.get())) {
    if (!std::string_view(entry->d_name).starts_with(stem)) continue;
    const FileDescriptor file(
        openat(folder, entry->d_name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    struct stat status {};
    const bool stale = file && fstat(file.value(), &status) == 0 && S_ISREG(status.st_mode) &&
                       flock(file.value(), LOCK_EX | LOCK_NB) == 0;
    if (stale) static_cast<void>(unlinkat(folder, entry->d_name, 0));
  }
}

// Identity of a file across the processes of a host.
struct FileIdentity {
  std::int64_t process = 0;
  std::int64_t descriptor = -1;
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  std::array<char, 256> temporary{};
};

FileIdentity identity_of(int file, const std::string& temporary) {
  FileIdentity identity;
  struct stat status {};
  const bool known = fstat(file, &status) == 0;
  require(known, ExitCode::io, "temporary file: {}", errno_text(errno));
  identity.process = getpid();
  identity.descriptor = file;
  identity.device = status.st_dev;
  identity.inode = status.st_ino;
  temporary.copy(identity.temporary.data(), identity.temporary.size() - 1);
  return identity;
}

bool is_same(int file, const FileIdentity& identity) {
  struct stat status {};
  return fstat(file, &status) == 0 && status.st_dev == identity.device &&
         status.st_ino == identity.inode;
}

// ---- what a signal handler removes --------------------------------------------------------------

struct PendingPath {
  std::atomic<bool> used{false};
  std::atomic<bool> ready{false};
  std::array<char, 4096> path{};
};

std::array<PendingPath, 8>& pending_paths() {
  static std::array<PendingPath, 8> paths;
  return paths;
}

void note_pending(const std::string& path) {
  for (PendingPath& pending : pending_paths()) {
    if (path.size() >= pending.path.size() || pending.used.exchange(true)) continue;
    path.copy(pending.path.data(), path.size());
    pending.path[path.size()] = '\0';
    pending.ready = true;
    return;
  }
}

void forget_pending(const std::string& path) {
  for (PendingPath& pending : pending_paths()) {
    if (!pending.ready || path != pending.path.data()) continue;
    pending.ready = false;
    pending.used = false;
  }
}

}  // namespace

void remove_pending_files() noexcept {
  for (PendingPath& pending : pending_paths()) {
    if (pending.ready) static_cast<void>(unlink(pending.path.data()));
  }
}

void check_destination(const std::string& path, bool force) {
  const FileDescriptor folder = open_folder(path);
  const bool writable = faccessat(folder.value(), ".", W_OK | X_OK, 0) == 0;
  require(writable, ExitCode::cannot_create, "{}: cannot be created: {}: {}", path, folder_of(path),
          errno_text(errno));
  check_existing(folder.value(), name_of(path), path, force);
}

PendingFile::PendingFile(Communicator& communicator, const std::string& destination)
    : destination_(destination), name_(name_of(destination)) {
  const bool creator = communicator.rank() == 0;
  agree(communicator, [&] {
    folder_ = open_folder(destination_);
    if (!creator) return;
    remove_stale(folder_.value(), name_);
    create_nameless();
    if (!file_) create_named();
  });
  open_of_peer(communicator);
}

PendingFile::~PendingFile() {
  if (temporary_.empty()) return;
  static_cast<void>(unlinkat(folder_.value(), temporary_.c_str(), 0));
  forget_pending(folder_of(destination_) + "/" + temporary_);
}

void PendingFile::create_nameless() {
  const bool can_link = access("/proc/self/fd", X_OK) == 0;
  if (!can_link) return;
  file_ = FileDescriptor(openat(folder_.value(), ".", O_TMPFILE | O_RDWR | O_CLOEXEC, kMode));
  if (file_) lock();
}

// Where there are no locks, stale files stay: nothing else depends on it.
void PendingFile::lock() const { static_cast<void>(flock(file_.value(), LOCK_EX | LOCK_NB)); }

void PendingFile::create_named() {
  temporary_ = temporary_name(name_);
  note_pending(folder_of(destination_) + "/" + temporary_);
  file_ = FileDescriptor(openat(folder_.value(), temporary_.c_str(),
                                O_CREAT | O_EXCL | O_NOFOLLOW | O_RDWR | O_CLOEXEC, kMode));
  require(static_cast<bool>(file_), ExitCode::cannot_create, "{}: cannot be created: {}",
          destination_, errno_text(errno));
  lock();
}

// Opens rank 0's file on every rank: through /proc on one host; by its name elsewhere.
void PendingFile::open_of_peer(Communicator& communicator) {
  const bool creator = communicator.rank() == 0;
  for (const bool named : {false, true}) {
    FileIdentity mine;
    agree(communicator, [&] {
      if (!creator) return;
      if (named && temporary_.empty()) create_named();
      mine = identity_of(file_.value(), temporary_);
    });
    const auto bytes = std::as_bytes(std::span(&mine, 1));
    const auto gathered = gather_bytes(communicator, {bytes.begin(), bytes.end()});
    FileIdentity theirs;
    std::memcpy(&theirs, gathered[0].data(), sizeof(theirs));
    const bool has_name = theirs.temporary[0] != '\0';
    if (!creator && has_name) {
      temporary_ = theirs.temporary.data();
      note_pending(folder_of(destination_) + "/" + temporary_);
      file_ = FileDescriptor(
          openat(folder_.value(), temporary_.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC));
    } else if (!creator) {
      const std::string path = fmt::format("/proc/{}/fd/{}", theirs.process, theirs.descriptor);
      file_ = FileDescriptor(open(path.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC));
    }
    const std::byte found{is_same(file_.value(), theirs)};
    bool everywhere = true;
    for (const auto& other : gather_bytes(communicator, {found})) {
      everywhere = everywhere && other[0] == std::byte{1};
    }
    if (everywhere) return;
    require(!has_name, ExitCode::cannot_create,
            "{}: the ranks do not see the same folder; use one on a file system that all share",
            destination_);
  }
}

void PendingFile::commit(Communicator& communicator, bool force, bool durable) {
  agree(communicator, [&] {
    if (durable) synchronize_file(file_.value(), destination_);
    if (communicator.rank() != 0) file_.close(destination_);
  });
  agree(communicator, [&] {
    if (communicator.rank() != 0) return;
    publish(force);
    file_.close(destination_);
    if (durable) synchronize_file(folder_.value(), destination_);
  });
  forget_pending(folder_of(destination_) + "/" + temporary_);
  temporary_.clear();
}

void PendingFile::publish(bool force) {
  check_existing(folder_.value(), name_, destination_, force);
  const auto check = [&](int status) {
    require(status == 0 || errno != EEXIST, ExitCode::cannot_create,
            "{}: exists; use --force to replace it", destination_);
    require(status == 0, ExitCode::io, "{}: cannot get its name: {}", destination_,
            errno_text(errno));
  };
  const bool nameless = temporary_.empty();
  const std::string self = fmt::format("/proc/self/fd/{}", file_.value());
  if (nameless && !force) {
    return check(linkat(AT_FDCWD, self.c_str(), folder_.value(), name_.c_str(), AT_SYMLINK_FOLLOW));
  }
  if (nameless) {
    // A link cannot replace; a rename can, so the file has a temporary name for an instant.
    const std::string temporary = temporary_name(name_);
    check(linkat(AT_FDCWD, self.c_str(), folder_.value(), temporary.c_str(), AT_SYMLINK_FOLLOW));
    temporary_ = temporary;
    note_pending(folder_of(destination_) + "/" + temporary_);
  }
  if (force) {
    return check(renameat(folder_.value(), temporary_.c_str(), folder_.value(), name_.c_str()));
  }
  // Refuses to replace a file that appeared meanwhile; where the file system cannot, link does.
  const int status = renameat2(folder_.value(), temporary_.c_str(), folder_.value(), name_.c_str(),
                               RENAME_NOREPLACE);
  if (status == 0 || errno != EINVAL) return check(status);
  check(linkat(folder_.value(), temporary_.c_str(), folder_.value(), name_.c_str(), 0));
  check(unlinkat(folder_.value(), temporary_.c_str(), 0));
}

}  // namespace annulus
