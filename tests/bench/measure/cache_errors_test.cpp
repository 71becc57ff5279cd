// Errors of cache formats: against the reference on the same values, and in the order that codes have.
#include "bench/measure/cache_errors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "reference/attention.h"
#include "reference/testing/data_generator.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

ReferenceResult reference_on(const DecodeCase& spec) {
  const DataSet data = make_data_set(spec);
  HostTensors host = generate(data);
  ReferenceResult result;
  EXPECT_OK(reference_attention(data.problem, host.tensors(data), &result));
  return result;
}

// Without outliers the values are the generator's flat ones.
TEST(CacheErrors, AreThoseOfTheReference) {
  for (const ScaleRule rule : {ScaleRule::kLargest, ScaleRule::kPowerOfTwo}) {
    const ErrorCase one{.tokens = 700, .heads = 3, .deviation = 2, .seed = 4};
    CacheErrors errors;
    ASSERT_OK(cache_errors(one, rule, &errors));
    ASSERT_EQ(errors.all.size(), 4u);
    DecodeCase spec;
    spec.num_heads_q = one.heads;
    spec.seqlen_k = one.tokens;
    spec.seed = one.seed;
    spec.softmax_scale = static_cast<float>(errors.softmax_scale);
    spec.scale_rule = rule;
    const ReferenceResult plain = reference_on(spec);
    for (const CacheError& error : errors.all) {
      SCOPED_TRACE(to_string(error.format));
      spec.cache_format = error.format;
      spec.cache_scale = error.cache_scale;
      const ReferenceResult result = reference_on(spec);
      double off = 0, size = 0, lse = 0;
      for (size_t i = 0; i < result.out.size(); ++i) {
        off += std::pow(result.out[i] - plain.out[i], 2);
        size += std::pow(plain.out[i], 2);
      }
      for (size_t i = 0; i < result.lse.size(); ++i) {
        lse = std::max(lse, std::abs(result.lse[i] - plain.lse[i]));
      }
      EXPECT_NEAR(error.from_16_bits.out, std::sqrt(off / size), 1e-6);  // its scale is a float
      EXPECT_NEAR(error.from_16_bits.lse, lse, 1e-6);
      EXPECT_DOUBLE_EQ(error.from_16_bits.out, error.from_16_bits.out_ordinary);
      EXPECT_EQ(error.from_16_bits.out == 0, error.format == CacheFormat::k16Bit);
    }
  }
}

TEST(CacheErrors, FollowTheCodes) {
  const auto out = [](int outliers, CacheFormat format) {
    CacheErrors errors;
    EXPECT_OK(cache_errors({.tokens = 1000, .heads = 4, .outliers = outliers}, ScaleRule::kLargest,
                           &errors));
    for (const CacheError& error : errors.all) {
      if (error.format == format) return error.from_exact.out_ordinary;
    }
    return 0.0;
  };
  const auto bf16 = [&](int outliers) { return out(outliers, CacheFormat::k16Bit); };
  const auto fp8 = [&](int outliers) { return out(outliers, CacheFormat::kFp8Tile128); };
  const auto int8 = [&](int outliers) { return out(outliers, CacheFormat::kInt8Tile128); };
  // Values of a normal: int8 has finer steps than three bits of fraction, bf16 finer ones than both.
  EXPECT_LT(2 * bf16(0), int8(0));
  EXPECT_LT(2 * int8(0), fp8(0));
  // One column of a tile that is 20 times as large takes four bits of an int8's others, none of a float's.
  EXPECT_GT(int8(4), 6 * int8(0));
  EXPECT_LT(fp8(4), 2 * fp8(0));
}

TEST(CacheErrors, RefuseWhatIsNoCase) {
  CacheErrors errors{7, {}};
  for (const ErrorCase& bad :
       {ErrorCase{.tokens = 0}, ErrorCase{.heads = -1}, ErrorCase{.deviation = 0},
        ErrorCase{.deviation = NAN}, ErrorCase{.outliers = 513}, ErrorCase{.outliers = -1}}) {
    EXPECT_EQ(cache_errors(bad, ScaleRule::kLargest, &errors).code(), StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(errors.softmax_scale, 7);
  ASSERT_OK(cache_errors({.tokens = 1, .outliers = 512}, ScaleRule::kLargest, &errors));
  EXPECT_EQ(errors.all[1].from_exact.out_ordinary, 0) << "no column is ordinary";
  EXPECT_GT(errors.all[1].from_exact.out, 0);
}

}  // namespace
}  // namespace mla::bench
