// Stage 13 converts codes to 16-bit values exactly: every pair of codes is tried, on each machine.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "reference/cache_format.h"
#include "tests/machine_test.h"
#include "tests/reference/code_values.h"
#include "tests/status_matchers.h"

namespace mla {

namespace gpu {
Status launch_unpack_pairs(DType, CacheFormat, uint32_t*);
}
namespace model {
Status launch_unpack_pairs(DType, CacheFormat, uint32_t*);
}

namespace {

class Unpack : public MachineTest {
 protected:
  void expect_exact(DType dtype, CacheFormat format) {
    constexpr size_t kCount = 65536;
    DeviceBuffer device_pairs;
    ASSERT_OK(device_pairs.allocate(*machine_, 2 * kCount * sizeof(uint32_t)));
    const auto unpack = MLA_ON_MACHINE(*machine_, launch_unpack_pairs);
    ASSERT_OK(unpack(dtype, format, device_pairs.as<uint32_t>()));
    ASSERT_OK(machine_->synchronize());
    std::vector<uint32_t> pairs(2 * kCount);
    ASSERT_OK(machine_->copy_to_host(pairs.data(), device_pairs.data(), device_pairs.bytes()));
    for (size_t i = 0; i < pairs.size(); ++i) {
      for (const int half : {0, 1}) {
        const int code = static_cast<int>(i >> 8 * half & 0xFF);
        const bool is_int8 = format == CacheFormat::kInt8Tile128;
        const double expected =
            is_int8 ? (code < 128 ? code : code - 256) : test::e4m3_by_definition(code);
        const double value =
            test::value_of(dtype, static_cast<uint16_t>(pairs[i] >> 16 * half & 0xFFFF));
        ASSERT_TRUE(value == expected || (std::isnan(value) && std::isnan(expected)))
            << code << ": " << value;
        if (!std::isnan(value) && !is_int8) {
          ASSERT_EQ(std::signbit(value), code >= 128) << code;
        }
      }
    }
  }
};

TEST_P(Unpack, EveryCodeExactly) {
  expect_exact(DType::kBFloat16, CacheFormat::kFp8Tensor);
  expect_exact(DType::kFloat16, CacheFormat::kFp8Tensor);
  expect_exact(DType::kBFloat16, CacheFormat::kInt8Tile128);
}

INSTANTIATE_TEST_SUITE_P(Machines, Unpack, testing::Values(MachineKind::kModel, MachineKind::kGpu),
                         [](const auto& test) {
                           return std::string(test.param == MachineKind::kModel ? "Model" : "Gpu");
                         });

}  // namespace
}  // namespace mla
