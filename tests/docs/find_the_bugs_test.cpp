// The lab of docs/traditional/README.md: what the tools find in each faulty kernel. In the mended ones they find nothing.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "docs/traditional/latent_decode.h"
#include "reference/gpu_model/counters.h"
#include "reference/gpu_model/gpu_model.h"
#include "tests/machine_test.h"
#include "tests/status_matchers.h"

namespace mla {

namespace gpu {
Status mended_first_decode(const LatentDecode&);
Status mended_second_decode(const LatentDecode&);
}  // namespace gpu
namespace model {
Status first_decode(const LatentDecode&);
Status second_decode(const LatentDecode&);
Status mended_first_decode(const LatentDecode&);
Status mended_second_decode(const LatentDecode&);
}  // namespace model

namespace {

constexpr int kColumns = LatentDecode::kColumns, kHeads = 3;
constexpr float kScale = 0.125F;

/// The index of a value in [rows, 64].
size_t at(int row, int column) {
  return static_cast<size_t>(row) * kColumns + static_cast<size_t>(column);
}

/// Which values a query has.
enum class Queries {
  kRandom,
  kEqualColumns,  ///< All columns of a head have the same value.
  kLarge,         ///< The same, and logits up to 160.
};

/// Inputs, and what they should give, by plain loops in double.
struct Data {
  std::vector<float> q, k, v;
  std::vector<double> expected;

  Data(int tokens, Queries queries) {
    std::mt19937 random(static_cast<unsigned>(tokens));
    std::uniform_real_distribution<float> uniform(-1, 1);
    const auto fill = [&](std::vector<float>* values, int rows) {
      values->resize(at(rows, 0));
      for (float& value : *values) value = uniform(random);
    };
    fill(&q, kHeads);
    fill(&k, tokens);
    fill(&v, tokens);
    if (queries != Queries::kRandom) {
      for (size_t i = 0; i < q.size(); ++i) {
        q[i] = queries == Queries::kLarge ? 20.F : 0.1F * static_cast<float>(1 + i / kColumns);
      }
    }
    if (queries == Queries::kLarge) std::fill_n(k.begin(), kColumns, 1.F);  // token 0
    for (int h = 0; h < kHeads; ++h) attend(tokens, &q[at(h, 0)]);
  }

 private:
  void attend(int tokens, const float* row) {
    std::vector<double> s;
    for (int t = 0; t < tokens; ++t) {
      double dot = 0;
      for (int c = 0; c < kColumns; ++c) dot += double{row[c]} * k[at(t, c)];
      s.push_back(double{kScale} * dot);
    }
    const double maximum = *std::max_element(s.begin(), s.end());
    double sum = 0;
    for (double& value : s) sum += value = std::exp(value - maximum);
    for (int c = 0; c < kColumns; ++c) {
      double o = 0;
      for (int t = 0; t < tokens; ++t) o += s[size_t(t)] * double{v[at(t, c)]};
      expected.push_back(o / sum);
    }
  }
};

/// Decodes, and says what is wrong: the kernel's rejection, or the first value that is off. Empty if nothing is.
std::string fault_of(Machine& machine, LatentKernel kernel, int tokens, Queries queries) {
  const Data data(tokens, queries);
  DeviceBuffer q, k, v, scores, out;
  std::vector<float> result(data.expected.size());
  const auto upload = [&](DeviceBuffer* buffer, const std::vector<float>& values) {
    EXPECT_OK(buffer->assign(machine, values.data(), values.size() * sizeof(float)));
    return buffer->as<float>();
  };
  EXPECT_OK(scores.allocate(machine, sizeof(float) * kHeads * static_cast<size_t>(tokens)));
  EXPECT_OK(out.allocate(machine, result.size() * sizeof(float)));
  EXPECT_OK(machine.fill(out.data(), 0xff, out.bytes()));
  Status status = kernel({upload(&q, data.q), upload(&k, data.k), upload(&v, data.v),
                          scores.as<float>(), out.as<float>(), kHeads, tokens, kScale});
  if (status.ok()) status = machine.synchronize();
  if (!status.ok()) return status.message();
  EXPECT_OK(machine.copy_to_host(result.data(), out.data(), out.bytes()));
  for (size_t i = 0; i < result.size(); ++i) {
    if (std::abs(result[i] - data.expected[i]) <= 1e-4) continue;
    return "out[" + std::to_string(i / kColumns) + ", " + std::to_string(i % kColumns) +
           "] = " + std::to_string(result[i]) + ", " + std::to_string(data.expected[i]) +
           " expected";
  }
  return "";
}

/// The share of the loads from global memory that one lane makes alone.
double share_of_one_lane(LatentKernel kernel) {
  gpu_model::Profile profile;
  gpu_model::schedule().profile = &profile;
  fault_of(model_machine(), kernel, 128, Queries::kRandom);
  gpu_model::schedule().profile = nullptr;
  double all = 0, alone = 0;
  for (const gpu_model::CountedLaunch& launch : profile.launches) {
    for (const gpu_model::CountedInstruction& one : launch.instructions) {
      const gpu_model::Counts& counts = one.counts;
      if (one.kind != gpu_model::AccessKind::kLoad) continue;
      all += static_cast<double>(counts.global_requests);
      if (counts.threads == counts.global_requests)
        alone += static_cast<double>(counts.global_requests);
    }
  }
  EXPECT_GT(all, 0);
  return alone / all;
}

/// What is found in a kernel, by the tool that finds it.
using Findings = std::map<std::string, std::string>;

Findings examine(LatentKernel kernel) {
  Machine& machine = model_machine();
  Findings findings;
  const auto note = [&](const char* by, const std::string& what) {
    if (!what.empty()) findings.insert({by, what});
  };
  gpu_model::schedule() = {};
  if (gpu_model::kernels_are_instrumented()) {
    const std::string report = fault_of(machine, kernel, 128, Queries::kRandom);
    if (report.find("race: ") == 0) note("race detector", report);
    gpu_model::schedule().detect_races = false;
    const double share = share_of_one_lane(kernel);
    if (share > 0.5) {
      note("counters", std::to_string(static_cast<int>(100 * share)) +
                           "% of the loads from global memory are of one thread alone");
    }
  }
  gpu_model::schedule().detect_races = false;
  for (const int tokens : {128, 300, 1024}) {
    note("values", fault_of(machine, kernel, tokens, Queries::kRandom));
  }
  for (const int tokens : {1, 100, 127}) {
    const std::string report = fault_of(machine, kernel, tokens, Queries::kRandom);
    if (report.find("__syncthreads") != std::string::npos)
      note("barriers", report);
    else
      note("values", report);
  }
  for (uint64_t seed = 1; seed < 4; ++seed) {
    gpu_model::schedule().seed = seed;
    note("values", fault_of(machine, kernel, 128, Queries::kRandom));
  }
  const std::string report = fault_of(machine, kernel, 128, Queries::kLarge);
  if (report.find("nan") != std::string::npos) note("large logits", report);
  gpu_model::schedule() = {};
  return findings;
}

std::string names_of(const Findings& findings) {
  std::string names;
  for (const auto& [by, what] : findings) names += (names.empty() ? "" : ", ") + by;
  return names;
}

/// The line of `text` in a file, as "first.cuh:33".
std::string place_of(const std::string& file, const std::string& text) {
  std::ifstream stream("docs/traditional/" + file);
  std::string line;
  for (int number = 1; std::getline(stream, line); ++number) {
    if (line.find(text) != std::string::npos) return file + ":" + std::to_string(number);
  }
  ADD_FAILURE() << file << " has no " << text;
  return "";
}

/// Whether the lab's page has this text.
bool page_has(const std::string& text) {
  std::ifstream stream("docs/traditional/README.md");
  const std::string page{std::istreambuf_iterator<char>(stream), {}};
  return page.find(text) != std::string::npos;
}

class FindTheBugs : public testing::Test {
 protected:
  void SetUp() override {
    if (!gpu_model::kernels_are_instrumented())
      GTEST_SKIP() << "kernels are not compiled for the race detector";
  }
  void TearDown() override { gpu_model::schedule() = {}; }
};

TEST_F(FindTheBugs, OfTheFirstKernel) {
  Findings found = examine(model::first_decode);
  EXPECT_EQ(names_of(found), "counters, large logits, values");
  // It takes one number for a head's whole query, which is right where all columns are equal.
  EXPECT_EQ(found["values"].find("out[0, 0] = "), 0u) << found["values"];
  EXPECT_EQ(fault_of(model_machine(), model::first_decode, 128, Queries::kEqualColumns), "");
  // It does not subtract the maximum, so exp() overflows.
  EXPECT_EQ(found["large logits"].find("out[0, 0] = "), 0u) << found["large logits"];
  // One thread alone computes the output.
  const std::string& counters = found["counters"];
  EXPECT_NE(counters.find("% of the loads from global memory are of one thread alone"),
            std::string::npos)
      << counters;
#ifndef __clang__  // clang's loads differ
  EXPECT_TRUE(page_has("counters: " + counters)) << counters;
#endif
}

TEST_F(FindTheBugs, OfTheSecondKernel) {
  Findings found = examine(model::second_decode);
  EXPECT_EQ(names_of(found), "barriers, race detector, values");
  // All threads write the maximum. No schedule shows it, because the model does not interrupt a thread in between.
  const std::string& race = found["race detector"];
  EXPECT_NE(race.find(place_of("second.cuh", "fmaxf(smem.maximum")), std::string::npos) << race;
  EXPECT_TRUE(page_has(race.substr(0, race.find(", block")))) << race;
  EXPECT_NE(race.find("no __syncwarp or barrier between them"), std::string::npos) << race;
  // Threads without a token do not come to the tree's barriers.
  const std::string& barrier = found["barriers"];
  EXPECT_NE(barrier.find(place_of("second.cuh", "// all sums are there")), std::string::npos)
      << barrier;
  EXPECT_TRUE(page_has(barrier)) << barrier;
  // With a token for each thread, the tree adds up the weights instead of the sums.
  EXPECT_EQ(found["values"].find("out[0, 0] = "), 0u) << found["values"];
}

TEST_F(FindTheBugs, NotOfTheMendedKernels) {
  EXPECT_EQ(names_of(examine(model::mended_first_decode)), "");
  EXPECT_EQ(names_of(examine(model::mended_second_decode)), "");
  EXPECT_EQ(share_of_one_lane(model::mended_first_decode), 0);
}

class Mended : public MachineTest {};

TEST_P(Mended, IsRight) {
  for (const LatentKernel kernel : {MLA_ON_MACHINE(*machine_, mended_first_decode),
                                    MLA_ON_MACHINE(*machine_, mended_second_decode)}) {
    for (const int tokens : {1, 100, 128, 300, 1024}) {
      for (const Queries queries : {Queries::kRandom, Queries::kEqualColumns, Queries::kLarge}) {
        EXPECT_EQ(fault_of(*machine_, kernel, tokens, queries), "") << tokens;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Machines, Mended, testing::Values(MachineKind::kModel, MachineKind::kGpu),
                         [](const auto& test) {
                           return std::string(test.param == MachineKind::kModel ? "Model" : "Gpu");
                         });

/// For the reader: says what is still found in a kernel under repair.
void expect_nothing(LatentKernel kernel) {
  for (const auto& [by, what] : examine(kernel)) ADD_FAILURE() << by << ": " << what;
}
TEST(Lab, DISABLED_First) {
  expect_nothing(model::first_decode);
}
TEST(Lab, DISABLED_Second) {
  expect_nothing(model::second_decode);
}

}  // namespace
}  // namespace mla
