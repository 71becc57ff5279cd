// The oracle is compared with the Eigen reference, which shares no code with it.
#include "reference/testing/oracle.h"

#include <gtest/gtest.h>

#include <cmath>

#include "reference/testing/data_generator.h"
#include "reference/testing/device_data.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

// 200 seeded cases on a GPU, fewer on the model.
void expect_equal_to_reference(Machine& machine, int cases) {
  constexpr std::pair<int, int> kHeads[] = {{1, 1}, {3, 3}, {9, 3}, {16, 1}, {64, 8}};
  for (int i = 0; i < cases; ++i) {
    DecodeCase spec;
    spec.dtype = i % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
    spec.batch = 1 + i % 3;
    spec.seqlen_q = 1 + i % 4;
    spec.seqlen_k = 10 + 37 * (i % 7);
    spec.num_heads_q = kHeads[i % 5].first;
    spec.num_heads_kv = kHeads[i % 5].second;
    spec.variable_lengths = i % 3 != 0;
    spec.empty_fraction = 0.2;
    spec.causal = i % 4 >= 2;
    spec.data = i % 6 < 3 ? DataKind::kNeedles : DataKind::kFlat;
    spec.seed = static_cast<uint64_t>(i);
    if (i % 3 == 1) spec.cache_format = kCacheFormats[i / 3 % 4];
    if (has_tile_scales(spec.cache_format)) spec.dtype = DType::kBFloat16;
    SCOPED_TRACE(spec.name());
    const DataSet data = make_data_set(spec);
    HostTensors host = generate(data);
    DeviceTensors device;
    ASSERT_OK(generate_on_device(machine, data, &device));

    ReferenceResult expected, actual;
    ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
    ASSERT_OK(oracle_decode(machine, data.problem, device.tensors(), &actual));
    ASSERT_EQ(actual.out.size(), expected.out.size());
    ASSERT_EQ(actual.lse.size(), expected.lse.size());
    const auto close = [](double a, double b) {
      return a == b || std::abs(a - b) <= 1e-12 * std::max(1.0, std::abs(b));
    };
    for (size_t j = 0; j < expected.out.size(); ++j) {
      ASSERT_TRUE(close(actual.out[j], expected.out[j])) << "out[" << j << "]";
    }
    for (size_t j = 0; j < expected.lse.size(); ++j) {
      ASSERT_TRUE(close(actual.lse[j], expected.lse[j])) << "lse[" << j << "]";
    }
    // The sizes need few digits. The reference adds up out_size in fp32, and most digits of a spread
    // near 0 cancel.
    const auto near = [](double a, double b) { return std::abs(a - b) <= 1e-5 * b + 1e-7; };
    ASSERT_EQ(actual.out_size.size(), expected.out_size.size());
    ASSERT_EQ(actual.row_size.size(), expected.row_size.size());
    for (size_t j = 0; j < expected.out_size.size(); ++j) {
      ASSERT_TRUE(near(actual.out_size[j], expected.out_size[j])) << "out_size[" << j << "]";
    }
    for (size_t j = 0; j < expected.row_size.size(); ++j) {
      const RowSize &a = actual.row_size[j], &b = expected.row_size[j];
      ASSERT_EQ(a.tokens, b.tokens) << "row " << j;
      ASSERT_TRUE(near(a.logit, b.logit)) << a.logit << ", " << b.logit << " in row " << j;
      ASSERT_TRUE(near(a.rounding, b.rounding)) << a.rounding << ", " << b.rounding;
      ASSERT_TRUE(near(a.spread, b.spread)) << a.spread << ", " << b.spread << " in row " << j;
    }
  }
}

TEST(Oracle, EqualsTheReferenceOnTheModel) {
  expect_equal_to_reference(model_machine(), 20);
}

TEST(Oracle, EqualsTheReferenceOnAGpu) {
  std::string why_not;
  Machine* gpu = gpu_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  expect_equal_to_reference(*gpu, 200);
}

// The device generator makes the host's bits, NaN tails included.
void expect_same_data(Machine& machine, CacheFormat format) {
  for (const DataKind kind : kDataKinds) {
    DecodeCase spec;
    spec.cache_format = format;
    spec.strided = is_quantised(format) && kind == DataKind::kNeedles;
    spec.scale_rule = kind == DataKind::kFlat ? ScaleRule::kPowerOfTwo : ScaleRule::kLargest;
    spec.dtype =
        kind == DataKind::kFlat && !has_tile_scales(format) ? DType::kFloat16 : DType::kBFloat16;
    spec.batch = 4;
    spec.seqlen_q = 2;
    spec.seqlen_k = 200;
    spec.num_heads_q = 6;
    spec.num_heads_kv = 2;
    spec.variable_lengths = true;
    spec.data = kind;
    spec.seed = 5;
    SCOPED_TRACE(spec.name());
    const DataSet data = make_data_set(spec);
    const HostTensors host = generate(data);
    DeviceTensors device;
    ASSERT_OK(generate_on_device(machine, data, &device));
    const auto expect_same = [&](const DeviceBuffer& buffer, const auto& expected) {
      auto values = expected;
      ASSERT_EQ(buffer.bytes(), values.size() * sizeof(values[0]));
      ASSERT_OK(machine.copy_to_host(values.data(), buffer.data(), buffer.bytes()));
      EXPECT_TRUE(values == expected);
    };
    if (!spec.strided) expect_same(device.q, host.q);  // NaNs in gaps differ
    if (is_quantised(format)) {
      expect_same(device.kv_cache, host.quantised_cache);
    } else {
      expect_same(device.kv_cache, host.kv_cache);
    }
  }
}

TEST(DeviceData, EqualsTheHostsOnTheModel) {
  for (const CacheFormat format : kCacheFormats) expect_same_data(model_machine(), format);
}

TEST(DeviceData, EqualsTheHostsOnAGpu) {
  std::string why_not;
  Machine* gpu = gpu_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  for (const CacheFormat format : kCacheFormats) expect_same_data(*gpu, format);
}

}  // namespace
}  // namespace mla
