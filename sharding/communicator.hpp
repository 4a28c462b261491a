#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "kernels/types.hpp"

namespace annulus {

/// Bytes to send to, or to receive from, one peer. Messages between one pair of ranks match in the
/// order in which they are given; their sizes must agree.
struct Send {
  int peer = 0;
  const void* data = nullptr;
  std::int64_t bytes = 0;
  /// In the allocation of the message before it to that peer: where it also follows it there, both
  /// may move at once.
  bool same_allocation = false;
  /// Where there are several: `bytes` are rows of equal length, so many bytes apart. They arrive as
  /// one message. Only with Carrier::copy_engine.
  std::int64_t rows = 1;
  std::int64_t pitch = 0;
};

struct Receive {
  int peer = 0;
  void* data = nullptr;
  std::int64_t bytes = 0;
  bool same_allocation = false;  // as in Send
};

/// Transfers under way. The memory belongs to the transfer until wait() returns.
class Exchange {
 public:
  virtual ~Exchange() = default;
  /// Moves the transfer on; true once it is complete.
  virtual bool test() = 0;
  /// On the CPU returns when complete; on a device makes `stream` wait for it.
  virtual void wait(Stream stream = {}) = 0;
  /// Whether wait() does nothing that may itself wait for what the device holds: then a kernel that
  /// waits for these bytes may be queued before it. Stays as it is.
  virtual bool may_follow_kernel() const { return false; }
};

/// Memory of this rank that peers may read in place.
class Window {
 public:
  virtual ~Window() = default;
  virtual void* local() = 0;
  /// The same allocation of `peer`, or null when it cannot be read from here.
  virtual const void* peer(int peer) const = 0;
  /// Bytes from one readable rank's memory to the next's where all lie at equal distances, in an
  /// order of theirs; 0: they lie anywhere.
  virtual std::int64_t stride() const { return 0; }
  /// Says that bytes [begin, end) of local() will be written, before they are: their pages are made
  /// at once, and large where that is possible.
  virtual void expect(std::int64_t /*begin*/, std::int64_t /*end*/) {}
  /// Before this rank writes what peers may have read: on a device `stream` waits for them.
  virtual void begin_writes(Stream /*stream*/ = {}) {}
  /// Collective: what every rank wrote before is visible to all after it; on a device to what
  /// `stream` is given from then on.
  virtual void fence(Stream stream = {}) = 0;
  /// Where ranks would take one device from each other all the time: returns when it is this rank's
  /// turn, which goes round, from the first rank on. All ranks take the same number of turns.
  virtual void take_turn() {}
  /// Waits for what `stream` holds where ranks take turns. `last`: none is taken after this one.
  virtual void end_turn(bool /*last*/, Stream /*stream*/ = {}) {}
  /// After the last read of peers' memory was given to `stream`; nothing on the host.
  virtual void end_reads(Stream /*stream*/ = {}) {}
};

/// A group of ranks that move bytes, on the host or between devices. Calls are collective unless
/// said otherwise, and throw Error(peer) when a peer or the transport fails.
class Communicator {
 public:
  /// Who moves the bytes: kernels that need room on the device, or somebody else.
  enum class Carrier : std::uint8_t { kernels, copy_engine };

  /// Who reads windows of that memory in place: those of the node on the host, and on a device
  /// nobody, or all ranks where one device has the memory of them all.
  enum class Reach : std::uint8_t { nobody, node, everybody };

  /// `device`: where the memory that exchange() moves lives; the collectives take host memory.
  explicit Communicator(Device device = Device::cpu, Carrier carrier = Carrier::kernels,
                        Reach reach = Reach::nobody)
      : device_(device), carrier_(carrier), reach_(device == Device::cpu ? Reach::node : reach) {}
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  Device device() const { return device_; }
  /// A kernel may wait for bytes that only the copy engine moves; one that fills the device and
  /// waits for bytes that other kernels move waits for ever.
  Carrier carrier() const { return carrier_; }
  Reach reach() const { return reach_; }
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Ranks of one colour form a new group, ordered by `key`.
  virtual std::unique_ptr<Communicator> split(int color, int key) = 0;
  /// What split() gives, made at the first call with this `name` and kept as long as this group: a
  /// split costs a collective call and its windows their pages. All ranks give the same name.
  Communicator& part(const std::string& name, int color, int key);
  /// Concatenates equal-sized contributions of host memory in rank order.
  virtual void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) = 0;
  /// Sums fp32 over the ranks in rank order, the same bits everywhere.
  virtual void all_reduce_sum(std::span<float> values) = 0;
  /// Memory readable by peers on the same node; null pointers for the others. Its stride is a
  /// multiple of `granule`, the same on all ranks, where that costs little. What it holds at first
  /// is anything.
  virtual std::unique_ptr<Window> expose(std::int64_t bytes, std::int64_t granule = 1) = 0;

  /// Starts sends and receives; not collective. Zero-byte messages are not sent. Bytes to oneself
  /// are copied and not counted.
  std::unique_ptr<Exchange> exchange(std::span<const Send> sends, std::span<const Receive> receives,
                                     Stream stream = {});

  void barrier();
  /// Payload bytes this rank has sent to other ranks by exchange() since construction.
  std::int64_t bytes_sent() const { return bytes_sent_; }

 protected:
  virtual std::unique_ptr<Exchange> start(std::span<const Send> sends,
                                          std::span<const Receive> receives, Stream stream) = 0;

 private:
  Device device_;
  Carrier carrier_;
  Reach reach_;
  std::int64_t bytes_sent_ = 0;
  std::map<std::string, std::unique_ptr<Communicator>> parts_;
};

}  // namespace annulus
