#include "reference/testing/compare.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "reference/float16.h"
#include "reference/testing/data_generator.h"
#include "tests/reference/plain_attention.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

uint16_t round_to(DType dtype, double value) {
  return visit_dtype(dtype, [&](auto zero) {
    return std::bit_cast<uint16_t>(from_float<decltype(zero)>(static_cast<float>(value)));
  });
}

Comparison compare_floats(const std::vector<float>& actual, const std::vector<double>& expected,
                          int64_t row_length = 2, const Tolerance& tolerance = kOutTolerance) {
  return compare(actual, expected, row_length, tolerance);
}

/// A reference result in which each row is the value of a single token.
ReferenceResult reference_of(const std::vector<double>& out, const std::vector<double>& lse) {
  ReferenceResult result{out, lse, out, std::vector<RowSize>(lse.size())};
  for (size_t row = 0; row < lse.size(); ++row) {
    double square = 0;
    for (size_t i = row * 512; i < (row + 1) * 512; ++i) square += out[i] * out[i];
    result.row_size[row] = {1, std::abs(lse[row]), std::sqrt(square), 0};
  }
  return result;
}

TEST(Compare, EqualPasses) {
  const Comparison result = compare_floats({1, -2, 0, 0}, {1, -2, 0, 0});
  EXPECT_TRUE(result.ok) << result.failure;
  EXPECT_EQ(result.elements, 4);
  EXPECT_EQ(result.mismatches, 0);
  EXPECT_EQ(result.first_mismatch, -1);
  EXPECT_EQ(result.max_abs_error, 0);
  EXPECT_EQ(result.relative_l2, 0);
  EXPECT_EQ(result.cosine_difference, 0);
  EXPECT_TRUE(result.failure.empty());
}

TEST(Compare, ToleranceIsAbsoluteOrRelative) {
  const Tolerance tolerance{1e-3, 1e-2, kInfinity, kInfinity};
  const auto passes = [&](float actual, double expected) {
    return compare_floats({actual}, {expected}, 1, tolerance).ok;
  };
  EXPECT_TRUE(passes(0.0009f, 0));
  EXPECT_FALSE(passes(0.0011f, 0));
  EXPECT_TRUE(passes(100.9f, 100));
  EXPECT_FALSE(passes(101.1f, 100));
  EXPECT_FALSE(passes(-100, 100));
}

TEST(Compare, FailureNamesThePlaceAndBothValues) {
  const Comparison result = compare_floats({1, 2, 3, 4.5f, 5, 7}, {1, 2, 3, 4, 5, 6}, 3);
  EXPECT_FALSE(result.ok);
  EXPECT_EQ(result.mismatches, 2);
  EXPECT_EQ(result.first_mismatch, 3);
  EXPECT_EQ(result.max_abs_error, 1);
  EXPECT_EQ(result.failure,
            "outside tolerance at row 1, column 0: 4.5, expected 4; 2 of 6 elements "
            "mismatch");
}

TEST(Compare, SpecialValuesMustMatchAndComeFirst) {
  const auto inf = static_cast<float>(kInfinity);
  const auto nan = static_cast<float>(kNaN);
  EXPECT_TRUE(compare_floats({inf, -inf, nan, 1}, {kInfinity, -kInfinity, kNaN, 1}).ok);
  EXPECT_TRUE(compare_floats({inf, inf}, {kInfinity, kInfinity}).ok);
  const float specials[] = {inf, -inf, nan, 1};
  for (const float actual : specials) {
    for (const float expected : specials) {
      const bool same = std::isnan(actual) ? std::isnan(expected) : actual == expected;
      EXPECT_EQ(compare_floats({1, actual}, {1, double{expected}}).ok, same)
          << actual << " for " << expected;
      EXPECT_EQ(compare_floats({1, actual}, {1, double{expected}}, 2, kLseTolerance).ok, same);
    }
  }
  const Comparison result = compare_floats({9, 1, nan, 1}, {1, 1, 1, 1});
  EXPECT_EQ(result.first_mismatch, 2) << "the NaN, not the wrong 9";
  EXPECT_EQ(result.mismatches, 2);
  EXPECT_EQ(result.failure,
            "NaN or infinity out of place at row 1, column 0: nan, expected 1; 2 of 4 "
            "elements mismatch");
}

TEST(Compare, RowsAreComparedApart) {
  // One small row points elsewhere, but by less than abs_tol per element, so the whole tensor does not
  // show it.
  std::vector<double> expected(20000, 1.0);
  std::vector<float> actual(20000, 1.0f);
  for (size_t i = 10; i < 20; ++i) {
    expected[i] = 1e-3;
    actual[i] = i % 2 == 0 ? 0.9e-3f : 1.1e-3f;
  }
  const Comparison result = compare_floats(actual, expected, 10);
  EXPECT_EQ(result.mismatches, 0);
  EXPECT_LT(result.cosine_difference, 1e-10);
  EXPECT_EQ(result.worst_row, 1);
  EXPECT_NEAR(result.worst_row_cosine_difference, 0.01 / 2.01, 1e-6);
  EXPECT_FALSE(result.ok);
  EXPECT_EQ(result.failure, "L2 error 0.000316 of row 1 exceeds 1.42e-05; its norm is 0.00316");
  Tolerance whole_only = kOutTolerance;
  whole_only.row_cos_tol = kInfinity;
  EXPECT_TRUE(compare_floats(actual, expected, 10, whole_only).ok);
}

TEST(Compare, AZeroRowEqualsOnlyAZeroRow) {
  EXPECT_TRUE(compare_floats({0, 0, 1, 1}, {0, 0, 1, 1}).ok);
  const Comparison result = compare_floats({0, 1e-9f, 1, 1}, {0, 0, 1, 1});
  EXPECT_FALSE(result.ok);
  EXPECT_EQ(result.mismatches, 0);
  EXPECT_EQ(result.worst_row, 0);
  EXPECT_EQ(result.worst_row_cosine_difference, 1);
  EXPECT_FALSE(compare_floats({0, 0, 1, 1}, {0, 1e-9, 1, 1}).ok);
}

TEST(Compare, WholeTensorCosine) {
  const Tolerance tolerance{1, 1, 1e-3, kInfinity};
  EXPECT_TRUE(compare_floats({1, 1.02f}, {1, 1}, 2, tolerance).ok);
  const Comparison result = compare_floats({1, 1.1f}, {1, 1}, 2, tolerance);
  EXPECT_FALSE(result.ok);
  EXPECT_NEAR(result.cosine_difference, 0.01 / (2 + 1 + 1.21), 1e-6);
  EXPECT_NEAR(result.relative_l2, 0.1 / std::sqrt(2), 1e-6);
  EXPECT_EQ(result.failure, "L2 error 0.1 of the whole exceeds 0.0649; its norm is 1.41");
}

TEST(Compare, SizesMustMatch) {
  EXPECT_EQ(compare_floats({1, 1}, {1, 1, 1}).failure, "2 elements, expected 3");
  EXPECT_EQ(compare_floats({1, 1, 1}, {1, 1, 1}).failure,
            "row_length = 2 does not divide 3 elements");
  EXPECT_EQ(compare_floats({1}, {1}, 0).failure, "row_length = 0 does not divide 1 elements");
  EXPECT_FALSE(compare_floats({}, {}).ok) << "nothing compared proves nothing";
}

TEST(Compare, LargeInputsAreSearchedEverywhere) {
  const std::vector<double> expected(3'000'000, 0.5);
  std::vector<float> actual(3'000'000, 0.5f);
  EXPECT_TRUE(compare_floats(actual, expected, 100).ok);
  for (const size_t place : {size_t{0}, size_t{1'234'567}, size_t{2'999'999}}) {
    actual[place] = -0.5f;
    const Comparison result = compare_floats(actual, expected, 100);
    EXPECT_FALSE(result.ok);
    EXPECT_EQ(result.first_mismatch, int64_t(place));
    EXPECT_EQ(result.worst_row, int64_t(place) / 100);
    actual[place] = 0.5f;
  }
}

TEST(Compare, DescribesADecode) {
  const std::vector<uint16_t> out(512, 0x3F80);
  const std::vector<float> lse{2};
  const ReferenceResult expected = reference_of(std::vector<double>(512, 1.0), {3});
  Problem problem;
  problem.batch = problem.num_heads_q = 1;
  const DecodeComparison result = compare_decode(problem, out, lse, expected);
  EXPECT_TRUE(result.out.ok);
  EXPECT_FALSE(result.lse.ok);
  EXPECT_FALSE(result.ok());
  EXPECT_EQ(result.describe().rfind("out: ok (max abs error 0", 0), 0u) << result.describe();
  EXPECT_NE(
      result.describe().find("lse: outside tolerance at sequence 0, query token 0, head 0: 2, "
                             "expected 3; 1 of 1 elements mismatch"),
      std::string::npos)
      << result.describe();
}

TEST(Compare, NamesSequenceQueryTokenHeadAndColumn) {
  Problem problem;
  problem.batch = 2;
  problem.seqlen_q = 3;
  problem.num_heads_q = 5;
  const ReferenceResult expected =
      reference_of(std::vector<double>(30 * 512, 1.0), std::vector<double>(30, 2.0));
  std::vector<uint16_t> out(expected.out.size(), 0x3F80);
  std::vector<float> lse(expected.lse.size(), 2);
  out[size_t(((1 * 3 + 2) * 5 + 4) * 512 + 17)] = 0x4000;  // [batch, seqlen_q, num_heads_q, 512]
  lse[size_t((1 * 5 + 4) * 3 + 2)] = 3;                    // [batch, num_heads_q, seqlen_q]
  const DecodeComparison result = compare_decode(problem, out, lse, expected);
  for (const char* needed : {"out: outside tolerance at sequence 1, query token 2, head 4, column "
                             "17: 2, expected 1; 1 of 15360 elements mismatch",
                             "lse: outside tolerance at sequence 1, query token 2, head 4: 3"}) {
    EXPECT_NE(result.describe().find(needed), std::string::npos) << result.describe();
  }
  // If query rows were chosen, with all heads of each, the message names the chosen row.
  const std::vector<QueryRow> rows{{1, 0}, {0, 2}};
  const ReferenceResult some =
      reference_of(std::vector<double>(10 * 512, 1.0), std::vector<double>(10, 2.0));
  out.assign(some.out.size(), 0x3F80);
  lse.assign(some.lse.size(), 2);
  out[size_t(7 * 512)] = 0x4000;
  lse[8] = 3;
  const std::string text = compare_decode(problem, out, lse, some, rows).describe();
  EXPECT_NE(text.find("sequence 0, query token 2, head 2, column 0"), std::string::npos) << text;
  EXPECT_NE(text.find("sequence 0, query token 2, head 3: 3"), std::string::npos) << text;
}

TEST(Compare, SaysThatNaNIsAsInTheReference) {
  ReferenceResult expected = reference_of(std::vector<double>(4 * 512, 1.0), {1, 1, 1, 1});
  for (const size_t row : {1, 3}) {
    std::fill_n(expected.out.begin() + std::ptrdiff_t(row) * 512, 512, kNaN);
    expected.lse[row] = kNaN;
    expected.row_size[row].rounding = expected.row_size[row].spread = kNaN;
  }
  std::vector<uint16_t> out;
  for (const double x : expected.out) out.push_back(round_to(DType::kBFloat16, x));
  std::vector<float> lse(expected.lse.begin(), expected.lse.end());
  Problem problem;
  problem.batch = 1;
  problem.num_heads_q = 4;
  const DecodeComparison result = compare_decode(problem, out, lse, expected);
  EXPECT_OK(result);
  for (const char* needed :
       {"out: ok; NaN, as the reference: 2 rows (", "lse: ok; NaN, as the reference: 2 rows"}) {
    EXPECT_NE(result.describe().find(needed), std::string::npos) << result.describe();
  }
  // The other rows are judged as always. So is a row that is NaN where it should not be.
  out[5] = round_to(DType::kBFloat16, 1.1);
  EXPECT_EQ(compare_decode(problem, out, lse, expected).out.first_mismatch, 5);
  out[5] = nan_bits(DType::kBFloat16);
  EXPECT_EQ(compare_decode(problem, out, lse, expected).out.first_mismatch, 5);
}

TEST(Compare, RecognisesAnLseToBase2) {
  const std::vector<double> right{8.1, -3, 0, kInfinity};
  const ReferenceResult expected = reference_of(std::vector<double>(4 * 512, 1.0), right);
  Problem problem;
  problem.batch = 1;
  problem.num_heads_q = 4;
  std::vector<float> lse;
  for (const double x : right) lse.push_back(static_cast<float>(x * std::log2(std::exp(1.0))));
  const std::string hint = "lse looks like base 2: divide by log2(e)";
  const Comparison result = compare_lse(problem, lse, expected);
  EXPECT_FALSE(result.ok);
  EXPECT_NE(result.failure.find(hint), std::string::npos) << result.failure;
  lse[0] *= 1.001F;  // wrong in either base
  const Comparison wrong = compare_lse(problem, lse, expected);
  EXPECT_FALSE(wrong.ok);
  EXPECT_EQ(wrong.failure.find(hint), std::string::npos) << wrong.failure;
}

TEST(Compare, AnLseIsAsExactAsItsLogits) {
  // An lse near 0 of logits near 1,000 may be off by one unit in the logits' last place, 2^-14.
  ReferenceResult expected = reference_of(std::vector<double>(512, 1.0), {1e-5});
  expected.row_size[0].logit = 1000;
  Problem problem;
  problem.batch = problem.num_heads_q = 1;
  const auto passes = [&](double lse) {
    return compare_lse(problem, std::vector{static_cast<float>(lse)}, expected).ok;
  };
  EXPECT_TRUE(passes(1e-5 + 0x1p-14));
  EXPECT_FALSE(passes(1e-5 + 0x1p-8));
  expected.row_size[0].logit = 1;
  EXPECT_FALSE(passes(1e-5 + 0x1p-14));
}

TEST(Compare, OutMayOverflowOnlyAtTheLargestNumber) {
  Problem problem;
  problem.dtype = DType::kFloat16;
  problem.batch = problem.num_heads_q = 1;
  std::vector<float> out(512, 1);
  const auto passes = [&](double expected, float actual) {
    std::vector<double> row(512, 1);
    row[7] = expected;
    out[7] = actual;
    return compare_out(problem, out, reference_of(row, {0})).ok;
  };
  const auto inf = static_cast<float>(kInfinity);
  EXPECT_TRUE(passes(65500, inf));
  EXPECT_FALSE(passes(65500, -inf));
  EXPECT_FALSE(passes(65000, inf));
}

TEST(Compare, NeedsTheSizesOfTheReference) {
  ReferenceResult expected = reference_of(std::vector<double>(512, 1.0), {0});
  expected.row_size.clear();
  Problem problem;
  problem.batch = problem.num_heads_q = 1;
  const std::vector<uint16_t> out(512, 0x3F80);
  const DecodeComparison result = compare_decode(problem, out, std::vector<float>{0}, expected);
  EXPECT_EQ(result.out.failure, "the reference has no out_size and row_size for its out");
  EXPECT_EQ(result.lse.failure, "the reference has no row_size for its lse");
}

/// A right decode (the reference, rounded) with b = 64, s_k = 4096 and two heads. A test puts a fault
/// into one sequence, and the comparison must refuse it.
class FaultyDecode {
 public:
  static constexpr int kHeads = 2;
  static constexpr int kTokens = 4096;
  /// Even sequences, whose needles rise, and odd ones, whose needles fall; the first and the last.
  static constexpr int kSequences[] = {0, 33, 63};

  FaultyDecode(DType dtype, DataKind kind) {
    DecodeCase spec;
    spec.dtype = dtype;
    spec.data = kind;
    spec.seed = dtype == DType::kBFloat16 ? 0 : 1;  // both scales
    spec.batch = 64;
    spec.seqlen_k = kTokens;
    spec.num_heads_q = kHeads;
    data = make_data_set(spec);
    host = generate(data);
    EXPECT_OK(reference_attention(data.problem, host.tensors(data), &expected));
    repair();
  }

  /// Back to the right decode.
  void repair() {
    out.clear();
    lse.clear();
    for (const double x : expected.out) out.push_back(round_to(dtype(), x));
    for (const double x : expected.lse) lse.push_back(static_cast<float>(x));
  }
  DecodeComparison check() const { return compare_decode(data.problem, out, lse, expected); }

  void set_row(int sequence, int head, const test::PlainRow& row) {
    const size_t index = size_t(int64_t{sequence} * kHeads + head);
    for (size_t c = 0; c < 512; ++c) out[index * 512 + c] = round_to(dtype(), row.out[c]);
    lse[index] = static_cast<float>(row.lse);
  }
  /// Replaces one sequence's rows by what the reference finds for other tables.
  void decode_with(int sequence, const std::vector<int32_t>& block_table,
                   const std::vector<int32_t>& seqlens_k) {
    Tensors changed = host.tensors(data);
    changed.block_table = block_table.data();
    changed.seqlens_k = seqlens_k.data();
    ReferenceResult result;
    const QueryRow rows[] = {{sequence, 0}};
    ASSERT_OK(reference_attention_rows(data.problem, changed, rows, &result));
    for (int head = 0; head < kHeads; ++head) {
      test::PlainRow row;
      const auto first = result.out.begin() + head * 512;
      row.out.assign(first, first + 512);
      row.lse = result.lse[size_t(head)];
      set_row(sequence, head, row);
    }
  }
  test::PlainInputs inputs(int sequence, int head) {
    return test::gather(data.problem, host.tensors(data), sequence, 0, head);
  }
  std::vector<int32_t> needles(int sequence) const {
    std::vector<int32_t> tokens;
    for (int n = data.needle_begin[size_t(sequence)]; n < data.needle_begin[size_t(sequence) + 1];
         ++n) {
      tokens.push_back(data.needles[size_t(n)].token);
    }
    return tokens;
  }
  DType dtype() const { return data.spec.dtype; }
  bool has_needles() const { return data.spec.data == DataKind::kNeedles; }

  DataSet data;
  HostTensors host;
  ReferenceResult expected;
  std::vector<uint16_t> out;
  std::vector<float> lse;
};

// A decode of a quantised cache is judged by that cache's own values, as strictly as any other. The result
// of the 16-bit cache that it was made from counts as wrong.
TEST(QuantisedCaches, AreJudgedByWhatTheySay) {
  for (const CacheFormat format :
       {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor, CacheFormat::kInt8Tile128}) {
    DecodeCase spec;
    spec.lengths = {300, 70};
    spec.num_heads_q = 8;
    spec.data = DataKind::kNeedles;
    SCOPED_TRACE(to_string(format));
    const DataSet plain_data = make_data_set(spec);
    HostTensors plain = generate(plain_data);
    spec.cache_format = format;
    const DataSet data = make_data_set(spec);
    HostTensors host = generate(data);
    ReferenceResult expected, unquantised;
    ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
    ASSERT_OK(reference_attention(plain_data.problem, plain.tensors(plain_data), &unquantised));
    const auto judge = [&](const ReferenceResult& result) {
      std::vector<uint16_t> out;
      for (const double x : result.out) out.push_back(round_to(spec.dtype, x));
      return compare_decode(data.problem, out,
                            std::vector<float>(result.lse.begin(), result.lse.end()), expected);
    };
    EXPECT_OK(judge(expected));
    EXPECT_FALSE(judge(unquantised).ok());
  }
}

template <DType dtype, DataKind kind>
struct FaultData {
  static std::unique_ptr<FaultyDecode> make() {
    return std::make_unique<FaultyDecode>(dtype, kind);
  }
  static std::string name() {
    return std::string(to_string(dtype)) + (kind == DataKind::kNeedles ? "_needles" : "_flat");
  }
};
struct FaultDataNames {
  template <typename Data>
  static std::string GetName(int) {
    return Data::name();
  }
};

/// The decode is made once per suite, because it takes a second and 300 MB.
template <typename Data>
class Faults : public testing::Test {
 protected:
  static void SetUpTestSuite() { decode() = Data::make(); }
  static void TearDownTestSuite() { decode() = nullptr; }
  void SetUp() override { decode()->repair(); }
  static std::unique_ptr<FaultyDecode>& decode() {
    static std::unique_ptr<FaultyDecode> made;
    return made;
  }
};
using AllFaultData = testing::Types<
    FaultData<DType::kBFloat16, DataKind::kNeedles>, FaultData<DType::kFloat16, DataKind::kNeedles>,
    FaultData<DType::kBFloat16, DataKind::kFlat>, FaultData<DType::kFloat16, DataKind::kFlat>>;
TYPED_TEST_SUITE(Faults, AllFaultData, FaultDataNames);

TYPED_TEST(Faults, TheRoundedReferencePasses) {
  const DecodeComparison result = this->decode()->check();
  EXPECT_OK(result);
  EXPECT_LT(result.out.worst_row_cosine_difference, 2e-6);
}

TYPED_TEST(Faults, NothingWritten) {
  FaultyDecode& decode = *this->decode();
  decode.out = decode.host.out;
  EXPECT_FALSE(decode.check().out.ok);
  decode.lse = decode.host.lse;
  EXPECT_FALSE(decode.check().lse.ok);
  std::fill(decode.out.begin(), decode.out.end(), uint16_t{0});
  EXPECT_FALSE(decode.check().out.ok);
}

TYPED_TEST(Faults, MissingLastToken) {
  FaultyDecode& decode = *this->decode();
  for (const int sequence : decode.kSequences) {
    std::vector<int32_t> lengths = decode.data.seqlens_k;
    --lengths[size_t(sequence)];
    decode.decode_with(sequence, decode.data.block_table, lengths);
    const DecodeComparison result = decode.check();
    EXPECT_FALSE(result.out.ok) << result.describe();
    EXPECT_EQ(result.out.worst_row / decode.kHeads, sequence);
    decode.repair();
  }
}

TYPED_TEST(Faults, SwappedPage) {
  // Every entry of the table in turn names a page of another sequence.
  FaultyDecode& decode = *this->decode();
  const int columns = decode.data.problem.max_pages_per_seq;
  for (const int sequence : {0, 33}) {
    const int other = sequence + 2;
    std::vector<bool> holds_needle(64);
    for (const int b : {sequence, other}) {
      for (const int32_t token : decode.needles(b)) holds_needle[size_t(token / 64)] = true;
    }
    for (int slot = 0; slot < 64; ++slot) {
      // Among needles, a page of ordinary tokens has 1/2000 of its row's weight, which 16 bits hardly
      // hold. On flat data every page shows.
      if (decode.has_needles() && !holds_needle[size_t(slot)]) continue;
      std::vector<int32_t> table = decode.data.block_table;
      table[size_t(int64_t{sequence} * columns + slot)] =
          table[size_t(int64_t{other} * columns + slot)];
      decode.decode_with(sequence, table, decode.data.seqlens_k);
      EXPECT_FALSE(decode.check().out.ok) << "sequence " << sequence << " slot " << slot;
    }
    decode.repair();
  }
}

TYPED_TEST(Faults, MissingOrDoubledToken) {
  // On needle data each needle in turn, on flat data a few tokens.
  FaultyDecode& decode = *this->decode();
  for (const int sequence : decode.kSequences) {
    std::vector<int32_t> tokens = {0, 63, 64, 2047, 4095};
    if (decode.has_needles()) tokens = decode.needles(sequence);
    std::vector<test::PlainInputs> inputs;
    for (int head = 0; head < decode.kHeads; ++head)
      inputs.push_back(decode.inputs(sequence, head));
    for (const int32_t token : tokens) {
      for (const int count : {0, 2}) {
        std::vector<int> times(decode.kTokens, 1);
        times[size_t(token)] = count;
        for (int head = 0; head < decode.kHeads; ++head) {
          decode.set_row(sequence, head, test::evaluate(inputs[size_t(head)], times));
        }
        EXPECT_FALSE(decode.check().out.ok)
            << "sequence " << sequence << " token " << token << " counted " << count << " times";
      }
    }
    decode.repair();
  }
}

TYPED_TEST(Faults, InvertedRescaleFactor) {
  // Online softmax over blocks of 64: when the running maximum m rises, O (and l) must shrink by
  // exp(m_old - m_new); here they grow. Odd sequences have their maximum first, so the factor is 1
  // throughout, and the fault cannot show.
  FaultyDecode& decode = *this->decode();
  if (!decode.has_needles()) GTEST_SKIP() << "on flat data m hardly moves: the fault hardly shows";
  for (const int sequence : {0, 62}) {
    for (const bool also_l : {false, true}) {
      for (int head = 0; head < decode.kHeads; ++head) {
        const test::PlainInputs in = decode.inputs(sequence, head);
        double m = -kInfinity, l = 0;
        test::PlainRow row;
        row.out.assign(512, 0);
        for (size_t t = 0; t < decode.kTokens; t += 64) {
          const auto block = in.logits.begin() + int64_t(t);
          const double m_new =
              std::max(m, static_cast<double>(*std::max_element(block, block + 64)));
          const double right = t == 0 ? 0 : std::exp(m - m_new);
          const double wrong = t == 0 ? 0 : std::exp(m_new - m);
          l *= also_l ? wrong : right;
          for (double& x : row.out) x *= wrong;
          for (size_t i = t; i < t + 64; ++i) {
            const double p = std::exp(static_cast<double>(in.logits[i]) - m_new);
            l += p;
            for (size_t c = 0; c < 512; ++c) row.out[c] += p * in.k[i * 576 + c];
          }
          m = m_new;
        }
        for (double& x : row.out) x /= l;
        row.lse = m + std::log(l);
        decode.set_row(sequence, head, row);
      }
      const DecodeComparison result = decode.check();
      EXPECT_FALSE(result.out.ok) << result.describe();
      EXPECT_EQ(result.lse.ok, !also_l) << result.describe();
      decode.repair();
    }
  }
}

TYPED_TEST(Faults, OneNaN) {
  FaultyDecode& decode = *this->decode();
  for (const size_t place : {size_t{0}, decode.out.size() / 2 + 77, decode.out.size() - 1}) {
    decode.out[place] = nan_bits(decode.dtype());
    const DecodeComparison result = decode.check();
    EXPECT_FALSE(result.out.ok);
    EXPECT_EQ(result.out.mismatches, 1);
    EXPECT_EQ(result.out.first_mismatch, int64_t(place));
    decode.repair();
  }
  for (const size_t place : {size_t{0}, decode.lse.size() - 1}) {
    decode.lse[place] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_FALSE(decode.check().lse.ok);
    decode.repair();
  }
}

TYPED_TEST(Faults, OneWrongElement) {
  // Each element of one row in turn, if it is large enough for the tolerance (8e-4), gets the wrong
  // sign, then 0.
  FaultyDecode& decode = *this->decode();
  const size_t row = 33 * decode.kHeads * 512;
  int wrong = 0;
  for (size_t i = row; i < row + 512; ++i) {
    if (!(std::abs(decode.expected.out[i]) > 9e-4)) continue;
    ++wrong;
    const uint16_t right = decode.out[i];
    for (const uint16_t bits : {uint16_t(right ^ 0x8000), uint16_t{0}}) {
      decode.out[i] = bits;
      const Comparison result = decode.check().out;
      ASSERT_FALSE(result.ok);
      ASSERT_EQ(result.first_mismatch, int64_t(i));
    }
    decode.out[i] = right;
  }
  EXPECT_GT(wrong, 200);
  decode.lse[100] *= 1.0002f;
  EXPECT_FALSE(decode.check().lse.ok);
  decode.lse[100] = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(decode.check().lse.ok);
}

/// Decodes a row as a kernel does: fp32 logits and sums, P rounded to 16 bits, online softmax in
/// blocks of 64.
void decode_like_a_kernel(const Problem& problem, const Tensors& tensors, int sequence, int query,
                          int head, uint16_t* out, float* lse) {
  const test::PlainInputs in = test::gather(problem, tensors, sequence, query, head);
  float m = -std::numeric_limits<float>::infinity();
  float l = 0;
  std::vector<float> o(512, 0.0f);
  for (int64_t t = 0; t < in.tokens; t += 64) {
    const int64_t end = std::min<int64_t>(t + 64, in.tokens);
    std::vector<float> s;
    float m_new = m;
    for (int64_t i = t; i < end; ++i) {
      float dot = 0;
      for (int64_t c = 0; c < 576; ++c) {
        dot += static_cast<float>(in.q[size_t(c)]) * static_cast<float>(in.k[size_t(i * 576 + c)]);
      }
      s.push_back(dot * problem.softmax_scale);
      m_new = std::max(m_new, s.back());
    }
    const float rescale = std::exp(m - m_new);
    l *= rescale;
    for (float& x : o) x *= rescale;
    for (int64_t i = t; i < end; ++i) {
      const float p = std::exp(s[size_t(i - t)] - m_new);
      l += p;
      const auto p16 =
          static_cast<float>(test::value_of(problem.dtype, round_to(problem.dtype, p)));
      for (size_t c = 0; c < 512; ++c) o[c] += p16 * static_cast<float>(in.k[size_t(i) * 576 + c]);
    }
    m = m_new;
  }
  const bool empty = in.tokens == 0;
  for (size_t c = 0; c < 512; ++c) {
    out[c] = empty ? uint16_t{0} : round_to(problem.dtype, o[c] / l);
  }
  *lse = empty ? std::numeric_limits<float>::infinity() : m + std::log(l);
}

TEST(KernelArithmetic, PassesOnEveryKindOfData) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const DataKind kind : kDataKinds) {
      for (const uint64_t seed : {0, 1}) {
        DecodeCase spec;
        spec.dtype = dtype;
        spec.data = kind;
        spec.seed = seed;
        spec.num_heads_q = 2;
        spec.seqlen_q = 2;
        spec.causal = true;
        spec.lengths = {1, 2, 3, 4, 5, 8, 20, 0, 63, 64, 65, 140, 4096, 601};
        SCOPED_TRACE(spec.name());
        const DataSet data = make_data_set(spec);
        HostTensors host = generate(data);
        const Tensors tensors = host.tensors(data);
        ReferenceResult expected;
        ASSERT_OK(reference_attention(data.problem, tensors, &expected));
        for (int b = 0; b < data.problem.batch; ++b) {
          for (int query = 0; query < 2; ++query) {
            for (int head = 0; head < 2; ++head) {
              decode_like_a_kernel(data.problem, tensors, b, query, head,
                                   &host.out[size_t((b * 2 + query) * 2 + head) * 512],
                                   &host.lse[size_t((int64_t{b} * 2 + head) * 2 + query)]);
            }
          }
        }
        const DecodeComparison result = compare_decode(data.problem, host.out, host.lse, expected);
        EXPECT_OK(result);
      }
    }
  }
}

// On the generator's data, whatever the production kernels' tolerances refuse is refused here, too, per
// element and per row. Those tolerances are for values of size 0.1; larger values need a larger abs_tol.
TEST(KernelArithmetic, IsJudgedAsStrictlyAsByFixedTolerances) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const DataKind kind : kDataKinds) {
      DecodeCase spec;
      spec.dtype = dtype;
      spec.data = kind;
      spec.seed = dtype == DType::kBFloat16 ? 0 : 1;
      spec.num_heads_q = 2;
      spec.lengths = {1, 2, 5, 20, 64, 140, 601, 4096};
      spec.batch = 8;
      SCOPED_TRACE(spec.name());
      const DataSet data = make_data_set(spec);
      HostTensors host = generate(data);
      ReferenceResult expected;
      ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
      std::vector<float> out(expected.out.begin(), expected.out.end());
      std::vector<float> lse(expected.lse.begin(), expected.lse.end());
      for (size_t i = 0; i < out.size(); i += 37) {
        const double r = expected.out[i];
        const double abs_tol = kOutTolerance.abs_tol * std::max(1.0, expected.out_size[i] / 0.1);
        const double error = std::max(abs_tol, kOutTolerance.rel_tol * (std::abs(r) + 1e-6));
        out[i] = static_cast<float>(r + 1.01 * error);
        EXPECT_FALSE(compare_out(data.problem, out, expected).ok)
            << "element " << i << ", expected " << r << ", size " << expected.out_size[i];
        out[i] = static_cast<float>(r);
      }
      for (size_t i = 0; i < lse.size(); ++i) {
        const double r = expected.lse[i];
        if (std::abs(r) < expected.row_size[i].logit / 10) continue;  // judged by its logits
        const double error =
            std::max(kLseTolerance.abs_tol, kLseTolerance.rel_tol * (std::abs(r) + 1e-6));
        lse[i] = static_cast<float>(r + 1.01 * error);
        EXPECT_FALSE(compare_lse(data.problem, lse, expected).ok)
            << "lse " << i << ", expected " << r;
        lse[i] = static_cast<float>(r);
      }
      std::mt19937_64 random(1);
      for (size_t row = 0; row < lse.size(); ++row) {
        // The row is off by 4.5e-3 of its norm, the fixed tolerance for rows, in a random direction.
        double square = 0, errors = 0;
        std::vector<double> error(512);
        for (size_t c = 0; c < 512; ++c) {
          error[c] = expected.out[row * 512 + c] * std::normal_distribution<>()(random);
          square += expected.out[row * 512 + c] * expected.out[row * 512 + c];
          errors += error[c] * error[c];
        }
        const double factor = 1.1 * std::sqrt(2 * kOutTolerance.row_cos_tol * square / errors);
        for (size_t c = 0; c < 512; ++c) {
          out[row * 512 + c] = static_cast<float>(expected.out[row * 512 + c] + factor * error[c]);
        }
        EXPECT_FALSE(compare_out(data.problem, out, expected).ok) << "row " << row;
        std::copy_n(expected.out.begin() + std::ptrdiff_t(row) * 512, 512,
                    out.begin() + std::ptrdiff_t(row) * 512);
      }
    }
  }
}

}  // namespace
}  // namespace mla
