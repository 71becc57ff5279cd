// The labs of docs/course/labs: solutions are right on both machines. The model finds what is wrong with each faulty form, and with
// the kernels that lack the marked part.
#include <gtest/gtest.h>

#include <bit>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "docs/course/labs/labs.h"
#include "reference/float16.h"
#include "reference/gpu_model/counters.h"
#include "reference/gpu_model/gpu_model.h"
#include "stages/common/machine/machine.h"
#include "tests/status_matchers.h"

namespace mla {

namespace gpu {
std::vector<LabForm> ampere_labs();
std::vector<LabForm> hopper_labs();
}  // namespace gpu
namespace model {
std::vector<LabForm> ampere_labs();
std::vector<LabForm> hopper_labs();
std::vector<LabForm> faulty_labs();
}  // namespace model

namespace {

#ifdef __clang__
constexpr bool kIsClang = true;
#else
constexpr bool kIsClang = false;
#endif

constexpr int kCount = 7;  // tiles, or rounds: more than the buffers of any ring, and an odd number

/// Words that all differ; so do their 16-bit halves.
std::vector<uint32_t> words(size_t count) {
  std::vector<uint32_t> result(count);
  for (size_t i = 0; i < count; ++i) {
    result[i] = static_cast<uint32_t>((2 * i + 1) << 16 | (2 * i));
  }
  return result;
}

/// Small whole numbers in bf16, two to a word: sums of their products are exact.
std::vector<uint32_t> numbers(size_t rows, size_t columns, int factor) {
  std::vector<uint32_t> result(rows * columns / 2);
  for (size_t i = 0; i < rows * columns; ++i) {
    const int value = static_cast<int>((i / columns * 5 + i % columns * 3) % 11) - 5 + factor;
    const auto bits = std::bit_cast<uint16_t>(from_float<bfloat16>(static_cast<float>(value)));
    result[i / 2] |= uint32_t{bits} << (i % 2 * 16);
  }
  return result;
}

float number_at(const std::vector<uint32_t>& values, size_t i) {
  return to_float(std::bit_cast<bfloat16>(static_cast<uint16_t>(values[i / 2] >> (i % 2 * 16))));
}

/// What a lab's kernel gets and should give. It gives words, or floats where there is a b.
struct Case {
  std::vector<uint32_t> a, b, expected;
};

/// a bᵀ over 64 values, as floats.
Case product(size_t rows, size_t columns) {
  Case result{numbers(rows, 64, 0), numbers(columns, 64, 1), {}};
  for (size_t row = 0; row < rows; ++row) {
    for (size_t column = 0; column < columns; ++column) {
      float sum = 0;
      for (size_t k = 0; k < 64; ++k) {
        sum += number_at(result.a, row * 64 + k) * number_at(result.b, column * 64 + k);
      }
      result.expected.push_back(std::bit_cast<uint32_t>(sum));
    }
  }
  return result;
}

/// out[i] = sum over tiles of a[tile][place(i)]. A tile has `size` words.
template <typename Place>
Case sum_of_tiles(size_t size, Place place) {
  Case result{words(kCount * size), {}, {}};
  for (size_t i = 0; i < 128; ++i) {
    uint32_t sum = 0;
    for (size_t tile = 0; tile < kCount; ++tile) sum += result.a[tile * size + place(i)];
    result.expected.push_back(sum);
  }
  return result;
}

Case case_of(const std::string& lab) {
  if (lab == "cp_async_ring") return sum_of_tiles(512, [](size_t i) { return (127 - i) * 4; });
  if (lab == "mbarrier_ring" || lab == "named_barriers") {
    return sum_of_tiles(128, [](size_t i) { return i; });
  }
  if (lab == "mma") return product(16, 8);
  if (lab == "wgmma") return product(64, 64);
  if (lab == "ldmatrix_swizzle") {
    Case result{words(16 * 32), {}, {}};
    for (size_t i = 0; i < size_t{4} * 32 * 4; ++i) {
      const size_t step = i / 128, lane = i / 4 % 32, part = i % 4;
      // Register `part` has rows lane / 4 (+ 8) and the pair of columns lane % 4 of the left or the right chunk.
      const size_t row = lane / 4 + part % 2 * 8, word = step * 8 + part / 2 * 4 + lane % 4;
      result.expected.push_back(result.a[row * 32 + word]);
    }
    return result;
  }
  if (lab == "tma_box") {
    Case result{words(100 * 64), {}, {}};
    for (size_t row = 40; row < 104; ++row) {
      for (size_t word = 32; word < 64; ++word) {
        result.expected.push_back(row < 100 ? result.a[row * 64 + word] : 0);
      }
    }
    return result;
  }
  Case result{words(256), {}, {}};  // cluster_exchange
  for (size_t i = 0; i < 256; ++i) result.expected.push_back(result.a[(i + 128) % 256]);
  return result;
}

/// Runs a form, and says what is wrong: the kernel's rejection, or the first value that is off. Empty if nothing is.
std::string fault_of(Machine& machine, const LabForm& form) {
  const Case data = case_of(form.lab);
  DeviceBuffer a, b, out;
  EXPECT_OK(a.assign(machine, data.a.data(), data.a.size() * 4));
  if (!data.b.empty()) {
    EXPECT_OK(b.assign(machine, data.b.data(), data.b.size() * 4));
  }
  EXPECT_OK(out.allocate(machine, data.expected.size() * 4));
  EXPECT_OK(machine.fill(out.data(), 0xff, out.bytes()));
  Status status = form.run({a.data(), b.data(), out.as<uint32_t>(), kCount});
  if (status.ok()) status = machine.synchronize();
  if (!status.ok()) return status.message();
  std::vector<uint32_t> result(data.expected.size());
  EXPECT_OK(machine.copy_to_host(result.data(), out.data(), out.bytes()));
  for (size_t i = 0; i < result.size(); ++i) {
    if (result[i] == data.expected[i]) continue;
    const auto text = [&](uint32_t bits) {
      return data.b.empty() ? std::to_string(bits) : std::to_string(std::bit_cast<float>(bits));
    };
    return "out[" + std::to_string(i) + "] = " + text(result[i]) + ", " + text(data.expected[i]) +
           " expected";
  }
  return "";
}

/// How many wavefronts of shared memory a run takes only because of bank conflicts.
uint64_t conflicts_of(const LabForm& form) {
  gpu_model::Profile profile;
  gpu_model::schedule().profile = &profile;
  fault_of(model_machine(), form);
  gpu_model::schedule().profile = nullptr;
  uint64_t conflicts = 0;
  for (const gpu_model::CountedLaunch& launch : profile.launches) {
    for (const gpu_model::CountedInstruction& one : launch.instructions) {
      conflicts += one.counts.shared_conflicts;
    }
  }
  return conflicts;
}

/// What the model finds, under several schedules, with the race detector and without. Empty if nothing.
std::string found_in(const LabForm& form) {
  std::string found;
  for (const bool detect_races : {false, true}) {
    for (uint64_t seed = 0; seed < 8 && found.empty(); ++seed) {
      gpu_model::schedule() = {.seed = seed, .detect_races = detect_races};
      found = fault_of(model_machine(), form);
    }
  }
  gpu_model::schedule() = {};
  const bool counts =
      gpu_model::kernels_are_instrumented() && form.lab == std::string("ldmatrix_swizzle");
  if (!found.empty() || !counts) return found;
  const uint64_t conflicts = conflicts_of(form);
  return conflicts == 0 ? "" : "right, but with " + std::to_string(conflicts) + " bank conflicts";
}

/// The labs of both lists in this form.
std::vector<LabForm> forms_named(std::vector<LabForm> forms, const std::vector<LabForm>& more,
                                 const std::string& form) {
  forms.insert(forms.end(), more.begin(), more.end());
  std::erase_if(forms, [&](const LabForm& one) { return one.form != form; });
  return forms;
}

class Labs : public testing::Test {
 protected:
  void TearDown() override { gpu_model::schedule() = {}; }
};

TEST_F(Labs, SolutionsAreRight) {
  const auto solutions = forms_named(model::ampere_labs(), model::hopper_labs(), "solution");
  EXPECT_EQ(solutions.size(), 8u);
  for (const LabForm& form : solutions) EXPECT_EQ(found_in(form), "") << form.lab;
}

TEST_F(Labs, KernelsWithoutTheMarkedPartAreWrong) {
  for (const LabForm& form : forms_named(model::ampere_labs(), model::hopper_labs(), "reader")) {
    EXPECT_NE(found_in(form), "") << form.lab;
  }
}

/// What a lab's page calls a finding.
std::string kind_of(const std::string& found) {
  for (const auto& [begin, kind] : {std::pair{"out[", "wrong results"},
                                    {"deadlock", "deadlock"},
                                    {"race: ", "race"},
                                    {"right, but", found.c_str()}}) {
    if (found.find(begin) == 0) return kind;
  }
  return "error";
}

/// Whether the lab's page has this line.
bool page_has(const std::string& lab, const std::string& line) {
  std::ifstream stream("docs/course/labs/" + lab + ".md");
  const std::string page{std::istreambuf_iterator<char>(stream), {}};
  return page.find("\n" + line + "\n") != std::string::npos;
}

TEST_F(Labs, FaultsAreFoundAsThePagesSay) {
  if (!gpu_model::kernels_are_instrumented())
    GTEST_SKIP() << "kernels are not compiled for the race detector";
  for (const LabForm& form : model::faulty_labs()) {
    const std::string found = found_in(form);
    EXPECT_NE(found, "") << form.lab << ": " << form.form;
    RecordProperty(std::string(form.lab) + ": " + form.form, found);
    const std::string line = "| " + std::string(form.form) + " | " + kind_of(found) + " |";
    // clang may order accesses differently, so that another fault comes first.
    EXPECT_TRUE(kIsClang || page_has(form.lab, line)) << form.lab << ": " << line;
  }
}

/// The labs that the GPU here can run; none without a GPU.
std::vector<LabForm> labs_of_gpu() {
  Machine* machine = gpu_machine();
  if (machine == nullptr || machine->limits().compute_capability < 80) return {};
  std::vector<LabForm> forms = MLA_ON_MACHINE(*machine, ampere_labs)();
  if (machine->limits().compute_capability == 90) {
    const std::vector<LabForm> more = MLA_ON_MACHINE(*machine, hopper_labs)();
    forms.insert(forms.end(), more.begin(), more.end());
  }
  return forms;
}

TEST_F(Labs, SolutionsAreRightOnAGpu) {
  const std::vector<LabForm> solutions = forms_named(labs_of_gpu(), {}, "solution");
  if (solutions.empty()) GTEST_SKIP() << "no GPU of compute capability 8.0 or newer";
  for (const LabForm& form : solutions) EXPECT_EQ(fault_of(*gpu_machine(), form), "") << form.lab;
}

/// For the reader: what is still wrong with an unfinished kernel. It runs on a GPU only if it is right on the model, because a GPU
/// hangs where the model reports.
class Lab : public testing::TestWithParam<const char*> {};

TEST_P(Lab, DISABLED_IsRight) {
  const auto of_reader = [](std::vector<LabForm> forms, const std::vector<LabForm>& more) {
    forms = forms_named(std::move(forms), more, "reader");
    std::erase_if(forms, [](const LabForm& one) { return one.lab != std::string(GetParam()); });
    return forms;
  };
  for (const LabForm& form : of_reader(model::ampere_labs(), model::hopper_labs())) {
    ASSERT_EQ(found_in(form), "");
  }
  for (const LabForm& form : of_reader(labs_of_gpu(), {})) {
    EXPECT_EQ(fault_of(*gpu_machine(), form), "") << "on the GPU";
  }
}

INSTANTIATE_TEST_SUITE_P(Labs, Lab,
                         testing::Values("cp_async_ring", "ldmatrix_swizzle", "mma", "tma_box",
                                         "mbarrier_ring", "wgmma", "named_barriers",
                                         "cluster_exchange"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace mla
