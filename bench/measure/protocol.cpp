#include "bench/measure/protocol.h"

#include <algorithm>
#include <iterator>

namespace mla::bench {

const char* to_string(Mode mode) {
  return mode == Mode::kCold ? "cold" : "sustained";
}

RunCounts gpu_run_counts(double microseconds) {
  const auto found = std::find_if(std::begin(kGpuRunClasses), std::end(kGpuRunClasses) - 1,
                                  [&](const RunClass& one) { return microseconds < one.below_us; });
  return found->counts;
}

RunCounts model_run_counts(double microseconds) {
  return {.warmups = 0, .rounds = microseconds < 1.5e6 ? 3 : 1, .runs = 1, .sustained = false};
}

}  // namespace mla::bench
