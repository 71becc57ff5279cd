// Quantised rows are checked against the definitions in quantise.h and cache_format.h.
#include "reference/quantise.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "reference/float16.h"
#include "tests/reference/code_values.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr CacheFormat kQuantised[] = {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor,
                                      CacheFormat::kInt8Tile128};
constexpr CacheFormat kTiled[] = {CacheFormat::kFp8Tile128, CacheFormat::kInt8Tile128};

bool is_int8(CacheFormat format) {
  return format == CacheFormat::kInt8Tile128;
}

using Values = std::array<float, 576>;

/// A row in its bytes.
struct Row {
  alignas(16) std::array<uint8_t, 656> bytes;

  float scale(int tile) const {
    float value = 0;
    std::memcpy(&value, &bytes[512 + 4 * size_t(tile)], 4);
    return value;
  }
  void set_scale(int tile, float value) { std::memcpy(&bytes[512 + 4 * size_t(tile)], &value, 4); }
};

Problem problem_of(CacheFormat format, float cache_scale = 1) {
  Problem problem;
  problem.cache_format = format;
  problem.cache_scale = cache_scale;
  problem.batch = problem.num_heads_q = problem.max_pages_per_seq = 1;
  problem.num_pages = 3;
  problem.page_size = 16;
  problem.num_heads_kv = 1;
  problem.softmax_scale = 1;
  return problem;
}

/// Quantises, and returns the values that the row then has. The reference and the definition must agree
/// on them.
std::array<double, 576> round_trip(const Problem& problem, const Values& values, Row* row,
                                   ScaleRule rule = ScaleRule::kLargest) {
  row->bytes.fill(0xA5);  // every byte must be written
  quantise_row(problem, rule, values.data(), row->bytes.data());
  std::array<double, 576> said;
  dequantise_row(problem, row->bytes.data(), said.data());
  for (int column = 0; column < 576; ++column) {
    const double expected =
        test::quantised_value(has_tile_scales(problem.cache_format), is_int8(problem.cache_format),
                              problem.cache_scale, row->bytes.data(), column);
    const double actual = said[size_t(column)];
    EXPECT_TRUE(actual == expected || (std::isnan(actual) && std::isnan(expected)))
        << "column " << column << ": " << actual << ", " << expected;
  }
  for (size_t byte = size_t(problem.cache_row_bytes()); byte < row->bytes.size(); ++byte) {
    EXPECT_EQ(row->bytes[byte], 0xA5) << "byte " << byte << " is not the row's";
  }
  return said;
}

Values random_values(std::mt19937& random, float size) {
  std::normal_distribution<float> normal(0, size);
  Values values;
  for (float& value : values) value = to_float(DType::kBFloat16, round_to_bfloat16(normal(random)));
  return values;
}

TEST(Layout, RowsHaveTheBytesOfTheirFormat) {
  EXPECT_EQ(problem_of(CacheFormat::k16Bit).cache_row_bytes(), 1152);
  EXPECT_EQ(problem_of(CacheFormat::kFp8Tile128).cache_row_bytes(), 656);
  EXPECT_EQ(problem_of(CacheFormat::kInt8Tile128).cache_row_bytes(), 656);
  EXPECT_EQ(problem_of(CacheFormat::kFp8Tensor).cache_row_bytes(), 576);
  // A row by hand: code 0x38 is 1 in e4m3 and 56 in int8.
  for (const CacheFormat format : kTiled) {
    Row row;
    row.bytes.fill(0x38);
    for (const int tile : {0, 1, 2, 3}) row.set_scale(tile, float(tile) + 0.5f);
    row.bytes[528] = 0x40;  // bf16 0xC040 is -3
    row.bytes[529] = 0xC0;
    row.bytes[654] = 0x80;
    row.bytes[655] = 0x3F;
    const Problem problem = problem_of(format, /*cache_scale=*/kNaN);
    const double one = is_int8(format) ? 56 : 1;
    EXPECT_EQ(dequantise_value(problem, row.bytes.data(), 0), 0.5 * one);
    EXPECT_EQ(dequantise_value(problem, row.bytes.data(), 127), 0.5 * one);
    EXPECT_EQ(dequantise_value(problem, row.bytes.data(), 128), 1.5 * one);
    EXPECT_EQ(dequantise_value(problem, row.bytes.data(), 511), 3.5 * one);
    EXPECT_EQ(dequantise_value(problem, row.bytes.data(), 512), -3);
    EXPECT_EQ(dequantise_value(problem, row.bytes.data(), 575), 1);
  }
  Row row;
  row.bytes.fill(0x38);
  EXPECT_EQ(dequantise_value(problem_of(CacheFormat::kFp8Tensor, 0.25f), row.bytes.data(), 575),
            0.25);
}

// With each scale, every code has exactly its value, and quantising the value gives the code again.
TEST(Codes, AllRoundTrip) {
  for (const CacheFormat format : kQuantised) {
    for (const float scale : {1.0f, 0x1p-20f, 0.3f, 1e-38f}) {
      const Problem problem = problem_of(format, scale);
      for (int code = 0; code < 256; ++code) {
        Row row;
        row.bytes.fill(uint8_t(code));
        for (const int tile : {0, 1, 2, 3}) row.set_scale(tile, scale);
        const double said = dequantise_value(problem, row.bytes.data(), 7);
        const double unscaled =
            is_int8(format) ? double(int8_t(uint8_t(code))) : test::e4m3_by_definition(code);
        if (std::isnan(unscaled)) {
          EXPECT_TRUE(std::isnan(said));
          continue;
        }
        ASSERT_EQ(said, unscaled * double{scale}) << to_string(format) << " " << code;
        // The value, rounded to fp32, gives the code again; except for -128, which quantising does not
        // make.
        const int again = quantise_value(format, float(said), scale);
        const bool is_least = is_int8(format) && code == 128;
        ASSERT_EQ(again, is_least ? 129 : code) << to_string(format) << " " << scale;
      }
    }
  }
}

// All 16-bit numbers as int8 codes, compared with a search of all codes. float8_test does so for e4m3.
TEST(Codes, Int8RoundsToTheNearest) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int bits = 0; bits < 65536; ++bits) {
      const float x = to_float(dtype, uint16_t(bits));
      int best = 0;
      if (!std::isnan(x)) {
        const double clamped = std::min(std::max(double{x}, -1e6), 1e6);
        for (int code = -127; code <= 127; ++code) {
          const double distance = std::abs(clamped - code), least = std::abs(clamped - best);
          if (distance < least || (distance == least && code % 2 == 0)) best = code;
        }
      }
      ASSERT_EQ(int8_t(quantise_value(CacheFormat::kInt8Tile128, x, 1)), best) << x;
    }
  }
  for (const float half : {0.5f, 1.5f, 126.5f}) {
    const float below = std::nextafter(half, 0.0f), above = std::nextafter(half, kInfinity);
    EXPECT_EQ(int8_t(quantise_value(CacheFormat::kInt8Tile128, below, 1)), int(half));
    EXPECT_EQ(int8_t(quantise_value(CacheFormat::kInt8Tile128, -above, 1)), -int(half) - 1);
  }
}

TEST(Scales, AreTheLargestValueOverTheLargestCode) {
  for (const CacheFormat format : kTiled) {
    const float most = is_int8(format) ? 127 : 448;
    for (const float largest : {1.0f, 0.3f, 448.0f, 3e38f, 1e-30f}) {
      EXPECT_EQ(scale_for(format, largest, ScaleRule::kLargest), largest / most);
      // The least power of two that is not below that.
      const float power = scale_for(format, largest, ScaleRule::kPowerOfTwo);
      int exponent = 0;
      EXPECT_EQ(std::frexp(power, &exponent), 0.5f) << power;
      EXPECT_GE(power, largest / most);
      EXPECT_LT(power / 2, largest / most);
    }
    EXPECT_EQ(scale_for(format, 0.5f * most, ScaleRule::kPowerOfTwo), 0.5f) << "stays one";
    for (const ScaleRule rule : {ScaleRule::kLargest, ScaleRule::kPowerOfTwo}) {
      EXPECT_EQ(scale_for(format, 0, rule), 0x1p-126f);
      EXPECT_EQ(scale_for(format, most * 0x1p-127f, rule), 0x1p-126f);
      EXPECT_EQ(scale_for(format, std::numeric_limits<float>::denorm_min(), rule), 0x1p-126f);
      EXPECT_EQ(scale_for(format, kInfinity, rule), kInfinity);
    }
  }
}

// A step of int8 is the scale. A step of e4m3 is at most an eighth of the value, or of the least normal
// number.
TEST(Tiles, LoseNoMoreThanHalfAStep) {
  std::mt19937 random(1);
  for (const CacheFormat format : kQuantised) {
    for (const ScaleRule rule : {ScaleRule::kLargest, ScaleRule::kPowerOfTwo}) {
      for (const float size : {1.0f, 1e-3f, 1e10f, 1e-34f}) {
        for (int repeat = 0; repeat < 20; ++repeat) {
          Values values = random_values(random, size);
          values[size_t(repeat) * 25] *= 1000;  // an outlier
          float largest = 0;
          for (const float value : values) largest = std::max(largest, std::abs(value));
          const Problem problem = problem_of(format, scale_for(format, largest, rule));
          Row row;
          const auto said = round_trip(problem, values, &row, rule);
          for (int column = 0; column < 576; ++column) {
            const double value = values[size_t(column)];
            const double error = std::abs(said[size_t(column)] - value);
            if (has_tile_scales(format) && column >= 512) {
              ASSERT_EQ(error, 0);
              continue;
            }
            const float scale =
                has_tile_scales(format) ? row.scale(column / 128) : problem.cache_scale;
            // The quotient is rounded to fp32 before it is rounded to a code.
            const double slack = std::abs(value) * 0x1p-23;
            const double step = is_int8(format)
                                    ? double{scale}
                                    : std::max(std::abs(value) / 8, double{scale} * 0x1p-9);
            ASSERT_LE(error, step / 2 + slack)
                << to_string(format) << " column " << column << " of " << value;
          }
        }
      }
    }
  }
}

// The largest value of a tile gets the largest code of its sign, however its scale was rounded.
TEST(Tiles, LargestValueHasTheLargestCode) {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (const CacheFormat format : kTiled) {
    for (int repeat = 0; repeat < 2000; ++repeat) {
      Values values{};
      const float largest = std::ldexp(1 + std::abs(uniform(random)), repeat % 100 - 50);
      for (const int tile : {0, 1, 2, 3}) {
        for (int c = 0; c < 128; ++c)
          values[size_t(tile) * 128 + size_t(c)] = uniform(random) * largest;
        values[size_t(tile) * 128 + size_t(repeat % 128)] = tile % 2 == 0 ? largest : -largest;
      }
      Row row;
      round_trip(problem_of(format), values, &row);
      for (const int tile : {0, 1, 2, 3}) {
        const int code = row.bytes[size_t(tile) * 128 + size_t(repeat % 128)];
        const bool negative = tile % 2 != 0;
        ASSERT_EQ(code, is_int8(format) ? (negative ? 129 : 127) : (negative ? 0xFE : 0x7E));
      }
    }
  }
}

// Values times a power of two have the same codes, and scales times the same power.
TEST(Tiles, FollowPowersOfTwo) {
  std::mt19937 random(3);
  for (const CacheFormat format : kTiled) {
    for (const ScaleRule rule : {ScaleRule::kLargest, ScaleRule::kPowerOfTwo}) {
      for (const int exponent : {-60, -1, 1, 7, 60}) {
        const Values values = random_values(random, 1);
        Values scaled = values;
        for (float& value : scaled) value = std::ldexp(value, exponent);
        Row row, scaled_row;
        round_trip(problem_of(format), values, &row, rule);
        round_trip(problem_of(format), scaled, &scaled_row, rule);
        EXPECT_TRUE(
            std::equal(row.bytes.begin(), row.bytes.begin() + 512, scaled_row.bytes.begin()));
        for (const int tile : {0, 1, 2, 3}) {
          EXPECT_EQ(scaled_row.scale(tile), std::ldexp(row.scale(tile), exponent));
        }
      }
    }
  }
}

// With scales that are powers of two every value of a row is exact in bf16.
TEST(Tiles, PowersOfTwoAreExactInBFloat16) {
  std::mt19937 random(4);
  for (const CacheFormat format : kTiled) {
    Row row;
    const auto said =
        round_trip(problem_of(format), random_values(random, 1), &row, ScaleRule::kPowerOfTwo);
    for (const double value : said) {
      ASSERT_EQ(double{to_float(DType::kBFloat16, round_to_bfloat16(float(value)))}, value);
    }
  }
}

TEST(Tiles, DoNotShareScales) {
  for (const CacheFormat format : kTiled) {
    Values values{};
    for (size_t c = 0; c < 576; ++c) values[c] = std::ldexp(1.0f, -10 * int(c / 128));
    Row row;
    const auto said = round_trip(problem_of(format), values, &row);
    for (int tile = 0; tile < 4; ++tile) {
      EXPECT_EQ(row.scale(tile), std::ldexp(1.0f / largest_code(format), -10 * tile));
      EXPECT_NEAR(said[size_t(tile * 128)], std::ldexp(1.0, -10 * tile),
                  std::ldexp(1e-6, -10 * tile));
    }
  }
}

TEST(Specials, ZerosKeepTheirSignInE4M3) {
  for (const CacheFormat format : kQuantised) {
    Values values{};
    values[3] = values[575] = -0.0f;
    Row row;
    const auto said = round_trip(problem_of(format, 0.5f), values, &row);
    for (const double value : said) EXPECT_EQ(value, 0);
    EXPECT_EQ(row.bytes[2], 0);
    EXPECT_EQ(row.bytes[3], is_int8(format) ? 0 : 0x80);
    EXPECT_EQ(std::signbit(said[3]), !is_int8(format));
    EXPECT_TRUE(std::signbit(said[575]));
    if (has_tile_scales(format)) {
      for (const int tile : {0, 1, 2, 3}) EXPECT_EQ(row.scale(tile), 0x1p-126f);
    }
  }
}

TEST(Specials, NaNStaysNaN) {
  Values values{};
  values.fill(2);
  values[5] = values[575] = kNaN;
  values[6] = -7;
  Row row;
  auto said = round_trip(problem_of(CacheFormat::kFp8Tile128), values, &row);
  EXPECT_EQ(row.bytes[5], 0x7F);
  EXPECT_EQ(row.scale(0), 7.0f / 448) << "NaN is no largest value";
  EXPECT_TRUE(std::isnan(said[5]));
  EXPECT_TRUE(std::isnan(said[575]));
  EXPECT_EQ(row.bytes[654], 0xC0);  // 0x7fc0
  EXPECT_EQ(row.bytes[655], 0x7F);
  for (const int column : {4, 6, 127, 128, 511, 574}) {
    EXPECT_FALSE(std::isnan(said[size_t(column)])) << column;
  }
  EXPECT_NEAR(said[6], -7, 1e-5);

  said = round_trip(problem_of(CacheFormat::kFp8Tensor, 0.25f), values, &row);
  EXPECT_EQ(row.bytes[5], 0x7F);
  EXPECT_EQ(row.bytes[575], 0x7F);
  EXPECT_EQ(said[4], 2);
  EXPECT_EQ(said[6], -7);

  said = round_trip(problem_of(CacheFormat::kInt8Tile128), values, &row);
  EXPECT_EQ(std::bit_cast<uint32_t>(row.scale(0)), 0x7FC00000u);
  for (int column = 0; column < 128; ++column) {
    EXPECT_EQ(row.bytes[size_t(column)], 0);
    EXPECT_TRUE(std::isnan(said[size_t(column)]));
  }
  EXPECT_EQ(row.scale(1), 2.0f / 127) << "another tile's";
  EXPECT_NEAR(said[128], 2, 1e-6);

  // Tiles of NaN alone.
  values.fill(kNaN);
  for (const CacheFormat format : kQuantised) {
    for (const double value : round_trip(problem_of(format), values, &row)) {
      EXPECT_TRUE(std::isnan(value));
    }
  }
}

TEST(Specials, InfinitiesSpoilTheirTileOrSaturate) {
  for (const float infinity : {kInfinity, -kInfinity}) {
    Values values{};
    values.fill(2);
    values[130] = values[512] = infinity;
    Row row;
    for (const CacheFormat format : kTiled) {
      for (const ScaleRule rule : {ScaleRule::kLargest, ScaleRule::kPowerOfTwo}) {
        const auto said = round_trip(problem_of(format), values, &row, rule);
        EXPECT_EQ(row.scale(1), kInfinity);
        EXPECT_EQ(row.bytes[129], 0);
        EXPECT_EQ(row.bytes[130], is_int8(format) ? 0 : 0x7F);
        for (int column = 0; column < 576; ++column) {
          const bool spoilt = column / 128 == 1;
          EXPECT_EQ(std::isnan(said[size_t(column)]), spoilt) << column;
        }
        EXPECT_EQ(said[512], infinity) << "as in 16 bits";
      }
    }
    const auto said = round_trip(problem_of(CacheFormat::kFp8Tensor, 0.5f), values, &row);
    EXPECT_EQ(said[130], infinity > 0 ? 224 : -224);
    EXPECT_EQ(said[512], said[130]);
    EXPECT_EQ(said[129], 2);
  }
}

TEST(Specials, HugeAndTinyValues) {
  Values values{};
  values[0] = to_float(DType::kBFloat16, 0x7F7F);  // the largest bf16
  values[1] = -values[0];
  values[128] = to_float(DType::kBFloat16, 0x0001);  // the smallest
  values[256] = 0x1p-126f;
  values[513] = values[0];
  values[514] = values[128];
  for (const CacheFormat format : kTiled) {
    Row row;
    const auto said = round_trip(problem_of(format), values, &row);
    EXPECT_TRUE(std::isfinite(row.scale(0)));
    EXPECT_NEAR(said[0], double{values[0]}, 1e-6 * double{values[0]});
    EXPECT_EQ(said[1], -said[0]);
    // Subnormal values have the least scale. e4m3 keeps this value, 2^-7 times the scale; int8 does not.
    EXPECT_EQ(row.scale(1), 0x1p-126f);
    EXPECT_EQ(said[128], is_int8(format) ? 0 : 0x1p-133);
    EXPECT_EQ(said[256], 0x1p-126);
    EXPECT_EQ(said[513], double{values[513]});
    EXPECT_EQ(said[514], double{values[514]});
  }
  Row row;
  const auto said = round_trip(problem_of(CacheFormat::kFp8Tensor, 2), values, &row);
  EXPECT_EQ(said[0], 896) << "saturates";
  EXPECT_EQ(said[1], -896);
  EXPECT_EQ(said[128], 0);
}

// Scales that quantising does not make, but that an engine's cache may have.
TEST(Scales, AreTakenAsTheyAre) {
  for (const CacheFormat format : kTiled) {
    const Problem problem = problem_of(format);
    Row row;
    row.bytes.fill(0x38);  // 1, or 56
    const double one = is_int8(format) ? 56 : 1;
    row.bytes[1] = 0xB8;
    const double negative = is_int8(format) ? -72 : -1;
    const auto value = [&](float scale, int column) {
      row.set_scale(0, scale);
      return dequantise_value(problem, row.bytes.data(), column);
    };
    EXPECT_EQ(value(0, 0), 0);
    EXPECT_TRUE(std::signbit(value(0, 1)));
    EXPECT_EQ(value(-2, 0), -2 * one);
    EXPECT_EQ(value(0x1p-149f, 1), negative * 0x1p-149) << "a subnormal scale";
    EXPECT_EQ(value(kInfinity, 1), -kInfinity);
    EXPECT_TRUE(std::isnan(value(kNaN, 0)));
    row.bytes[0] = 0;
    EXPECT_TRUE(std::isnan(value(kInfinity, 0)));
    if (!is_int8(format)) {
      row.bytes[0] = 0x7F;
      EXPECT_TRUE(std::isnan(value(0, 0)));
    }
  }
}

TEST(Rotary, RoundsToBFloat16) {
  for (int bits = 0; bits < 65536; ++bits) {
    const float x = to_float(DType::kBFloat16, uint16_t(bits));
    ASSERT_EQ(round_to_bfloat16(x), std::isnan(x) ? 0x7FC0 : bits);
    const float half = to_float(DType::kFloat16, uint16_t(bits));
    if (!std::isnan(half)) {
      ASSERT_EQ(round_to_bfloat16(half), std::bit_cast<uint16_t>(from_float<bfloat16>(half)));
    }
  }
  EXPECT_EQ(round_to_bfloat16(std::numeric_limits<float>::max()), 0x7F80);
}

TEST(Caches, AreTheirRows) {
  std::mt19937 random(5);
  for (const CacheFormat format : kQuantised) {
    Problem problem = problem_of(format, 0.01f);
    problem.num_heads_q = problem.num_heads_kv = 2;
    if (format == CacheFormat::kFp8Tensor) problem.dtype = DType::kFloat16;
    const int64_t rows = 3 * 16 * 2;
    std::vector<uint16_t> cache(size_t(rows) * 576);
    for (uint16_t& bits : cache) bits = uint16_t(random());
    std::vector<uint8_t> quantised;
    std::vector<double> values;
    ASSERT_OK(quantise_cache(problem, cache.data(), ScaleRule::kLargest, &quantised, 2));
    ASSERT_EQ(int64_t(quantised.size()), problem.kv_elements());
    ASSERT_EQ(problem.kv_elements(), rows * problem.cache_row_bytes());
    ASSERT_OK(dequantise_cache(problem, quantised.data(), &values));
    ASSERT_EQ(int64_t(values.size()), rows * 576);
    for (int64_t r = 0; r < rows; ++r) {
      Values row_values;
      for (size_t c = 0; c < 576; ++c) {
        row_values[c] = to_float(problem.dtype, cache[size_t(r) * 576 + c]);
      }
      Row row;
      const auto said = round_trip(problem, row_values, &row);
      ASSERT_TRUE(std::equal(row.bytes.begin(), row.bytes.begin() + problem.cache_row_bytes(),
                             quantised.begin() + r * problem.cache_row_bytes()));
      for (size_t c = 0; c < 576; ++c) {
        const double value = values[size_t(r) * 576 + c];
        ASSERT_TRUE(value == said[c] || (std::isnan(value) && std::isnan(said[c])));
      }
    }
  }
}

TEST(Caches, RefuseWhatIsNoCache) {
  const Problem problem = problem_of(CacheFormat::kFp8Tile128);
  std::vector<uint16_t> cache(3 * 16 * 576);
  std::vector<uint8_t> quantised = {1};
  std::vector<double> values = {1};
  const auto message = [&](const Problem& p, const void* from, int threads) {
    const Status status = quantise_cache(p, from, ScaleRule::kLargest, &quantised, threads);
    const Status back = dequantise_cache(p, from, &values, threads);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(back.message(), status.message());
    return status.message();
  };
  EXPECT_EQ(message(problem, nullptr, 0), "cache is null");
  EXPECT_EQ(message(problem, cache.data(), -1), "num_threads = -1 must be at least 0");
  EXPECT_EQ(message(problem_of(CacheFormat::k16Bit), cache.data(), 0),
            "cache_format = 16bit is not quantised");
  EXPECT_EQ(message(problem_of(CacheFormat::kFp8Tensor, 0), cache.data(), 0),
            "cache_scale = 0 must be finite and greater than 0");
  EXPECT_EQ(quantise_cache(problem, cache.data(), ScaleRule::kLargest, nullptr).message(),
            "the result is null");
  EXPECT_EQ(quantised.size(), 1u);
  EXPECT_EQ(values.size(), 1u);
}

}  // namespace
}  // namespace mla
