// The model's wgmma, TMA, stmatrix and mbarrier are compared with what a GPU of compute capability
// 9.0 did, as recorded in reference/testing/golden/hopper_fragments.txt, and with what
// stages/common/ptx/ptx_sm90.h documents. Where there is such a GPU, it is compared, too.
#include "reference/testing/hopper_fragments.h"

#include <gtest/gtest.h>

#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/golden.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

void expect_documented(Machine& machine) {
  std::vector<Observation> observations;
  const Status status = record_hopper_fragments(machine, &observations);
  ASSERT_OK(status);
  for (const Observation& o : observations) EXPECT_EQ(undocumented(o), "") << o.name;
}

void expect_golden(Machine& machine) {
  const GoldenWords golden = read_golden_file(kHopperFragmentsFile);
  std::vector<Observation> observations;
  const Status status = record_hopper_fragments(machine, &observations);
  EXPECT_EQ(observations.size(), golden.size()) << kHopperFragmentsFile << kGoldenFileHelp;
  for (const Observation& o : observations) {
    const auto found = golden.find(o.name);
    if (found == golden.end()) {
      ADD_FAILURE() << o.name << " is not in " << kHopperFragmentsFile;
    } else {
      EXPECT_EQ(not_golden(o, found->second), "") << o.name;
    }
  }
}

TEST(HopperFragments, ModelDoesWhatIsDocumented) {
  for (const uint64_t seed : {0, 1, 2, 3}) {
    SCOPED_TRACE(seed);
    gpu_model::schedule().seed = seed;
    expect_documented(model_machine());
  }
  gpu_model::schedule() = {};
}

TEST(HopperFragments, ModelDoesWhatTheGpuDid) {
  expect_golden(model_machine());
}

TEST(HopperFragments, GpuDoesWhatIsDocumented) {
  std::string why_not;
  Machine* gpu = hopper_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  expect_documented(*gpu);
}

TEST(HopperFragments, GpuDoesWhatTheGpuDid) {
  std::string why_not;
  Machine* gpu = hopper_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  expect_golden(*gpu);
}

}  // namespace
}  // namespace mla
