/// @file
/// A loop over independent items on several threads: all the parallelism the CPU side needs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace mla {

/// Calls `body(i)` for every i in [0, count), in any order, on up to `num_threads` threads (0: all
/// cores), the caller's among them. Items are handed out one by one, so a long one delays no other.
/// If a call throws, the items not yet begun are dropped and the first exception is rethrown here.
template <typename Body>
void parallel_for(int64_t count, int num_threads, Body&& body) {
  if (num_threads <= 0) num_threads = static_cast<int>(std::thread::hardware_concurrency());
  const int64_t workers = std::min<int64_t>(std::max(num_threads, 1), count);
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      for (int64_t i = next++; i < count; i = next++) body(i);
    } catch (...) {
      next = count;
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  try {
    threads.reserve(static_cast<size_t>(std::max<int64_t>(workers - 1, 0)));
    for (int64_t i = 1; i < workers; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that run, and this one, do the work.
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace mla
