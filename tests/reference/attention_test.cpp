#include "reference/attention.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "reference/float16.h"
#include "reference/quantise.h"
#include "reference/testing/data_generator.h"
#include "tests/reference/plain_attention.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// A problem small enough to work out by hand: pages are in order, q and cache are zero except where
/// a test sets them.
class HandMade {
 public:
  HandMade(int seqlen_q, int num_heads_q, int num_heads_kv, std::vector<int32_t> lengths)
      : lengths_(std::move(lengths)) {
    problem.batch = static_cast<int>(lengths_.size());
    problem.seqlen_q = seqlen_q;
    problem.num_heads_q = num_heads_q;
    problem.num_heads_kv = num_heads_kv;
    problem.max_pages_per_seq = 2;
    problem.num_pages = 2 * problem.batch;
    problem.softmax_scale = 0.5f;
    for (int32_t page = 0; page < problem.num_pages; ++page) table_.push_back(page);
    q_.assign(size_t(problem.q_elements()), bfloat16(0.0f));
    kv_.assign(size_t(problem.kv_elements()), bfloat16(0.0f));
  }

  bfloat16& q(int sequence, int query, int head, int column) {
    return q_[size_t(((int64_t{sequence} * problem.seqlen_q + query) * problem.num_heads_q + head) *
                         576 +
                     column)];
  }
  bfloat16& kv(int sequence, int token, int head, int column) {
    return kv_[size_t(((int64_t{sequence} * 128 + token) * problem.num_heads_kv + head) * 576 +
                      column)];
  }
  Tensors tensors() const {
    return {.q = q_.data(),
            .kv_cache = kv_.data(),
            .block_table = table_.data(),
            .seqlens_k = lengths_.data()};
  }
  ReferenceResult decode() const {
    ReferenceResult result;
    const Status status = reference_attention(problem, tensors(), &result);
    EXPECT_OK(status);
    return result;
  }

  Problem problem;

 private:
  std::vector<int32_t> lengths_;
  std::vector<int32_t> table_;
  std::vector<bfloat16> q_, kv_;
};

TEST(ReferenceByHand, OneTokenIsItsValue) {
  HandMade hand(1, 1, 1, {1});
  hand.q(0, 0, 0, 3) = bfloat16(2.0f);
  hand.q(0, 0, 0, 575) = bfloat16(-4.0f);
  hand.kv(0, 0, 0, 3) = bfloat16(1.5f);
  hand.kv(0, 0, 0, 511) = bfloat16(7.0f);
  hand.kv(0, 0, 0, 512) = bfloat16(9.0f);
  hand.kv(0, 0, 0, 575) = bfloat16(0.25f);
  const ReferenceResult result = hand.decode();
  ASSERT_EQ(result.out.size(), 512u);
  ASSERT_EQ(result.lse.size(), 1u);
  for (size_t c = 0; c < 512; ++c) EXPECT_EQ(result.out[c], c == 3 ? 1.5 : c == 511 ? 7.0 : 0.0);
  EXPECT_EQ(result.lse[0], 0.5 * (2.0 * 1.5 - 4.0 * 0.25));
}

TEST(ReferenceByHand, EqualLogitsGiveTheMean) {
  HandMade hand(1, 1, 1, {65});  // the last token is alone on its page
  hand.kv(0, 0, 0, 0) = bfloat16(65.0f);
  hand.kv(0, 64, 0, 1) = bfloat16(-130.0f);
  const ReferenceResult result = hand.decode();
  EXPECT_NEAR(result.out[0], 1.0, 1e-14);
  EXPECT_NEAR(result.out[1], -2.0, 1e-14);
  EXPECT_NEAR(result.lse[0], std::log(65.0), 1e-14);
}

TEST(ReferenceByHand, TwoTokensByTheSoftmax) {
  HandMade hand(1, 1, 1, {2});
  hand.q(0, 0, 0, 24) = bfloat16(1.0f);
  hand.kv(0, 0, 0, 24) = bfloat16(2.0f);  // logit 1; the other token's is 0
  const ReferenceResult result = hand.decode();
  const double e = std::exp(1.0);
  EXPECT_NEAR(result.out[24], 2 * e / (e + 1), 1e-15);
  EXPECT_NEAR(result.lse[0], std::log(e + 1), 1e-15);
}

TEST(ReferenceByHand, CausalMaskIsAlignedBottomRight) {
  // Query i of 3 sees tokens 0 ... 2 - 3 + i of 2: none, the first, both.
  HandMade hand(3, 2, 1, {2, 0, 5});
  hand.problem.causal = true;
  hand.kv(0, 0, 0, 0) = bfloat16(1.0f);
  hand.kv(0, 1, 0, 0) = bfloat16(3.0f);
  for (int t = 0; t < 5; ++t) hand.kv(2, t, 0, 0) = bfloat16(static_cast<float>(t));
  const ReferenceResult result = hand.decode();
  const auto out = [&](int b, int query, int head) {
    return result.out[size_t(((int64_t{b} * 3 + query) * 2 + head) * 512)];
  };
  const auto lse = [&](int b, int query, int head) {
    return result.lse[size_t((int64_t{b} * 2 + head) * 3 + query)];
  };
  for (const int head : {0, 1}) {
    EXPECT_EQ(out(0, 0, head), 0);
    EXPECT_EQ(lse(0, 0, head), kInfinity);
    EXPECT_EQ(out(0, 1, head), 1);
    EXPECT_EQ(lse(0, 1, head), 0);
    EXPECT_NEAR(out(0, 2, head), 2, 1e-15);
    EXPECT_NEAR(lse(0, 2, head), std::log(2.0), 1e-15);
    for (const int query : {0, 1, 2}) {
      EXPECT_EQ(out(1, query, head), 0);
      EXPECT_EQ(lse(1, query, head), kInfinity);
      EXPECT_NEAR(out(2, query, head), (2 + query) / 2.0, 1e-15);
      EXPECT_NEAR(lse(2, query, head), std::log(3.0 + query), 1e-15);
    }
  }
}

TEST(ReferenceByHand, HeadsReadTheirKvHead) {
  HandMade hand(2, 6, 3, {1, 1});
  for (const int b : {0, 1}) {
    for (const int head : {0, 1, 2}) {
      hand.kv(b, 0, head, 5) = bfloat16(static_cast<float>(10 * b + head));
    }
  }
  const ReferenceResult result = hand.decode();
  for (int b = 0; b < 2; ++b) {
    for (int query = 0; query < 2; ++query) {
      for (int head = 0; head < 6; ++head) {
        EXPECT_EQ(result.out[size_t(((b * 2 + query) * 6 + head) * 512 + 5)], 10 * b + head / 2);
      }
    }
  }
}

TEST(ReferenceByHand, LseIsStoredHeadByHead) {
  HandMade hand(3, 2, 1, {1});
  hand.kv(0, 0, 0, 0) = bfloat16(2.0f);
  for (int query = 0; query < 3; ++query) {
    for (int head = 0; head < 2; ++head) {
      hand.q(0, query, head, 0) = bfloat16(static_cast<float>(10 * head + query));
    }
  }
  EXPECT_EQ(hand.decode().lse, (std::vector<double>{0, 1, 2, 10, 11, 12}));
}

/// Expects every element of `result` within 1e-12 of the plain evaluation, relative to the sum of
/// its terms' magnitudes.
void expect_equals_plain(const DataSet& data, HostTensors& host, const ReferenceResult& result) {
  const Problem& problem = data.problem;
  const Tensors tensors = host.tensors(data);
  for (int b = 0; b < problem.batch; ++b) {
    for (int query = 0; query < problem.seqlen_q; ++query) {
      for (int head = 0; head < problem.num_heads_q; ++head) {
        const test::PlainRow plain = test::evaluate(test::gather(problem, tensors, b, query, head));
        const int64_t row = (int64_t{b} * problem.seqlen_q + query) * problem.num_heads_q + head;
        for (size_t c = 0; c < 512; ++c) {
          const double error = std::abs(result.out[size_t(row) * 512 + c] - plain.out[c]);
          ASSERT_TRUE(error <= 1e-12 * plain.magnitude[c])
              << "sequence " << b << " query " << query << " head " << head << " column " << c
              << ": " << result.out[size_t(row) * 512 + c] << ", plain " << plain.out[c];
        }
        const double lse =
            result
                .lse[size_t((int64_t{b} * problem.num_heads_q + head) * problem.seqlen_q + query)];
        if (std::isinf(plain.lse)) {
          ASSERT_EQ(lse, kInfinity);
        } else {
          ASSERT_TRUE(std::abs(lse - plain.lse) <= 1e-12 * std::max(1.0, std::abs(plain.lse)))
              << lse << ", plain " << plain.lse;
        }
      }
    }
  }
}

TEST(Reference, EqualsPlainLoopsOnSeededCases) {
  constexpr std::pair<int, int> kHeads[] = {{1, 1},  {3, 1},  {3, 3},  {9, 3},
                                            {16, 1}, {64, 8}, {66, 1}, {128, 2}};
  constexpr int kCases = 200;
  std::mt19937 random(1);
  const auto pick = [&](int count) { return static_cast<int>(random() % unsigned(count)); };
  int64_t empty_rows = 0;
  for (int i = 0; i < kCases; ++i) {
    DecodeCase spec;
    spec.dtype = i % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
    spec.data = static_cast<DataKind>(i / 2 % 4);
    std::tie(spec.num_heads_q, spec.num_heads_kv) = kHeads[pick(8)];
    constexpr int kLengths[] = {1, 20, 63, 64, 65, 140, 700};
    spec.batch = 1 + pick(4);
    spec.seqlen_q = 1 + pick(4);
    spec.seqlen_k = kLengths[pick(7)];
    while (int64_t{spec.batch} * spec.seqlen_q * spec.num_heads_q * spec.seqlen_k > 8192) {
      (spec.batch > 1 ? spec.batch : spec.seqlen_k) /= 2;
      if (spec.seqlen_k < 8) break;
    }
    spec.seqlen_k = std::max(spec.seqlen_k, 1);
    spec.variable_lengths = pick(2) == 0;
    spec.empty_fraction = pick(3) == 0 ? 0.5 : 0;
    spec.causal = pick(2) == 0;
    spec.seed = random();
    SCOPED_TRACE(spec.name());
    const DataSet data = make_data_set(spec);
    HostTensors host = generate(data);
    ReferenceResult result;
    const Status status = reference_attention(data.problem, host.tensors(data), &result);
    ASSERT_OK(status);
    expect_equals_plain(data, host, result);
    if (HasFatalFailure()) return;
    for (const double lse : result.lse) empty_rows += lse == kInfinity;
  }
  EXPECT_GT(empty_rows, 100) << "the sample must contain rows that see nothing";
}

// The sizes by which a row's errors are judged, compared with plain loops.
TEST(Reference, KnowsTheSizesOfItsTerms) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    DecodeCase spec;
    spec.dtype = dtype;
    spec.lengths = {1, 70, 200, 0};
    spec.batch = 4;
    spec.seqlen_q = 2;
    spec.num_heads_q = 6;
    spec.num_heads_kv = 2;
    spec.causal = true;
    spec.data = DataKind::kNeedles;
    DataSet data = make_data_set(spec);
    // Some weights become subnormal in fp16, and some are lost.
    data.problem.softmax_scale *= 2.6F;
    HostTensors host = generate(data);
    const Tensors tensors = host.tensors(data);
    ReferenceResult result;
    ASSERT_OK(reference_attention(data.problem, tensors, &result));
    const double u = dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
    const double normal = dtype == DType::kBFloat16 ? std::ldexp(1, -126) : std::ldexp(1, -14);
    int64_t subnormal = 0, lost = 0;
    for (int row = 0; row < 4 * 2 * 6; ++row) {
      const test::PlainInputs in =
          test::gather(data.problem, tensors, row / 12, row / 6 % 2, row % 6);
      const RowSize& size = result.row_size[size_t(row)];
      ASSERT_EQ(size.tokens, in.tokens);
      if (in.tokens == 0) {
        EXPECT_EQ(size.logit + size.rounding + size.spread + result.out_size[size_t(row) * 512], 0);
        continue;
      }
      const long double max = *std::max_element(in.logits.begin(), in.logits.end());
      double l = 0, q_square = 0, k_square = 0, by_columns = 0;
      for (const long double logit : in.logits) l += static_cast<double>(std::exp(logit - max));
      std::vector<double> out_size(512);
      double squares = 0, small = 0, spread = 0;
      for (size_t c = 0; c < 576; ++c) {
        double largest = 0;
        for (size_t t = 0; t < in.logits.size(); ++t) {
          largest = std::max(largest, std::abs(in.k[t * 576 + c]));
        }
        by_columns += std::abs(in.q[c]) * largest;
        q_square += in.q[c] * in.q[c];
      }
      for (size_t t = 0; t < in.logits.size(); ++t) {
        const auto p = static_cast<double>(std::exp(in.logits[t] - max));
        // The most that rounding p to 16 bits changes it, divided by u.
        const double rounded = p >= normal ? p : std::min(p, u * normal) / u;
        subnormal += p < normal;
        lost += p < u * normal;
        double v_square = 0, key_square = 0;
        for (size_t c = 0; c < 576; ++c) {
          const double k = in.k[t * 576 + c];
          key_square += k * k;
          if (c >= 512) continue;
          v_square += k * k;
          out_size[c] += rounded * std::abs(k) / l;
          const double away = k - result.out[size_t(row) * 512 + c];
          spread += p * away * away / l;
        }
        k_square = std::max(k_square, key_square);
        squares += p * p * v_square;
        if (p < normal) small += rounded * std::sqrt(v_square);
      }
      const double scale = double{data.problem.softmax_scale};
      EXPECT_NEAR(size.logit, scale * std::min(std::sqrt(q_square * k_square), by_columns),
                  1e-9 * size.logit);
      EXPECT_NEAR(size.rounding, (std::sqrt(squares) + small) / l, 1e-9 * size.rounding);
      EXPECT_NEAR(size.spread, std::sqrt(spread), 1e-6);
      for (size_t c = 0; c < 512; ++c) {
        ASSERT_NEAR(result.out_size[size_t(row) * 512 + c], out_size[c], 1e-5 * out_size[c]);
      }
    }
    if (dtype == DType::kFloat16) {
      EXPECT_GT(subnormal - lost, 100);
      EXPECT_GT(lost, 100);
    }
  }
}

class ReferenceOnNeedles : public testing::Test {
 protected:
  ReferenceOnNeedles() {
    DecodeCase spec;
    spec.lengths = {300, 0, 64, 1, 129, 2};
    spec.seqlen_q = 3;
    spec.num_heads_q = 70;  // more rows per KV head than are evaluated together
    spec.causal = true;
    spec.data = DataKind::kNeedles;
    data_ = make_data_set(spec);
    host_ = generate(data_);
    EXPECT_OK(reference_attention(data_.problem, host_.tensors(data_), &result_));
  }
  DataSet data_;
  HostTensors host_;
  ReferenceResult result_;
};

TEST_F(ReferenceOnNeedles, EqualsPlainLoops) {
  expect_equals_plain(data_, host_, result_);
}

TEST_F(ReferenceOnNeedles, DoesNotDependOnThreads) {
  for (const int threads : {1, 2, 5}) {
    ReferenceResult result;
    ASSERT_OK(reference_attention(data_.problem, host_.tensors(data_), &result, threads));
    EXPECT_EQ(result.out, result_.out) << threads;
    EXPECT_EQ(result.lse, result_.lse) << threads;
  }
}

TEST_F(ReferenceOnNeedles, ChosenRowsEqualTheWhole) {
  const QueryRow rows[] = {{4, 2}, {0, 0}, {0, 1}, {1, 1}, {4, 2}, {5, 0}, {3, 2}};
  ReferenceResult chosen;
  ASSERT_OK(reference_attention_rows(data_.problem, host_.tensors(data_), rows, &chosen));
  const int64_t heads = data_.problem.num_heads_q;
  ASSERT_EQ(chosen.out.size(), std::size(rows) * size_t(heads) * 512);
  ASSERT_EQ(chosen.lse.size(), std::size(rows) * size_t(heads));
  for (size_t i = 0; i < std::size(rows); ++i) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t row = (int64_t{rows[i].sequence} * 3 + rows[i].query) * heads + head;
      for (size_t c = 0; c < 512; ++c) {
        ASSERT_NEAR(chosen.out[(i * size_t(heads) + size_t(head)) * 512 + c],
                    result_.out[size_t(row) * 512 + c], 1e-14);
      }
      const double lse = result_.lse[size_t((rows[i].sequence * heads + head) * 3 + rows[i].query)];
      const double chosen_lse = chosen.lse[i * size_t(heads) + size_t(head)];
      if (std::isinf(lse)) {
        ASSERT_EQ(chosen_lse, lse);
      } else {
        ASSERT_NEAR(chosen_lse, lse, 1e-13);
      }
    }
  }
  ASSERT_OK(reference_attention_rows(data_.problem, host_.tensors(data_), {}, &chosen));
  EXPECT_TRUE(chosen.out.empty());
}

TEST_F(ReferenceOnNeedles, ValuesBeyondTheContractStayInTheirSequence) {
  const int32_t page = data_.block_table[4 * size_t(data_.problem.max_pages_per_seq)];
  for (const uint16_t bits : {uint16_t{0x7F80}, uint16_t{0xFF80}, uint16_t{0x7FC0}}) {
    HostTensors host = host_;
    host.kv_cache[size_t(page) * 64 * 576 + 575] = bits;  // token 0 of sequence 4
    ReferenceResult result;
    ASSERT_OK(reference_attention(data_.problem, host.tensors(data_), &result));
    const size_t row = 3 * 70 * 512;
    for (size_t i = 0; i < result.out.size(); ++i) {
      if (i / row == 4) continue;
      ASSERT_EQ(result.out[i], result_.out[i]) << i;
    }
    for (size_t i = 0; i < result.lse.size(); ++i) {
      if (i / (3 * 70) != 4) {
        ASSERT_EQ(result.lse[i], result_.lse[i]) << i;
      } else if (bits != 0xFF80) {  // a token whose logit is -inf has no weight
        ASSERT_FALSE(std::isfinite(result.lse[i]) && std::isfinite(result.out[i * 512])) << i;
      }
    }
  }
}

TEST_F(ReferenceOnNeedles, MaskedTokensReachNoRow) {
  // A NaN in the last token is seen by the last query token alone.
  const int64_t place =
      cache_place(data_.problem, with_strides(data_.problem, {}), &data_.block_table[0], 299, 0);
  host_.kv_cache[size_t(place)] = nan_bits(DType::kBFloat16);
  ReferenceResult result;
  ASSERT_OK(reference_attention(data_.problem, host_.tensors(data_), &result));
  for (int query = 0; query < 3; ++query) {
    for (int head = 0; head < 70; ++head) {
      EXPECT_EQ(std::isnan(result.lse[size_t(head * 3 + query)]), query == 2);
      EXPECT_EQ(std::isnan(result.out[size_t(query * 70 + head) * 512]), query == 2);
    }
  }
}

constexpr CacheFormat kQuantised[] = {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor,
                                      CacheFormat::kInt8Tile128};

TEST(ReferenceOnQuantised, EqualsPlainLoops) {
  for (const CacheFormat format : kQuantised) {
    for (int i = 0; i < 12; ++i) {
      DecodeCase spec;
      spec.cache_format = format;
      spec.scale_rule = i % 2 == 0 ? ScaleRule::kLargest : ScaleRule::kPowerOfTwo;
      spec.data = static_cast<DataKind>(i % 4);
      spec.lengths = {i, 0, 64, 129};
      spec.seqlen_q = 1 + i % 3;
      spec.num_heads_q = 6;
      spec.num_heads_kv = 1 + i % 2;
      spec.causal = i % 3 != 0;
      spec.seed = static_cast<uint64_t>(i);
      if (format == CacheFormat::kFp8Tensor && i % 4 < 2) spec.dtype = DType::kFloat16;
      SCOPED_TRACE(spec.name());
      const DataSet data = make_data_set(spec);
      HostTensors host = generate(data);
      ReferenceResult result;
      ASSERT_OK(reference_attention(data.problem, host.tensors(data), &result));
      expect_equals_plain(data, host, result);
      if (HasFatalFailure()) return;
    }
  }
}

// With scales that are powers of two, a 16-bit cache can hold the same values, and the results are
// equal.
TEST(ReferenceOnQuantised, EqualsThe16BitCacheOfTheSameValues) {
  for (const CacheFormat format : kQuantised) {
    for (const bool strided : {false, true}) {
      DecodeCase spec;
      spec.lengths = {300, 0, 17};
      spec.seqlen_q = 2;
      spec.num_heads_q = 6;
      spec.num_heads_kv = 2;
      spec.causal = true;
      spec.page_size = 32;
      spec.data = DataKind::kNeedles;
      spec.strided = strided;
      spec.scale_rule = ScaleRule::kPowerOfTwo;
      spec.cache_format = format;
      SCOPED_TRACE(spec.name());
      const DataSet data = make_data_set(spec);
      HostTensors host = generate(data);
      spec.cache_format = CacheFormat::k16Bit;
      const DataSet plain_data = make_data_set(spec);
      HostTensors plain = generate(plain_data);
      const Tensors from = with_strides(data.problem, host.tensors(data));
      const Tensors to = with_strides(plain_data.problem, plain.tensors(plain_data));
      int64_t changed = 0;
      for (int b = 0; b < 3; ++b) {
        for (int token = 0; token < spec.lengths[size_t(b)]; ++token) {
          for (int head = 0; head < 2; ++head) {
            std::array<double, 576> values;
            const int64_t byte = cache_place(data.problem, from, from.table_row(b), token, head);
            dequantise_row(data.problem, &host.quantised_cache[size_t(byte)], values.data());
            const int64_t place = cache_place(plain_data.problem, to, to.table_row(b), token, head);
            for (size_t c = 0; c < 576; ++c) {
              const uint16_t bits = round_to_bfloat16(float(values[c]));
              ASSERT_EQ(test::value_of(DType::kBFloat16, bits), values[c]);
              changed += plain.kv_cache[size_t(place) + c] != bits;
              plain.kv_cache[size_t(place) + c] = bits;
            }
          }
        }
      }
      EXPECT_GT(changed, 1000) << "quantising has changed the values";
      ReferenceResult result, expected;
      ASSERT_OK(reference_attention(data.problem, host.tensors(data), &result));
      ASSERT_OK(reference_attention(plain_data.problem, plain.tensors(plain_data), &expected));
      EXPECT_EQ(result.out, expected.out);
      EXPECT_EQ(result.lse, expected.lse);
      EXPECT_EQ(result.out_size, expected.out_size);
      for (size_t i = 0; i < expected.row_size.size(); ++i) {
        ASSERT_EQ(result.row_size[i].logit, expected.row_size[i].logit);
        ASSERT_EQ(result.row_size[i].rounding, expected.row_size[i].rounding);
      }
    }
  }
}

// The data set's unused rows are NaN in every code, scale and rotary column, and so are its gaps.
// Here they hold other numbers, and the result is the same.
TEST(ReferenceOnQuantised, NothingOutsideASequenceIsRead) {
  for (const CacheFormat format : kQuantised) {
    DecodeCase spec;
    spec.lengths = {70, 0, 3};
    spec.num_heads_q = 4;
    spec.num_heads_kv = 2;
    spec.strided = true;
    spec.cache_format = format;
    const DataSet data = make_data_set(spec);
    HostTensors host = generate(data);
    ReferenceResult expected, result;
    ASSERT_OK(reference_attention(data.problem, host.tensors(data), &expected));
    for (const double x : expected.out) ASSERT_TRUE(std::isfinite(x));
    std::vector<bool> used(host.quantised_cache.size());
    const Tensors tensors = with_strides(data.problem, host.tensors(data));
    for (int b = 0; b < 3; ++b) {
      for (int token = 0; token < spec.lengths[size_t(b)]; ++token) {
        for (int head = 0; head < 2; ++head) {
          const int64_t place =
              cache_place(data.problem, tensors, tensors.table_row(b), token, head);
          std::fill_n(used.begin() + place, data.problem.cache_row_bytes(), true);
        }
      }
    }
    for (size_t i = 0; i < used.size(); ++i) {
      if (used[i]) continue;
      ASSERT_EQ(host.quantised_cache[i], 0xff);
      host.quantised_cache[i] = 0x40;
    }
    ASSERT_OK(reference_attention(data.problem, host.tensors(data), &result));
    EXPECT_EQ(result.out, expected.out);
    EXPECT_EQ(result.lse, expected.lse);
  }
}

// A NaN in the last token, in a code, a scale or a rotary column, is seen by the last query token
// alone, and by all of its columns, as in 16 bits.
TEST(ReferenceOnQuantised, NaNReachesTheRowsThatSeeIt) {
  const auto spoil = [](CacheFormat format, uint8_t* row, int how) {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    if (how == 0 && format != CacheFormat::kInt8Tile128) row[200] = 0xFF;
    if (how == 0 && format == CacheFormat::kInt8Tile128) return false;
    if (how == 1 && format == CacheFormat::kFp8Tensor) row[575] = 0x7F;
    if (how == 1 && format != CacheFormat::kFp8Tensor) row[655] = row[654] = 0xFF;
    if (how == 2 && format == CacheFormat::kFp8Tensor) return false;
    if (how == 2) std::memcpy(row + 524, &kNaN, 4);
    return true;
  };
  int tried = 0;
  for (const CacheFormat format : kQuantised) {
    for (const int how : {0, 1, 2}) {
      DecodeCase spec;
      spec.lengths = {70, 65};
      spec.seqlen_q = 3;
      spec.num_heads_q = 4;
      spec.causal = true;
      spec.cache_format = format;
      const DataSet data = make_data_set(spec);
      HostTensors host = generate(data);
      const Tensors tensors = with_strides(data.problem, host.tensors(data));
      const int64_t place = cache_place(data.problem, tensors, tensors.table_row(0), 69, 0);
      if (!spoil(format, &host.quantised_cache[size_t(place)], how)) continue;
      ++tried;
      ReferenceResult result;
      ASSERT_OK(reference_attention(data.problem, host.tensors(data), &result));
      for (size_t row = 0; row < 2 * 3 * 4; ++row) {
        const bool sees = row / 4 == 2;
        const size_t b = row / 12, query = row / 4 % 3, head = row % 4;
        EXPECT_EQ(std::isnan(result.lse[(b * 4 + head) * 3 + query]), sees);
        for (const size_t column : {0, 200, 511}) {
          EXPECT_EQ(std::isnan(result.out[row * 512 + column]), sees) << column;
        }
      }
    }
  }
  EXPECT_EQ(tried, 7);
}

TEST_F(ReferenceOnNeedles, SequencesMayShareAPage) {
  // Sequence 2 (64 tokens) takes the first page of sequence 0. Its result is that of a sequence which
  // has this page for its own.
  const int64_t columns = data_.problem.max_pages_per_seq;
  data_.block_table[size_t(2 * columns)] = data_.block_table[0];
  ReferenceResult result;
  ASSERT_OK(reference_attention(data_.problem, host_.tensors(data_), &result));
  expect_equals_plain(data_, host_, result);
}

TEST_F(ReferenceOnNeedles, BadInputIsRefusedAndResultUntouched) {
  const auto refused = [&](StatusCode code, const std::string& message,
                           const std::function<void(Problem&, Tensors&)>& spoil,
                           std::vector<QueryRow> rows = {{0, 0}}) {
    Problem problem = data_.problem;
    Tensors tensors = host_.tensors(data_);
    spoil(problem, tensors);
    ReferenceResult result{{1, 2}, {3}};
    const Status status = reference_attention_rows(problem, tensors, rows, &result);
    EXPECT_EQ(status.code(), code);
    EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
    EXPECT_EQ(result.out, (std::vector<double>{1, 2}));
    EXPECT_EQ(result.lse, (std::vector<double>{3}));
    if (rows.size() == 1 && rows[0].sequence == 0 && rows[0].query == 0) {
      EXPECT_EQ(reference_attention(problem, tensors, &result).message(), status.message());
      EXPECT_EQ(result.lse, (std::vector<double>{3}));
    }
  };
  const auto nothing = [](Problem&, Tensors&) {};
  const StatusCode invalid = StatusCode::kInvalidArgument;
  const StatusCode out_of_range = StatusCode::kOutOfRange;
  refused(invalid, "batch = -1", [](Problem& p, Tensors&) { p.batch = -1; });
  refused(invalid, "q is null", [](Problem&, Tensors& t) { t.q = nullptr; });
  refused(invalid, "block_table", [](Problem&, Tensors& t) {
    t.block_table =
        reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(t.block_table) + 2);
  });
  refused(invalid, "q stride of num_heads_q = 577",
          [](Problem&, Tensors& t) { t.q_strides.head = 577; });
  refused(out_of_range, "rows[1].sequence = 6 must be in [0, batch = 6)", nothing,
          {{0, 0}, {6, 0}});
  refused(out_of_range, "rows[0].sequence = -1", nothing, {{-1, 0}});
  refused(out_of_range, "rows[0].query = 3 must be in [0, seqlen_q = 3)", nothing, {{0, 3}});
  refused(out_of_range, "rows[0].query = -1", nothing, {{0, -1}});
  const std::vector<int32_t> long_lengths(6, 10000);
  refused(out_of_range, "seqlens_k[0] = 10000",
          [&](Problem&, Tensors& t) { t.seqlens_k = long_lengths.data(); });
  const std::vector<int32_t> bad_table(data_.block_table.size(), kGarbagePage);
  refused(out_of_range, "block_table[0, 0] = 2147480000",
          [&](Problem&, Tensors& t) { t.block_table = bad_table.data(); });
  ReferenceResult result;
  EXPECT_EQ(reference_attention(data_.problem, host_.tensors(data_), nullptr).message(),
            "result is null");
  EXPECT_EQ(reference_attention(data_.problem, host_.tensors(data_), &result, -1).message(),
            "num_threads = -1 must be at least 0");
}

}  // namespace
}  // namespace mla
