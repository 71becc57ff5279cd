// The model's mma, ldmatrix and cp.async are compared with what a GPU did, as recorded in
// reference/testing/golden/fragments.txt. Where there is a GPU, it is compared, too.
#include "reference/testing/fragments.h"
#include "tests/status_matchers.h"

#include <gtest/gtest.h>

#include <bit>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace mla {
namespace {

void expect_close(const std::vector<uint32_t>& actual, const std::vector<uint32_t>& expected,
                  const std::vector<double>& scale) {
  ASSERT_EQ(actual.size(), scale.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    // Hardware adds in its own order, and cuts off bits that fp32 would round.
    ASSERT_NEAR(std::bit_cast<float>(actual[i]), std::bit_cast<float>(expected[i]),
                0x1p-20 * scale[i])
        << "product " << i / 128 << ", lane " << i / 4 % 32 << ", d[" << i % 4 << "]";
  }
}

void expect_golden(Machine& machine) {
  const GoldenWords golden = read_golden_file(kFragmentsFile);
  GoldenWords actual;
  const Status status = record_fragments(machine, &actual);
  ASSERT_OK(status);
  ASSERT_EQ(actual.size(), golden.size()) << kFragmentsFile << kGoldenFileHelp;
  for (const auto& [name, expected] : golden) {
    SCOPED_TRACE(name);
    ASSERT_EQ(actual[name].size(), expected.size());
    if (name == "mma_bf16_random") {
      expect_close(actual[name], expected, mma_magnitudes(DType::kBFloat16));
    } else if (name == "mma_fp16_random") {
      expect_close(actual[name], expected, mma_magnitudes(DType::kFloat16));
    } else {
      EXPECT_EQ(actual[name], expected);
    }
  }
}

TEST(Fragments, ModelDoesWhatTheGpuDid) {
  expect_golden(model_machine());
}

TEST(Fragments, GpuDoesWhatTheGpuDid) {
  std::string why_not;
  Machine* gpu = gpu_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  expect_golden(*gpu);
}

// Together with the tests above this means: make_golden on the same GPU writes the same bytes again.
TEST(Fragments, FilesAreWrittenAsTheyWereRead) {
  for (const char* path : {kFragmentsFile, kHopperFragmentsFile}) {
    SCOPED_TRACE(path);
    std::ifstream file(path);
    std::string comments, line;
    while (file.peek() == '#' && std::getline(file, line)) comments += line + "\n";
    ASSERT_NE(comments, "") << path << kGoldenFileHelp;
    std::ostringstream words, written;
    words << file.rdbuf();
    write_golden_words(written, read_golden_file(path));
    EXPECT_EQ(written.str(), words.str());
  }
}

}  // namespace
}  // namespace mla
