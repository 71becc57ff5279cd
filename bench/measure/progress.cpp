#include "bench/measure/progress.h"

#include <unistd.h>

#include <cstdio>

namespace mla::bench {

Progress::Progress() : terminal_(isatty(STDERR_FILENO) == 1) {
  ticker_ = std::jthread([this](const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (!stop.stop_requested()) {
      changed_.wait_for(lock, stop, std::chrono::milliseconds(500), [] { return false; });
      show();
    }
  });
}

Progress::~Progress() {
  clear();
}

void Progress::step(std::string text) {
  const std::lock_guard lock(mutex_);
  if (terminal_ && shown_) std::fputs("\r\033[K", stderr);
  since_ = std::chrono::steady_clock::now();
  if (text_.empty()) next_ = since_ + std::chrono::seconds(2);
  text_ = std::move(text);
  shown_ = false;
}

void Progress::show() {
  if (text_.empty()) return;
  const auto now = std::chrono::steady_clock::now();
  const std::chrono::duration<double> elapsed = now - since_;
  if (terminal_) {
    if (elapsed.count() < 0.5) return;
    std::fprintf(stderr, "\r\033[K%s … %.0f s", text_.c_str(), elapsed.count());
  } else {
    if (shown_ || now < next_) return;
    std::fprintf(stderr, "%s …\n", text_.c_str());
    next_ = now + std::chrono::seconds(5);
  }
  std::fflush(stderr);
  shown_ = true;
}

}  // namespace mla::bench
