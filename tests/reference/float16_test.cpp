#include "reference/float16.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "reference/testing/data_generator.h"
#include "tests/reference/plain_attention.h"

namespace mla {
namespace {

template <typename T>
class Float16 : public testing::Test {
 public:
  static constexpr DType kDType = std::is_same_v<T, bfloat16> ? DType::kBFloat16 : DType::kFloat16;
  static uint16_t bits(float value) { return std::bit_cast<uint16_t>(from_float<T>(value)); }
  static float value(int bits) { return to_float(std::bit_cast<T>(static_cast<uint16_t>(bits))); }
  static float infinity() { return std::numeric_limits<float>::infinity(); }
};
using Types = testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(Float16, Types);

TYPED_TEST(Float16, EveryPatternHasItsValue) {
  for (int bits = 0; bits < 65536; ++bits) {
    const double expected = test::value_of(this->kDType, static_cast<uint16_t>(bits));
    for (const float actual :
         {this->value(bits), to_float(this->kDType, static_cast<uint16_t>(bits))}) {
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(actual)) << bits;
      } else {
        ASSERT_EQ(actual, expected) << bits;
        ASSERT_EQ(std::signbit(actual), std::signbit(expected)) << bits;
      }
    }
  }
}

TYPED_TEST(Float16, RoundsToNearestTiesToEven) {
  // Between any two neighbours, the midpoint goes to the even one, and the floats beside the midpoint
  // to the nearer one. The generator's own rounding must agree.
  const int infinity = this->bits(this->infinity());
  for (int lower = 0; lower + 1 < infinity; ++lower) {
    const float a = this->value(lower);
    const float b = this->value(lower + 1);
    const float middle = static_cast<float>((double{a} + double{b}) / 2);
    const int even = lower + lower % 2;
    for (const float sign : {1.0f, -1.0f}) {
      const int sign_bit = sign < 0 ? 0x8000 : 0;
      const auto rounds_to = [&](float value, int expected) {
        ASSERT_EQ(this->bits(sign * value), expected | sign_bit) << value;
        ASSERT_EQ(generator::round_to_16_bits(this->kDType, sign * value), expected | sign_bit)
            << value;
      };
      rounds_to(a, lower);
      rounds_to(middle, even);
      rounds_to(std::nextafter(middle, 0.0f), lower);
      rounds_to(std::nextafter(middle, b), lower + 1);
    }
  }
}

TYPED_TEST(Float16, OverflowGivesInfinity) {
  const float largest = std::numeric_limits<float>::max();
  EXPECT_EQ(this->value(this->bits(largest)), this->infinity());
  EXPECT_EQ(this->value(this->bits(-largest)), -this->infinity());
  EXPECT_EQ(this->value(generator::round_to_16_bits(this->kDType, largest)), this->infinity());
  EXPECT_TRUE(std::isnan(this->value(nan_bits(this->kDType))));
}

TEST(Float16Limits, HalfOverflowsAt65520) {
  const DType fp16 = DType::kFloat16;
  EXPECT_EQ(generator::round_to_16_bits(fp16, 65519.996f), 0x7BFF);
  EXPECT_EQ(generator::round_to_16_bits(fp16, 65520.0f), 0x7C00);
  EXPECT_EQ(std::bit_cast<uint16_t>(from_float<float16>(65519.996f)), 0x7BFF);
  EXPECT_EQ(std::bit_cast<uint16_t>(from_float<float16>(65520.0f)), 0x7C00);
}

TEST(Float16Limits, HalfOfTheLeastSubnormalGoesToZero) {
  const DType fp16 = DType::kFloat16;
  EXPECT_EQ(generator::round_to_16_bits(fp16, 0x1p-25f), 0);
  EXPECT_EQ(generator::round_to_16_bits(fp16, 0x1.000002p-25f), 1);
  EXPECT_EQ(generator::round_to_16_bits(fp16, -0x1p-25f), 0x8000);
  EXPECT_EQ(generator::round_to_16_bits(fp16, 0x1p-149f), 0);
}

TEST(VisitDType, ChoosesTheType) {
  EXPECT_TRUE(visit_dtype(DType::kBFloat16,
                          [](auto zero) { return std::is_same_v<decltype(zero), bfloat16>; }));
  EXPECT_TRUE(visit_dtype(DType::kFloat16,
                          [](auto zero) { return std::is_same_v<decltype(zero), float16>; }));
}

}  // namespace
}  // namespace mla
