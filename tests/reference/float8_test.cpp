#include "reference/float8.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "reference/float16.h"
#include "tests/reference/code_values.h"

namespace mla {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(E4M3, EveryCodeHasItsValue) {
  for (int code = 0; code < 256; ++code) {
    const double expected = test::e4m3_by_definition(code);
    const float actual = e4m3_value(static_cast<uint8_t>(code));
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(actual)) << code;
      EXPECT_TRUE(code == 0x7F || code == 0xFF) << code;
    } else {
      EXPECT_EQ(actual, expected) << code;
      EXPECT_EQ(std::signbit(actual), code >= 128) << code;
    }
  }
  EXPECT_EQ(e4m3_value(0x7E), kLargestE4M3);
  EXPECT_EQ(e4m3_value(0x01), 0x1p-9f);
  EXPECT_EQ(e4m3_value(0x08), 0x1p-6f);
}

TEST(E4M3, EveryCodeRoundTrips) {
  for (int code = 0; code < 256; ++code) {
    const uint8_t again = round_to_e4m3(e4m3_value(static_cast<uint8_t>(code)));
    EXPECT_EQ(again, (code & 0x7F) == 0x7F ? kNanE4M3 : code);
  }
}

// Every 16-bit number, and so every midpoint of two codes, is compared with a search of all codes.
TEST(E4M3, Every16BitNumberRoundsToTheNearest) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int bits = 0; bits < 65536; ++bits) {
      const float x = to_float(dtype, static_cast<uint16_t>(bits));
      ASSERT_EQ(round_to_e4m3(x), test::nearest_e4m3(x)) << to_string(dtype) << " " << bits;
    }
  }
}

// fp32 can hold numbers beside midpoints that 16 bits cannot.
TEST(E4M3, MidpointsAndTheirNeighbours) {
  for (int lower = 0; lower < 0x7E; ++lower) {
    const float a = e4m3_value(static_cast<uint8_t>(lower));
    const float b = e4m3_value(static_cast<uint8_t>(lower + 1));
    const float middle = (a + b) / 2;  // exact
    for (const int sign : {0, 0x80}) {
      const auto rounds_to = [&](float x, int code) {
        ASSERT_EQ(round_to_e4m3(sign == 0 ? x : -x), code | sign) << x;
      };
      rounds_to(std::nextafter(middle, 0.0f), lower);
      rounds_to(middle, lower + lower % 2);
      rounds_to(std::nextafter(middle, kInfinity), lower + 1);
    }
  }
}

TEST(E4M3, SaturatesAndKeepsNaNAndSigns) {
  for (const float x : {448.0f, std::nextafter(448.0f, 0.0f), std::nextafter(448.0f, kInfinity),
                        464.0f, 480.0f, 1e30f, std::numeric_limits<float>::max(), kInfinity}) {
    EXPECT_EQ(round_to_e4m3(x), 0x7E) << x;
    EXPECT_EQ(round_to_e4m3(-x), 0xFE) << x;
  }
  for (const uint32_t nan : {0x7FC00000u, 0xFFC00000u, 0x7F800001u, 0xFFFFFFFFu}) {
    EXPECT_EQ(round_to_e4m3(std::bit_cast<float>(nan)), 0x7F) << nan;
  }
  for (const float x : {0.0f, std::numeric_limits<float>::denorm_min(), 0x1p-126f, 0x1p-11f}) {
    EXPECT_EQ(round_to_e4m3(x), 0) << x;
    EXPECT_EQ(round_to_e4m3(-x), 0x80) << x;
  }
}

TEST(Patterns, OfBothTypesHaveTheirValue) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int bits = 0; bits < 65536; ++bits) {
      const double expected = test::value_of(dtype, static_cast<uint16_t>(bits));
      const float actual = to_float(dtype, static_cast<uint16_t>(bits));
      ASSERT_TRUE(actual == expected || (std::isnan(actual) && std::isnan(expected))) << bits;
    }
  }
}

}  // namespace
}  // namespace mla
