#include "reference/parallel_for.h"

#include <gtest/gtest.h>

#include <stdexcept>

namespace mla {
namespace {

TEST(ParallelFor, CallsEveryItemOnce) {
  for (const int threads : {0, 1, 2, 7}) {
    for (const int64_t count : {0, 1, 2, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(count));
      parallel_for(count, threads, [&](int64_t i) { ++calls[size_t(i)]; });
      for (const std::atomic<int>& call : calls) ASSERT_EQ(call, 1);
    }
  }
}

TEST(ParallelFor, RethrowsAndStops) {
  for (const int threads : {1, 4}) {
    std::atomic<int> calls = 0;
    EXPECT_THROW(parallel_for(1'000'000, threads,
                              [&](int64_t i) {
                                ++calls;
                                if (i == 10) throw std::runtime_error("item 10");
                              }),
                 std::runtime_error);
    if (threads == 1) {
      EXPECT_EQ(calls, 11);
    }
  }
}

}  // namespace
}  // namespace mla
