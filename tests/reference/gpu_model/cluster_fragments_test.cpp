// The model's instructions for clusters are compared with what stages/common/ptx/ptx_sm90.h
// documents, and with what a GPU of compute capability 9.0 did when make_golden recorded it. Where
// there is such a GPU, it is compared, too.
#include "reference/testing/cluster_fragments.h"

#include <gtest/gtest.h>

#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/golden.h"
#include "reference/testing/hopper_fragments.h"
#include "stages/common/machine/machine.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

void expect_documented(Machine& machine) {
  std::vector<Observation> observations;
  ASSERT_OK(record_cluster_fragments(machine, &observations));
  EXPECT_EQ(observations.size(), 6u);
  for (const Observation& o : observations) EXPECT_EQ(undocumented(o), "") << o.name;
}

TEST(ClusterFragments, ModelDoesWhatIsDocumented) {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    SCOPED_TRACE(seed);
    gpu_model::schedule().seed = seed;
    expect_documented(model_machine());
  }
  gpu_model::schedule() = {};
}

TEST(ClusterFragments, ModelDoesWhatTheGpuDid) {
  const GoldenWords golden = read_golden_file(kClusterFragmentsFile);
  std::vector<Observation> observations;
  ASSERT_OK(record_cluster_fragments(model_machine(), &observations));
  EXPECT_EQ(observations.size(), golden.size()) << kClusterFragmentsFile << kGoldenFileHelp;
  for (const Observation& o : observations) {
    const auto found = golden.find(o.name);
    ASSERT_NE(found, golden.end()) << o.name;
    EXPECT_EQ(not_golden(o, found->second), "") << o.name;
  }
}

TEST(ClusterFragments, GpuDoesWhatIsDocumented) {
  std::string why_not;
  Machine* gpu = hopper_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  expect_documented(*gpu);
}

}  // namespace
}  // namespace mla
