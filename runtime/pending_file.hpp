#pragma once

#include <cstdint>
#include <string>

#include "runtime/posix_file.hpp"
#include "sharding/communicator.hpp"

namespace annulus {

/// A new file that all ranks write and that has no name in its folder until commit(): the kernel
/// drops it when the last rank is gone, however that happens. Where the file system or several
/// hosts do not allow that, it stands beside the destination under an exclusive, random name that
/// the destructor of every rank removes; what a killed run left there goes when the next begins.
/// The folder is resolved once, so nothing planted on the
/// path later leads out of it.
class PendingFile {
 public:
  /// Collective; throws cannot_create on all ranks.
  PendingFile(Communicator& communicator, const std::string& destination);
  ~PendingFile();
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;

  int descriptor() const { return file_.value(); }
  const std::string& destination() const { return destination_; }

  /// Makes this rank's writes durable (when asked) and gives the file its name, once all ranks are
  /// done; an existing file is replaced in one step with `force`, else left alone and refused.
  /// Collective: all ranks throw together.
  void commit(Communicator& communicator, bool force, bool durable);

 private:
  void create_nameless();
  void create_named();
  void open_of_peer(Communicator& communicator);
  void lock() const;
  void publish(bool force);

  std::string destination_;
  std::string name_;       // of the destination in its folder
  std::string temporary_;  // empty: the file has no name
  FileDescriptor folder_;
  FileDescriptor file_;
};

/// Removes the named temporary files of this process; for signal handlers, hence async-signal-safe.
void remove_pending_files() noexcept;

/// Throws cannot_create unless a file could be created at `path`.
void check_destination(const std::string& path, bool force);

}  // namespace annulus
