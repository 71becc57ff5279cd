/// @file
/// One line on stderr that says what takes long.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

namespace mla::bench {

/// Shows the current step with the time it has taken: on a terminal as one line that is
/// overwritten; elsewhere as a line after two seconds without one, then at most every five.
class Progress {
 public:
  Progress();
  ~Progress();
  void step(std::string text);
  /// Wipes the line, so that something else can be printed.
  void clear() { step(""); }

 private:
  void show();  // needs the lock

  const bool terminal_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::string text_;
  bool shown_ = false;
  std::chrono::steady_clock::time_point since_;  ///< The current step
  std::chrono::steady_clock::time_point next_;   ///< Elsewhere than on a terminal: not before
  std::jthread ticker_;                          // last: it uses the others
};

}  // namespace mla::bench
