/// @file
/// Google Benchmark for a test, by the flags of a command line.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bench/measure/google.h"
#include "tests/status_matchers.h"

namespace mla::bench {

inline GoogleFlags flags_of(const std::vector<std::string>& arguments) {
  GoogleFlags flags;
  EXPECT_OK(read_google_flags(arguments, &flags));
  return flags;
}

inline std::unique_ptr<GoogleBenchmark> driver(const std::vector<std::string>& names,
                                               const std::vector<std::string>& arguments = {}) {
  std::unique_ptr<GoogleBenchmark> google;
  EXPECT_OK(GoogleBenchmark::create(names, flags_of(arguments), /*show=*/false, &google));
  return google;
}

}  // namespace mla::bench
