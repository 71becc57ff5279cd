// Errors of cache formats: compared with the reference on the same values, and with one another.
#include "bench/measure/cache_errors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
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

CacheErrors errors_of(const ErrorCase& spec, double deviation = 1,
                      ScaleRule rule = ScaleRule::kLargest) {
  std::vector<CacheErrors> errors;
  EXPECT_OK(cache_errors(spec, std::array{deviation}, rule, &errors));
  return errors.at(0);
}

/// The error of the format with this name.
Distance error_of(const CacheErrors& errors, const std::string& format) {
  for (const CacheError& error : errors.all) {
    if (error.format == format) return error.from_exact;
  }
  ADD_FAILURE() << "no " << format;
  return {};
}

// Without outliers the values are the generator's flat data. 700 tokens are more than one block of
// tokens.
TEST(CacheErrors, AreThoseOfTheReference) {
  for (const ScaleRule rule : {ScaleRule::kLargest, ScaleRule::kPowerOfTwo}) {
    const ErrorCase one{.tokens = 700, .heads = 3, .seed = 4};
    const CacheErrors errors = errors_of(one, 2, rule);
    ASSERT_EQ(errors.all.size(), std::size(kCacheFormats) + 1);
    DecodeCase spec;
    spec.num_heads_q = one.heads;
    spec.seqlen_k = one.tokens;
    spec.seed = one.seed;
    spec.softmax_scale = static_cast<float>(errors.softmax_scale);
    spec.scale_rule = rule;
    const ReferenceResult plain = reference_on(spec);
    for (size_t i = 0; i < std::size(kCacheFormats); ++i) {
      const CacheError& error = errors.all[i];
      spec.cache_format = kCacheFormats[i];
      SCOPED_TRACE(to_string(spec.cache_format));
      EXPECT_EQ(error.format, to_string(spec.cache_format));
      EXPECT_EQ(error.row_bytes, Problem{.cache_format = spec.cache_format}.cache_row_bytes());
      spec.cache_scale = error.cache_scale;
      const ReferenceResult result = reference_on(spec);
      double off = 0, size = 0, lse = 0;
      for (size_t j = 0; j < result.out.size(); ++j) {
        off += std::pow(result.out[j] - plain.out[j], 2);
        size += std::pow(plain.out[j], 2);
      }
      for (size_t j = 0; j < result.lse.size(); ++j) {
        lse = std::max(lse, std::abs(result.lse[j] - plain.lse[j]));
      }
      EXPECT_NEAR(error.from_16_bits.out, std::sqrt(off / size), 1e-6);  // fp32 scale
      EXPECT_NEAR(error.from_16_bits.lse, lse, 1e-6);
      EXPECT_DOUBLE_EQ(error.from_16_bits.out, error.from_16_bits.out_ordinary);
      EXPECT_EQ(error.from_16_bits.out == 0, spec.cache_format == CacheFormat::k16Bit);
    }
  }
}

TEST(CacheErrors, FollowTheCodes) {
  const auto out = [](int outliers, const char* format) {
    const ErrorCase spec{.tokens = 1000, .heads = 4, .outliers = outliers};
    return error_of(errors_of(spec), format).out_ordinary;
  };
  const auto bf16 = [&](int outliers) { return out(outliers, "16bit"); };
  const auto fp8 = [&](int outliers) { return out(outliers, "fp8_tile128"); };
  const auto int8 = [&](int outliers) { return out(outliers, "int8_tile128"); };
  // For normal values, int8 has finer steps than e4m3's three bits of fraction, and bf16 finer ones
  // than both.
  EXPECT_LT(2 * bf16(0), int8(0));
  EXPECT_LT(2 * int8(0), fp8(0));
  // A column that is 20 times as large as the others of its tile takes four bits from their int8
  // codes, but none from their e4m3 codes.
  EXPECT_GT(int8(4), 6 * int8(0));
  EXPECT_LT(fp8(4), 2 * fp8(0));
}

// Rotary columns enter logits alone. Where they make most of a logit, it is as exact as they are.
TEST(CacheErrors, OfRotaryColumnsAreThoseOfLogits) {
  const auto lse = [](double rotary, const char* format) {
    return error_of(errors_of({.tokens = 1000, .heads = 16, .rotary = rotary}, 4), format).lse;
  };
  EXPECT_LT(lse(1, kRotaryInE4M3), 2 * lse(1, "fp8_tile128"));
  EXPECT_GT(lse(16, kRotaryInE4M3), 3 * lse(16, "fp8_tile128"));
  // The fifth scale gains nothing over one scale for all columns: with both, e4m3 keeps its three
  // bits.
  EXPECT_LT(lse(16, "fp8_tensor"), 2 * lse(16, kRotaryInE4M3));
  EXPECT_GT(lse(16, "fp8_tensor"), lse(16, kRotaryInE4M3) / 2);
}

TEST(CacheErrors, OfSeveralDeviationsAreThoseOfEach) {
  const ErrorCase spec{.tokens = 600, .heads = 2, .outliers = 1, .rotary = 4};
  std::vector<CacheErrors> both;
  ASSERT_OK(cache_errors(spec, std::array{0.5, 8.0}, ScaleRule::kLargest, &both));
  ASSERT_EQ(both.size(), 2u);
  EXPECT_DOUBLE_EQ(both[1].softmax_scale, 16 * both[0].softmax_scale);
  for (const CacheErrors& one : both) {
    const CacheErrors alone = errors_of(spec, one.deviation);
    ASSERT_EQ(one.all.size(), alone.all.size());
    for (size_t i = 0; i < one.all.size(); ++i) {
      EXPECT_EQ(one.all[i].from_exact.out, alone.all[i].from_exact.out);
      EXPECT_EQ(one.all[i].from_16_bits.lse, alone.all[i].from_16_bits.lse);
    }
  }
}

TEST(CacheErrors, RefuseWhatIsNoCase) {
  std::vector<CacheErrors> errors(3);
  const auto refuse = [&](const ErrorCase& spec, double deviation) {
    EXPECT_EQ(cache_errors(spec, std::array{1.0, deviation}, ScaleRule::kLargest, &errors).code(),
              StatusCode::kInvalidArgument);
    EXPECT_EQ(errors.size(), 3u);
  };
  for (const ErrorCase& bad :
       {ErrorCase{.tokens = 0}, ErrorCase{.heads = -1}, ErrorCase{.outliers = 513},
        ErrorCase{.outliers = -1}, ErrorCase{.rotary = 0}, ErrorCase{.rotary = NAN}}) {
    refuse(bad, 1);
  }
  for (const double bad : {0.0, double{NAN}, double{INFINITY}}) refuse({}, bad);
  const CacheErrors one = errors_of({.tokens = 1, .outliers = 512});
  EXPECT_EQ(one.all[1].from_exact.out_ordinary, 0) << "no column is ordinary";
  EXPECT_GT(one.all[1].from_exact.out, 0);
}

}  // namespace
}  // namespace mla::bench
