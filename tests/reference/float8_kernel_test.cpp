// e4m3 on the machines that run kernels: instructions and functions are checked against the definition.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "reference/float16.h"
#include "reference/float8.h"
#include "tests/machine_test.h"
#include "tests/reference/code_values.h"
#include "tests/status_matchers.h"

namespace mla {

namespace gpu {
Status launch_round_pairs(const float*, uint16_t*, uint16_t*, int64_t);
Status launch_all_values(uint32_t*, float*);
}  // namespace gpu
namespace model {
Status launch_round_pairs(const float*, uint16_t*, uint16_t*, int64_t);
Status launch_all_values(uint32_t*, float*);
}  // namespace model

namespace {

/// Every 16-bit number of both types, and floats beside midpoints, which 16 bits cannot hold. Their
/// count is even.
std::vector<float> inputs() {
  std::vector<float> values;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int bits = 0; bits < 65536; ++bits) {
      values.push_back(to_float(dtype, static_cast<uint16_t>(bits)));
    }
  }
  for (int code = 0; code < 0x7E; ++code) {
    const float middle = static_cast<float>(
        (test::e4m3_by_definition(code) + test::e4m3_by_definition(code + 1)) / 2);
    for (const float towards : {0.0f, 1000.0f}) {
      values.push_back(std::nextafter(middle, towards));
      values.push_back(-std::nextafter(middle, towards));
    }
  }
  return values;
}

class Float8OnMachines : public MachineTest {};

TEST_P(Float8OnMachines, RoundToTheNearest) {
  const std::vector<float> values = inputs();
  const size_t pairs = values.size() / 2;
  DeviceBuffer from, by_instruction, by_function;
  ASSERT_OK(from.assign(*machine_, values.data(), values.size() * sizeof(float)));
  ASSERT_OK(by_instruction.allocate(*machine_, pairs * 2));
  ASSERT_OK(by_function.allocate(*machine_, pairs * 2));
  const auto round_pairs = MLA_ON_MACHINE(*machine_, launch_round_pairs);
  ASSERT_OK(round_pairs(from.as<float>(), by_instruction.as<uint16_t>(), by_function.as<uint16_t>(),
                        static_cast<int64_t>(pairs)));
  ASSERT_OK(machine_->synchronize());
  for (const DeviceBuffer* buffer : {&by_instruction, &by_function}) {
    std::vector<uint8_t> codes(values.size());  // the lower byte first
    ASSERT_OK(machine_->copy_to_host(codes.data(), buffer->data(), codes.size()));
    for (size_t i = 0; i < values.size(); ++i) {
      ASSERT_EQ(codes[i], test::nearest_e4m3(values[i])) << values[i];
    }
  }
}

TEST_P(Float8OnMachines, CodesHaveTheirValue) {
  DeviceBuffer device_halves, device_values;
  ASSERT_OK(device_halves.allocate(*machine_, 65536 * sizeof(uint32_t)));
  ASSERT_OK(device_values.allocate(*machine_, 256 * sizeof(float)));
  const auto all_values = MLA_ON_MACHINE(*machine_, launch_all_values);
  ASSERT_OK(all_values(device_halves.as<uint32_t>(), device_values.as<float>()));
  ASSERT_OK(machine_->synchronize());
  std::vector<uint32_t> halves(65536);
  std::vector<float> values(256);
  ASSERT_OK(machine_->copy_to_host(halves.data(), device_halves.data(), device_halves.bytes()));
  ASSERT_OK(machine_->copy_to_host(values.data(), device_values.data(), device_values.bytes()));
  for (int code = 0; code < 256; ++code) {
    const double expected = test::e4m3_by_definition(code);
    const float actual = values[size_t(code)];
    ASSERT_TRUE(actual == expected || (std::isnan(actual) && std::isnan(expected))) << code;
    ASSERT_EQ(std::signbit(actual), code >= 128) << code;
  }
  if (machine_->limits().compute_capability < 89)
    GTEST_SKIP() << "this GPU has no e4m3 instructions";
  const auto half = [](int code) -> uint32_t {
    if (code % 128 == 127) return 0x7FFF;
    for (int bits = 0; bits < 0x7C00; ++bits) {
      const double value = test::value_of(DType::kFloat16, static_cast<uint16_t>(bits));
      if (value == test::e4m3_by_definition(code % 128))
        return uint32_t(bits + code / 128 * 0x8000);
    }
    return 0;
  };
  uint32_t expected[256];
  for (int code = 0; code < 256; ++code) expected[code] = half(code);
  for (size_t codes = 0; codes < 65536; ++codes) {
    ASSERT_EQ(halves[codes], expected[codes >> 8] << 16 | expected[codes & 255]) << codes;
  }
}

INSTANTIATE_TEST_SUITE_P(Machines, Float8OnMachines,
                         testing::Values(MachineKind::kModel, MachineKind::kGpu),
                         [](const auto& test) {
                           return std::string(test.param == MachineKind::kModel ? "Model" : "Gpu");
                         });

}  // namespace
}  // namespace mla
