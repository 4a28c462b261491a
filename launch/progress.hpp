#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

namespace annulus::launch {

/// Text of a bar: phase, share done and time left where `fraction` (0 to 1) is above 0, else the
/// time so far.
std::string progress_text(const char* phase, double fraction, double seconds);

/// While it lives and the job is in the foreground of a terminal, work that takes over two seconds
/// shows how far this rank is. It writes to the terminal itself: under mpirun the standard streams
/// of a rank are pipes wherever they end. Without a terminal it does nothing.
class ProgressBar {
 public:
  /// `shown` false: never shows anything, as on all ranks but one and for output to machines.
  explicit ProgressBar(bool shown);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

 private:
  void run();
  void paint(double seconds);
  void erase();

  int terminal_ = -1;
  bool painted_ = false;
  bool ends_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;
};

}  // namespace annulus::launch
