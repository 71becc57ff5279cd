#include "reference/testing/data_generator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "reference/attention.h"
#include "tests/reference/plain_attention.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

using test::value_of;

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};

TEST(Elements, GoldenBits) {
  // Evaluated from the definitions in exact rational arithmetic, apart from this code. A device
  // must make the same.
  struct Golden {
    uint64_t seed;
    int sequence;
    int64_t position;
    int head, column;
    uint16_t bf16, fp16;
  };
  constexpr Golden kQ[] = {{0, 0, 0, 0, 0, 0xBD53, 0xAA97},
                           {1, 2, 1, 127, 575, 0x3D48, 0x2A41},
                           {~uint64_t{0}, 63, 3, 5, 511, 0x3E0E, 0x3070},
                           {12345, 127, 0, 1, 100, 0x3C6D, 0x2369}};
  constexpr Golden kKv[] = {{0, 0, 0, 0, 0, 0xBDD0, 0xAE7C},
                            {1, 2, 4095, 7, 575, 0xBC9D, 0xA4E8},
                            {~uint64_t{0}, 63, 262143, 0, 511, 0xBE00, 0xB000},
                            {12345, 127, 5'000'000'000, 1, 100, 0xBC8E, 0xA471}};
  for (const DType dtype : kDTypes) {
    const bool is_bf16 = dtype == DType::kBFloat16;
    for (const Golden& g : kQ) {
      EXPECT_EQ(q_bits(g.seed, dtype, DataKind::kFlat, g.sequence, static_cast<int>(g.position),
                       g.head, g.column),
                is_bf16 ? g.bf16 : g.fp16);
    }
    for (const Golden& g : kKv) {
      EXPECT_EQ(kv_bits(g.seed, dtype, DataKind::kFlat, g.sequence, g.position, g.head, g.column),
                is_bf16 ? g.bf16 : g.fp16);
    }
    constexpr uint16_t kValues[2][8] = {
        {0x7100, 0xF180, 0x7100, 0x7180, 0x8045, 0xF180, 0x7180, 0x7180},
        {0x77FF, 0xFBFF, 0x77FF, 0x7BFF, 0x8090, 0xFBFF, 0x7BFF, 0x7BFF}};
    for (int c = 0; c < 8; ++c) {
      EXPECT_EQ(kv_bits(9, dtype, DataKind::kExtremeValues, 1, 2, 0, c), kValues[!is_bf16][c]);
    }
    constexpr int kLevelAndRotation[4][2] = {{14, 18}, {49, 58}, {52, 2}, {11, 62}};
    for (int t = 0; t < 4; ++t) {
      for (int c = 0; c < 64; ++c) {
        const bool positive = (c + kLevelAndRotation[t][1]) % 64 < kLevelAndRotation[t][0];
        EXPECT_EQ(value_of(dtype, kv_bits(8, dtype, DataKind::kExtremeLogits, 1, t, 0, 512 + c)),
                  positive ? 8 : -8);
      }
    }
  }
}

// A tile is the flat one times one of 17 powers of two, which differs from token to token, tile to tile
// and head to head.
TEST(Elements, ScaledTilesAreFlatOnesTimesAPowerOfTwo) {
  std::map<int, int> exponents;
  int same_as_before = 0, same_as_first_tile = 0, same_as_other_head = 0;
  std::array<int, 4> before{};
  for (int token = 0; token < 340; ++token) {
    std::array<int, 4> here[2];
    for (int head = 0; head < 2; ++head) {
      for (int column = 0; column < 576; ++column) {
        const auto value = [&](DType dtype, DataKind kind) {
          return value_of(dtype, kv_bits(3, dtype, kind, 1, token, head, column));
        };
        const double flat = value(DType::kBFloat16, DataKind::kFlat);
        const double scaled = value(DType::kBFloat16, DataKind::kScaledTiles);
        if (column >= 512) {
          ASSERT_EQ(scaled, flat);
          continue;
        }
        int& exponent = here[head][size_t(column / 128)];
        if (column % 128 == 0) exponent = std::ilogb(scaled) - std::ilogb(flat);
        ASSERT_EQ(scaled, std::ldexp(flat, exponent)) << token << " " << column;
        const double fp16 = value(DType::kFloat16, DataKind::kScaledTiles);
        ASSERT_NEAR(fp16, scaled, std::abs(scaled) * 0x1p-8 + 0x1p-24);
      }
    }
    for (size_t tile = 0; tile < 4; ++tile) {
      ++exponents[here[0][tile]];
      same_as_before += here[0][tile] == before[tile];
      same_as_first_tile += tile > 0 && here[0][tile] == here[0][0];
      same_as_other_head += here[0][tile] == here[1][tile];
    }
    before = here[0];
  }
  ASSERT_EQ(exponents.size(), 17u);
  for (const auto& [exponent, count] : exponents) {
    EXPECT_LE(std::abs(exponent), 8);
    EXPECT_NEAR(count, 80, 40);  // four deviations
  }
  for (const int count : {same_as_before, same_as_first_tile, same_as_other_head}) {
    EXPECT_LT(count, 120);
  }
}

TEST(Elements, GrowingValuesAreFlatOnesTimesAPowerOfTwo) {
  for (const DType dtype : kDTypes) {
    for (const std::array<int, 3>& one : {std::array{0, 0, -4},
                                          {0, 63, -4},
                                          {0, 64, 0},
                                          {2, 128, 4},
                                          {2, 447, 20},
                                          {2, 448, 24},
                                          {0, 1 << 29, 24},
                                          {1, 0, 24},
                                          {1, 64, 20},
                                          {3, 447, 0},
                                          {3, 448, -4}}) {
      const int sequence = one[0], token = one[1];
      const int exponent = dtype == DType::kFloat16 ? std::min(one[2], 16) : one[2];
      for (int column = 0; column < 576; ++column) {
        const auto value = [&](DataKind kind) {
          return value_of(dtype, kv_bits(3, dtype, kind, sequence, token, 1, column));
        };
        const double factor = column < 512 ? std::exp2(exponent) : 1;
        // In fp16 a small flat value has fewer bits than its multiple.
        ASSERT_NEAR(value(DataKind::kGrowingValues), factor * value(DataKind::kFlat),
                    dtype == DType::kBFloat16 ? 0 : factor * 0x1p-13)
            << token << " " << column;
        EXPECT_EQ(value_of(dtype, q_bits(3, dtype, DataKind::kGrowingValues, 0, 0, 0, column)) == 0,
                  column < 512);
      }
    }
  }
}

TEST(Elements, NaNIsNaN) {
  for (const DType dtype : kDTypes) EXPECT_TRUE(std::isnan(value_of(dtype, nan_bits(dtype))));
}

TEST(Elements, MomentsOfTheNormal) {
  // 2^22 draws: the standard error of the mean is 4.9e-4, of the variance 7e-4, of the
  // kurtosis 2.4e-3.
  constexpr int kRows = 8192;
  constexpr int kColumns = 512;
  double sum[5] = {};
  int beyond3 = 0, beyond4 = 0;
  double largest = 0;
  for (int row = 0; row < kRows; ++row) {
    const uint64_t key = generator::row_key(7, generator::Stream::kCache, 1, row, 0);
    for (int column = 0; column < kColumns; ++column) {
      const double z = generator::normal(key, column) / 65536.0;
      ASSERT_EQ(static_cast<float>(generator::normal(key, column)) * (0.1f / 65536),
                generator::normal_tenth(key, column));
      for (int n = 1; n <= 4; ++n) sum[n] += std::pow(z, n);
      beyond3 += std::abs(z) > 3;
      beyond4 += std::abs(z) > 4;
      largest = std::max(largest, std::abs(z));
    }
  }
  constexpr double kCount = double{kRows} * kColumns;
  EXPECT_NEAR(sum[1] / kCount, 0, 2.5e-3);
  EXPECT_NEAR(sum[2] / kCount, 1, 3.5e-3);
  EXPECT_NEAR(sum[3] / kCount, 0, 1e-2);
  EXPECT_NEAR(sum[4] / kCount, 3 - 0.1, 2e-2);
  EXPECT_NEAR(beyond3 / kCount, 2.014e-3, 1.2e-4);
  EXPECT_NEAR(beyond4 / kCount, 1.705e-5, 1.1e-5);
  EXPECT_LT(largest, 6);
}

TEST(Elements, StreamsAreIndependent) {
  // Correlation of two streams of 2^16 values that differ in one coordinate: 0 +- 0.004.
  const auto stream = [](uint64_t seed, bool q, int sequence, int head, int first_row) {
    std::vector<double> values;
    for (int row = 0; row < 128; ++row) {
      for (int column = 0; column < 512; ++column) {
        const uint16_t bits = q ? q_bits(seed, DType::kBFloat16, DataKind::kFlat, sequence,
                                         first_row + row, head, column)
                                : kv_bits(seed, DType::kBFloat16, DataKind::kFlat, sequence,
                                          first_row + row, head, column);
        values.push_back(value_of(DType::kBFloat16, bits));
      }
    }
    return values;
  };
  const auto correlation = [](const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0) /
           std::sqrt(std::inner_product(a.begin(), a.end(), a.begin(), 0.0) *
                     std::inner_product(b.begin(), b.end(), b.begin(), 0.0));
  };
  const std::vector<double> base = stream(0, false, 0, 0, 0);
  EXPECT_NEAR(correlation(base, base), 1, 1e-12);
  EXPECT_NEAR(correlation(base, stream(1, false, 0, 0, 0)), 0, 0.02) << "seed";
  EXPECT_NEAR(correlation(base, stream(0, true, 0, 0, 0)), 0, 0.02) << "tensor";
  EXPECT_NEAR(correlation(base, stream(0, false, 1, 0, 0)), 0, 0.02) << "sequence";
  EXPECT_NEAR(correlation(base, stream(0, false, 0, 1, 0)), 0, 0.02) << "head";
  EXPECT_NEAR(correlation(base, stream(0, false, 0, 0, 1)), 0, 0.02) << "token";
  std::vector<double> shifted = base;
  std::rotate(shifted.begin(), shifted.begin() + 1, shifted.end());
  EXPECT_NEAR(correlation(base, shifted), 0, 0.02) << "column";
}

TEST(DecodeCaseName, SaysEverything) {
  DecodeCase spec;
  spec.batch = 2;
  spec.seqlen_k = 140;
  spec.num_heads_q = 64;
  spec.num_heads_kv = 2;
  spec.variable_lengths = spec.causal = true;
  spec.data = DataKind::kNeedles;
  spec.seed = 7;
  EXPECT_EQ(spec.name(), "bf16 b=2 s_q=1 s_k=140 h_q=64 h_kv=2 var causal needles seed=7");
  spec.empty_fraction = 0.5;
  spec.dtype = DType::kFloat16;
  spec.causal = false;
  spec.data = DataKind::kExtremeLogits;
  EXPECT_EQ(spec.name(),
            "fp16 b=2 s_q=1 s_k=140 h_q=64 h_kv=2 var empty=0.5 extreme-logits seed=7");
  spec.lengths = {1, 20};
  spec.data = DataKind::kFlat;
  EXPECT_EQ(spec.name(), "fp16 b=2 s_q=1 s_k=140 h_q=64 h_kv=2 lengths=1,20 flat seed=7");
  spec.lengths.assign(9, 3);
  spec.data = DataKind::kExtremeValues;
  EXPECT_EQ(spec.name(),
            "fp16 b=2 s_q=1 s_k=140 h_q=64 h_kv=2 lengths=3,3,3,3,3,3,3,3,... extreme-values "
            "seed=7");
}

TEST(DecodeCaseName, SaysTheCacheFormat) {
  DecodeCase spec;
  spec.num_heads_q = 16;
  spec.lengths = {512, 512};
  spec.cache_format = CacheFormat::kFp8Tile128;
  spec.scale_rule = ScaleRule::kPowerOfTwo;
  const std::string start = "bf16 b=1 s_q=1 s_k=64 h_q=16 h_kv=1 lengths=512,512 ";
  EXPECT_EQ(spec.name(), start + "fp8_tile128 pow2 flat seed=0");
  EXPECT_EQ(shape_name(make_data_set(spec)), "h16_q1_b2_k512_fp8_tile128");
  spec.cache_format = CacheFormat::kFp8Tensor;
  spec.scale_rule = ScaleRule::kLargest;
  spec.cache_scale = 0.25;
  spec.dtype = DType::kFloat16;
  EXPECT_EQ(spec.name(), "fp16" + start.substr(4) + "fp8_tensor cache_scale=0.25 flat seed=0");
  EXPECT_EQ(shape_name(make_data_set(spec)), "h16_q1_b2_k512_fp8_tensor_fp16");
}

TEST(Lengths, FixedVariableEmptyAndGiven) {
  DecodeCase spec;
  spec.batch = 2000;
  spec.seqlen_q = 4;
  spec.seqlen_k = 1000;
  const auto lengths = [&] { return make_data_set(spec).seqlens_k; };
  EXPECT_EQ(lengths(), std::vector<int32_t>(2000, 1000));

  spec.variable_lengths = true;
  const std::vector<int32_t> variable = lengths();
  const double mean = std::accumulate(variable.begin(), variable.end(), 0.0) / 2000;
  EXPECT_NEAR(mean, 1004, 60);  // 1000, and 4 more because lengths below seqlen_q are raised to it
  EXPECT_EQ(*std::min_element(variable.begin(), variable.end()), 4);
  EXPECT_GT(*std::max_element(variable.begin(), variable.end()), 2000);
  EXPECT_EQ(variable, lengths());
  spec.seed = 1;
  EXPECT_NE(variable, lengths());
  spec.seed = 0;

  spec.empty_fraction = 0.5;
  const std::vector<int32_t> some_empty = lengths();
  EXPECT_NEAR(double(std::count(some_empty.begin(), some_empty.end(), 0)), 1000, 120);
  for (size_t b = 0; b < 2000; ++b) {
    if (some_empty[b] != 0) {
      EXPECT_EQ(some_empty[b], variable[b]);
    }
  }
  spec.empty_fraction = 1;
  const DataSet empty = make_data_set(spec);
  EXPECT_EQ(empty.total_tokens(), 0);
  EXPECT_EQ(empty.problem.num_pages, kSparePages);
  EXPECT_EQ(empty.problem.max_pages_per_seq, 1);

  spec.lengths = {3, 0, 200};
  const DataSet given = make_data_set(spec);
  EXPECT_EQ(given.seqlens_k, spec.lengths);
  EXPECT_EQ(given.problem.batch, 3);
  EXPECT_EQ(given.spec.batch, 3);
  EXPECT_EQ(given.total_tokens(), 203);
}

TEST(Lengths, HugeCasesAreRefusedOrDescribedIn64Bits) {
  DecodeCase spec;
  spec.lengths.assign(128, 262144);
  const DataSet data = make_data_set(spec);
  EXPECT_OK(validate(data.problem));
  EXPECT_EQ(data.total_tokens(), int64_t{128} * 262144);
  EXPECT_GT(data.problem.kv_elements(), int64_t{1} << 34);

  spec.lengths.assign(128, INT32_MAX);
  EXPECT_EQ(validate(make_data_set(spec).problem).message(), "num_pages = 0 must be at least 1");
  spec.lengths = {-1};
  EXPECT_FALSE(validate(make_data_set(spec).problem).ok());
  spec.lengths.clear();
  spec.batch = -5;
  EXPECT_EQ(validate(make_data_set(spec).problem).message(), "batch = -5 must be at least 0");
  spec.batch = 1;
  spec.page_size = 48;
  EXPECT_EQ(validate(make_data_set(spec).problem).message(),
            "page_size = 48 must be 16, 32, 64, 128 or 256");
}

TEST(Lengths, AnEmptyBatchHasNoTokens) {
  DecodeCase spec;
  spec.batch = 0;
  const DataSet data = make_data_set(spec);
  EXPECT_OK(validate(data.problem));
  HostTensors host = generate(data);
  EXPECT_TRUE(host.q.empty());
  ReferenceResult result;
  EXPECT_OK(reference_attention(data.problem, host.tensors(data), &result));
  EXPECT_TRUE(result.out.empty());
}

// A seed gives the same values for every page size and all strides. Between rows that are apart lie gaps.
TEST(Layouts, HoldTheSameValues) {
  DecodeCase spec;
  spec.seqlen_q = 2;
  spec.num_heads_q = 6;
  spec.num_heads_kv = 2;
  spec.data = DataKind::kNeedles;
  spec.lengths = {70, 0, 300, 17};
  const DataSet plain_data = make_data_set(spec);
  HostTensors plain = generate(plain_data);
  const Tensors expected = with_strides(plain_data.problem, plain.tensors(plain_data));
  for (const int page_size : {16, 32, 64, 128, 256}) {
    for (const bool strided : {false, true}) {
      spec.page_size = page_size;
      spec.strided = strided;
      SCOPED_TRACE(spec.name());
      const DataSet data = make_data_set(spec);
      const Problem& problem = data.problem;
      HostTensors host = generate(data);
      const Tensors tensors = with_strides(problem, host.tensors(data));
      ASSERT_OK(validate(problem, host.tensors(data)));
      ASSERT_OK(validate_paging(problem, tensors.block_table, tensors.seqlens_k,
                                tensors.block_table_stride));
      const auto row_of = [&](const void* tensor, int64_t place) {
        return static_cast<const uint16_t*>(tensor) + place;
      };
      for (int b = 0; b < 4; ++b) {
        ASSERT_EQ(tensors.seqlens_k[b], spec.lengths[size_t(b)]);
        for (int head = 0; head < 6; ++head) {
          const uint16_t* row = row_of(tensors.q, tensors.q_place(b, 1, head));
          ASSERT_TRUE(std::equal(row, row + 576, row_of(expected.q, expected.q_place(b, 1, head))));
        }
        // Needles are drawn by pages, so only rows without them are the same for all page sizes.
        for (int token = 0; token < spec.lengths[size_t(b)]; ++token) {
          for (int head = 0; head < 2; ++head) {
            const uint16_t* row = row_of(
                tensors.kv_cache, cache_place(problem, tensors, tensors.table_row(b), token, head));
            ASSERT_TRUE(std::equal(
                row, row + 575,
                row_of(expected.kv_cache, cache_place(plain_data.problem, expected,
                                                      expected.table_row(b), token, head))));
          }
        }
      }
      const auto count_numbers = [](const std::vector<uint16_t>& buffer, DType dtype) {
        return int64_t(buffer.size()) - std::count(buffer.begin(), buffer.end(), nan_bits(dtype));
      };
      EXPECT_EQ(count_numbers(host.q, spec.dtype), problem.q_elements());
      EXPECT_EQ(count_numbers(host.kv_cache, spec.dtype), (70 + 300 + 17) * 2 * 576);
      EXPECT_EQ(int64_t(host.q.size()) > problem.q_elements(), strided);
      // The results are the same, too, if the page size is: needles depend on it.
      ReferenceResult here, there;
      DecodeCase contiguous = spec;
      contiguous.strided = false;
      const DataSet other_data = make_data_set(contiguous);
      HostTensors other = generate(other_data);
      ASSERT_OK(reference_attention(problem, host.tensors(data), &here));
      ASSERT_OK(reference_attention(other_data.problem, other.tensors(other_data), &there));
      EXPECT_EQ(here.out, there.out);
      EXPECT_EQ(here.lse, there.lse);
    }
  }
}

// The rows of a quantised cache are those of the same case's 16-bit cache, quantised; all else is 0xff.
TEST(Quantised, HoldsTheValuesOfThe16BitCache) {
  for (const CacheFormat format :
       {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor, CacheFormat::kInt8Tile128}) {
    for (const DataKind kind : kDataKinds) {
      for (const bool strided : {false, true}) {
        DecodeCase spec;
        spec.dtype = format == CacheFormat::kFp8Tensor ? DType::kFloat16 : DType::kBFloat16;
        spec.num_heads_q = 6;
        spec.num_heads_kv = 2;
        spec.data = kind;
        spec.lengths = {70, 0, 300, 17};
        spec.page_size = 32;
        spec.strided = strided;
        spec.scale_rule = strided ? ScaleRule::kPowerOfTwo : ScaleRule::kLargest;
        const DataSet plain_data = make_data_set(spec);
        HostTensors plain = generate(plain_data);
        spec.cache_format = format;
        SCOPED_TRACE(spec.name());
        const DataSet data = make_data_set(spec);
        const Problem& problem = data.problem;
        HostTensors host = generate(data);
        ASSERT_OK(validate(problem, host.tensors(data)));
        ASSERT_EQ(problem.cache_format, format);
        EXPECT_TRUE(host.kv_cache.empty());
        EXPECT_EQ(host.q, plain.q);
        EXPECT_EQ(data.block_table, plain_data.block_table);
        EXPECT_EQ(int64_t(host.quantised_cache.size()) > problem.kv_elements(), strided);
        const Tensors here = with_strides(problem, host.tensors(data));
        const Tensors there = with_strides(plain_data.problem, plain.tensors(plain_data));
        ASSERT_EQ(here.kv_cache, host.quantised_cache.data());
        std::vector<bool> used(host.quantised_cache.size());
        bool saturates = false;
        for (int b = 0; b < 4; ++b) {
          for (int token = 0; token < spec.lengths[size_t(b)]; ++token) {
            for (int head = 0; head < 2; ++head) {
              const int64_t from =
                  cache_place(plain_data.problem, there, there.table_row(b), token, head);
              float values[576];
              for (int c = 0; c < 576; ++c) {
                values[c] = float(value_of(spec.dtype, plain.kv_cache[size_t(from + c)]));
                saturates |= std::abs(values[c]) > 448.001f * problem.cache_scale;
              }
              std::vector<uint8_t> row(size_t(problem.cache_row_bytes()));
              quantise_row(problem, spec.scale_rule, values, row.data());
              const int64_t place = cache_place(problem, here, here.table_row(b), token, head);
              ASSERT_TRUE(std::equal(row.begin(), row.end(), host.quantised_cache.begin() + place));
              std::fill_n(used.begin() + place, row.size(), true);
            }
          }
        }
        for (size_t i = 0; i < used.size(); ++i) {
          ASSERT_TRUE(used[i] || host.quantised_cache[i] == 0xff) << i;
        }
        if (format == CacheFormat::kFp8Tensor) {
          EXPECT_FALSE(saturates);
          spec.cache_scale = 0.5;
          EXPECT_EQ(make_data_set(spec).problem.cache_scale, 0.5f);
        }
        for (const int threads : {1, 5}) {
          EXPECT_EQ(generate(data, threads).quantised_cache, host.quantised_cache);
        }
      }
    }
  }
}

// A row of 0xff is NaN in each of its parts.
TEST(Quantised, UnusedRowsAreNaN) {
  for (const CacheFormat format :
       {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor, CacheFormat::kInt8Tile128}) {
    Problem problem;
    problem.cache_format = format;
    const std::vector<uint8_t> row(656, 0xff);
    for (int c = 0; c < 576; ++c) {
      EXPECT_TRUE(std::isnan(dequantise_value(problem, row.data(), c))) << c;
    }
  }
}

TEST(Layouts, OutputsAreGatheredAndGapsWatched) {
  DecodeCase spec;
  spec.seqlen_q = 2;
  spec.num_heads_q = 3;
  spec.lengths = {5, 6};
  spec.strided = true;
  const DataSet data = make_data_set(spec);
  const Layout layout = data.layout();
  std::vector<uint16_t> out(size_t(layout.out), 0xffff);
  std::vector<float> lse(size_t(layout.lse), std::bit_cast<float>(0xffffffff));
  for (int b = 0; b < 2; ++b) {
    for (int query = 0; query < 2; ++query) {
      for (int head = 0; head < 3; ++head) {
        const int row = (b * 2 + query) * 3 + head;
        std::fill_n(out.begin() + layout.strides.out_place(b, query, head), 512, uint16_t(row));
        lse[size_t(layout.strides.lse_place(b, query, head))] = float((b * 3 + head) * 2 + query);
      }
    }
  }
  const std::vector<uint16_t> rows = gather_out(data.problem, layout, out);
  const std::vector<float> sums = gather_lse(data.problem, layout, lse);
  for (size_t i = 0; i < rows.size(); ++i) ASSERT_EQ(rows[i], i / 512);
  for (size_t i = 0; i < sums.size(); ++i) ASSERT_EQ(sums[i], float(i));
  const auto hold = [&] {
    return gaps_hold(data.problem, layout, out, 0xffff, lse, std::bit_cast<float>(0xffffffff));
  };
  EXPECT_TRUE(hold());
  out[size_t(layout.strides.out_place(0, 0, 1)) - 1] = 0;  // before a row
  EXPECT_FALSE(hold());
  out[size_t(layout.strides.out_place(0, 0, 1)) - 1] = 0xffff;
  lse.back() = 0;
  EXPECT_FALSE(hold());
}

class DataSets : public testing::TestWithParam<std::tuple<DType, DataKind, uint64_t>> {
 protected:
  DataSets() {
    spec_.dtype = std::get<0>(GetParam());
    spec_.data = std::get<1>(GetParam());
    spec_.seed = std::get<2>(GetParam());
    spec_.seqlen_q = 2;
    spec_.num_heads_q = 6;
    spec_.num_heads_kv = 3;
    spec_.lengths = {130, 0, 64, 1, 900, 63, 65};
    data_ = make_data_set(spec_);
    host_ = generate(data_);
  }
  uint16_t kv_element(int64_t page, int64_t slot, int head, int column) const {
    return host_.kv_cache[size_t(((page * 64 + slot) * 3 + head) * 576 + column)];
  }
  DecodeCase spec_;
  DataSet data_;
  HostTensors host_;
};

TEST_P(DataSets, ProblemIsValidAndTensorsAreComplete) {
  const Problem& problem = data_.problem;
  const Tensors tensors = host_.tensors(data_);
  EXPECT_OK(validate(problem, tensors));
  EXPECT_OK(validate_paging(problem, tensors.block_table, tensors.seqlens_k));
  EXPECT_EQ(problem.dtype, spec_.dtype);
  EXPECT_EQ(problem.softmax_scale, spec_.seed % 2 == 0 ? 1.0f / 24 : 0.135234f);
  EXPECT_EQ(int64_t(host_.q.size()), problem.q_elements());
  EXPECT_EQ(int64_t(host_.kv_cache.size()), problem.kv_elements());
  EXPECT_EQ(int64_t(host_.out.size()), problem.out_elements());
  EXPECT_EQ(int64_t(host_.lse.size()), problem.lse_elements());
  EXPECT_EQ(int64_t(data_.block_table.size()), problem.block_table_elements());
  EXPECT_EQ(problem.max_pages_per_seq, 15 + 1);
  EXPECT_EQ(problem.num_pages, 3 + 1 + 1 + 15 + 1 + 2 + kSparePages);
}

TEST_P(DataSets, OutputsArePoisoned) {
  const auto all_nan = [&] {
    return std::all_of(host_.out.begin(), host_.out.end(),
                       [&](uint16_t bits) { return std::isnan(value_of(spec_.dtype, bits)); }) &&
           std::all_of(host_.lse.begin(), host_.lse.end(), [](float x) { return std::isnan(x); });
  };
  EXPECT_TRUE(all_nan());
  host_.out.back() = 0;
  host_.lse.back() = 0;
  EXPECT_FALSE(all_nan());
  host_.poison_outputs(spec_.dtype);
  EXPECT_TRUE(all_nan());
}

TEST_P(DataSets, PagesAreAPermutationAndUnusedSlotsGarbage) {
  const int columns = data_.problem.max_pages_per_seq;
  std::set<int32_t> seen;
  std::vector<int32_t> in_order;
  for (int b = 0; b < data_.problem.batch; ++b) {
    for (int slot = 0; slot < columns; ++slot) {
      const int32_t page = data_.block_table[size_t(int64_t{b} * columns + slot)];
      if (slot >= pages_for(spec_.lengths[size_t(b)], kDefaultPageSize)) {
        EXPECT_EQ(page, kGarbagePage);
        continue;
      }
      EXPECT_TRUE(seen.insert(page).second) << "page " << page << " twice";
      in_order.push_back(page);
      EXPECT_EQ(data_.page_sequence[size_t(page)], b);
      EXPECT_EQ(data_.page_position[size_t(page)], slot);
    }
  }
  EXPECT_FALSE(std::is_sorted(in_order.begin(), in_order.end()));
  int spare = 0;
  for (int32_t page = 0; page < data_.problem.num_pages; ++page) {
    if (seen.count(page) != 0) continue;
    ++spare;
    EXPECT_EQ(data_.page_sequence[size_t(page)], -1);
    EXPECT_EQ(data_.page_position[size_t(page)], -1);
  }
  EXPECT_EQ(spare, kSparePages);
}

TEST_P(DataSets, EveryElementIsWhatItsPlaceSays) {
  const auto [dtype, kind, seed] = GetParam();
  std::set<std::pair<int, int64_t>> needles;
  for (int b = 0; b < data_.problem.batch; ++b) {
    for (int n = data_.needle_begin[size_t(b)]; n < data_.needle_begin[size_t(b) + 1]; ++n) {
      needles.insert({b, data_.needles[size_t(n)].token});
    }
  }
  int64_t nan_rows = 0;
  for (int64_t page = 0; page < data_.problem.num_pages; ++page) {
    const int32_t sequence = data_.page_sequence[size_t(page)];
    for (int64_t slot = 0; slot < 64; ++slot) {
      const int64_t token = int64_t{data_.page_position[size_t(page)]} * 64 + slot;
      const bool used = sequence >= 0 && token < spec_.lengths[size_t(sequence)];
      nan_rows += !used;
      for (int head = 0; head < 3; ++head) {
        for (int column = 0; column < 576; ++column) {
          const uint16_t bits = kv_element(page, slot, head, column);
          if (!used) {
            ASSERT_TRUE(std::isnan(value_of(dtype, bits)));
          } else if (column != 575 || needles.count({sequence, token}) == 0) {
            ASSERT_EQ(bits, kv_bits(seed, dtype, kind, sequence, token, head, column));
            ASSERT_TRUE(std::isfinite(value_of(dtype, bits)));
          }
        }
      }
    }
  }
  EXPECT_EQ(nan_rows, int64_t{data_.problem.num_pages} * 64 - data_.total_tokens());
  size_t i = 0;
  for (int b = 0; b < data_.problem.batch; ++b) {
    for (int query = 0; query < 2; ++query) {
      for (int head = 0; head < 6; ++head) {
        for (int column = 0; column < 576; ++column) {
          ASSERT_EQ(host_.q[i++], q_bits(seed, dtype, kind, b, query, head, column));
        }
      }
    }
  }
}

TEST_P(DataSets, SameOnAnyNumberOfThreads) {
  for (const int threads : {1, 2, 5}) {
    const HostTensors again = generate(make_data_set(spec_), threads);
    EXPECT_EQ(again.q, host_.q);
    EXPECT_EQ(again.kv_cache, host_.kv_cache);
  }
}

TEST_P(DataSets, SeedsDiffer) {
  DecodeCase other = spec_;
  other.seed += 2;
  const DataSet data = make_data_set(other);
  EXPECT_NE(data.block_table, data_.block_table);
  const HostTensors host = generate(data);
  EXPECT_NE(host.kv_cache, host_.kv_cache);
  EXPECT_NE(host.q, host_.q);
}

INSTANTIATE_TEST_SUITE_P(Kinds, DataSets,
                         testing::Combine(testing::ValuesIn(kDTypes), testing::ValuesIn(kDataKinds),
                                          testing::Values(0, 1)));

class Needles : public testing::TestWithParam<std::tuple<DType, uint64_t>> {
 protected:
  DecodeCase spec(std::vector<int32_t> lengths) const {
    DecodeCase spec;
    spec.dtype = std::get<0>(GetParam());
    spec.seed = std::get<1>(GetParam());
    spec.data = DataKind::kNeedles;
    spec.lengths = std::move(lengths);
    return spec;
  }
};

TEST_P(Needles, AreWhereAndWhatTheyMustBe) {
  DecodeCase spec = this->spec({4096, 4096, 140, 140, 20, 20, 3, 1, 0, 100'000});
  spec.seqlen_q = 4;
  const DataSet data = make_data_set(spec);
  ASSERT_EQ(data.needle_begin.size(), spec.lengths.size() + 1);
  ASSERT_EQ(data.needle_begin.back(), int32_t(data.needles.size()));
  for (size_t b = 0; b < spec.lengths.size(); ++b) {
    SCOPED_TRACE(b);
    const int64_t length = spec.lengths[b];
    const std::vector<Needle> needles(data.needles.begin() + data.needle_begin[b],
                                      data.needles.begin() + data.needle_begin[b + 1]);
    std::set<int32_t> tokens, drawn_pages;
    double previous = b % 2 == 0 ? -3 : 3;
    for (size_t i = 0; i < needles.size(); ++i) {
      const Needle& needle = needles[i];
      if (i > 0) {
        ASSERT_GT(needle.token, needles[i - 1].token) << "sorted, no duplicates";
      }
      ASSERT_LT(needle.token, length);
      tokens.insert(needle.token);
      if (needle.token != 0 && needle.token < length - 4) drawn_pages.insert(needle.token / 64);
      // value = (ln s_k + d) / (8 scale), rounded. d rises from -2 to 2 along the sequence, or falls.
      const double value = value_of(spec.dtype, needle.bits);
      const double d = value * 8 * double(data.problem.softmax_scale) - std::log(double(length));
      ASSERT_LE(std::abs(d), 2.06);
      if (b % 2 == 0) {
        ASSERT_GT(d, previous);
      } else {
        ASSERT_LT(d, previous);
      }
      previous = d;
      if (needles.size() > 1) {
        const double exact =
            (-2 + 4.0 * double(i) / double(needles.size() - 1)) * (b % 2 == 0 ? 1 : -1);
        ASSERT_NEAR(d, exact, 0.06);
      }
    }
    if (length > 0) {
      EXPECT_TRUE(tokens.count(0));
    }
    for (int64_t t = std::max<int64_t>(length - 4, 0); t < length; ++t) {
      EXPECT_TRUE(tokens.count(int32_t(t))) << t;
    }
    const int64_t pages = pages_for(length, kDefaultPageSize);
    EXPECT_LE(int64_t(tokens.size()), 1 + 4 + std::min<int64_t>(14, pages));
    if (length >= 4096) {
      EXPECT_GE(drawn_pages.size(), 12u);  // a draw may fall on token 0 or among the last
      EXPECT_EQ(drawn_pages.size(), tokens.size() - 5) << "on different pages";
    }
  }
}

TEST_P(Needles, StandInColumn575OfEveryKvHead) {
  DecodeCase spec = this->spec({700, 90});
  spec.num_heads_q = spec.num_heads_kv = 2;
  const DataSet data = make_data_set(spec);
  const HostTensors host = generate(data);
  for (int b = 0; b < 2; ++b) {
    for (int head = 0; head < 2; ++head) {
      EXPECT_EQ(value_of(spec.dtype, host.q[size_t((b * 2 + head) * 576 + 575)]), 8);
      std::vector<std::pair<int32_t, uint16_t>> expected, actual;
      for (int n = data.needle_begin[size_t(b)]; n < data.needle_begin[size_t(b) + 1]; ++n) {
        const Needle& needle = data.needles[size_t(n)];
        expected.push_back({needle.token, needle.bits});
      }
      for (int32_t t = 0; t < data.seqlens_k[size_t(b)]; ++t) {
        const int64_t place = cache_place(
            data.problem, with_strides(data.problem, {}),
            &data.block_table[size_t(int64_t{b} * data.problem.max_pages_per_seq)], t, head);
        const uint16_t bits = host.kv_cache[size_t(place + 575)];
        if (bits != 0) actual.push_back({t, bits});
      }
      EXPECT_EQ(actual, expected);
    }
  }
}

TEST_P(Needles, EachOneShowsInItsRow) {
  // If any one needle is left out, out moves by more than 1% of its norm, at every length.
  DecodeCase spec = this->spec({4096, 4096, 140, 140, 20, 20});
  const DataSet data = make_data_set(spec);
  HostTensors host = generate(data);
  for (int b = 0; b < data.problem.batch; ++b) {
    const test::PlainInputs inputs = test::gather(data.problem, host.tensors(data), b, 0, 0);
    const test::PlainRow whole = test::evaluate(inputs);
    for (int n = data.needle_begin[size_t(b)]; n < data.needle_begin[size_t(b) + 1]; ++n) {
      std::vector<int> times(size_t(inputs.tokens), 1);
      times[size_t(data.needles[size_t(n)].token)] = 0;
      const test::PlainRow without = test::evaluate(inputs, times);
      double change = 0, length = 0;
      for (size_t c = 0; c < 512; ++c) {
        change += std::pow(without.out[c] - whole.out[c], 2);
        length += std::pow(whole.out[c], 2);
      }
      EXPECT_GT(std::sqrt(change / length), 0.01)
          << "sequence " << b << " token " << data.needles[size_t(n)].token;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, Needles,
                         testing::Combine(testing::ValuesIn(kDTypes), testing::Values(0, 1)));

class Extremes : public testing::TestWithParam<std::tuple<DType, uint64_t>> {
 protected:
  /// One row's logits before the scale, exact.
  std::vector<double> dots(DataKind kind, int head) {
    spec_.dtype = std::get<0>(GetParam());
    spec_.seed = std::get<1>(GetParam());
    spec_.data = kind;
    spec_.num_heads_q = 8;
    spec_.lengths = {4096};
    data_ = make_data_set(spec_);
    host_ = generate(data_);
    inputs_ = test::gather(data_.problem, host_.tensors(data_), 0, 0, head);
    std::vector<double> result;
    for (int64_t t = 0; t < inputs_.tokens; ++t) {
      double dot = 0;
      for (size_t c = 0; c < 576; ++c) dot += inputs_.q[c] * inputs_.k[size_t(t) * 576 + c];
      result.push_back(dot);
    }
    return result;
  }
  DecodeCase spec_;
  DataSet data_;
  HostTensors host_;
  test::PlainInputs inputs_;
};

TEST_P(Extremes, ValuesAreHugeZeroAndSubnormalWithOrdinaryLogits) {
  for (const double dot : dots(DataKind::kExtremeValues, 3)) {
    EXPECT_LT(std::abs(dot) * data_.problem.softmax_scale, 1);
  }
  const bool is_bf16 = spec_.dtype == DType::kBFloat16;
  const double largest = is_bf16 ? std::ldexp(1, 100) : 65504;
  const double least_normal = std::ldexp(1, is_bf16 ? -126 : -14);
  int64_t huge = 0, half = 0, zero = 0, negative_zero = 0, subnormal = 0;
  for (int64_t t = 0; t < inputs_.tokens; ++t) {
    for (int64_t c = 0; c < 512; ++c) {
      const double v = inputs_.k[size_t(t * 576 + c)];
      huge += std::abs(v) == largest;
      half += std::abs(v) == largest / 2;
      zero += v == 0;
      negative_zero += v == 0 && std::signbit(v);
      subnormal += v != 0 && std::abs(v) < least_normal;
    }
  }
  const double count = double(inputs_.tokens) * 512;
  for (const int64_t n : {huge, half, zero, subnormal}) EXPECT_NEAR(double(n) / count, 0.25, 0.01);
  EXPECT_NEAR(double(negative_zero) / double(zero), 0.5, 0.01);
  for (int64_t c = 0; c < 512; ++c) {
    double sum = 0, magnitude = 0;
    for (int64_t t = 0; t < inputs_.tokens; ++t) {
      sum += inputs_.k[size_t(t * 576 + c)];
      magnitude += std::abs(inputs_.k[size_t(t * 576 + c)]);
    }
    ASSERT_NEAR(std::abs(sum) / magnitude, 1, 1e-6) << "column " << c << " cancels";
    ASSERT_LT(magnitude, 3e38);
  }
}

TEST_P(Extremes, LogitsAreExactFarApartOrEqual) {
  std::set<double> signs;
  for (int head = 0; head < 8; ++head) {
    const std::vector<double> exact = dots(DataKind::kExtremeLogits, head);
    const double scale = double(data_.problem.softmax_scale);
    std::set<double> levels;
    for (size_t t = 0; t < exact.size(); ++t) {
      float single = 0;  // in fp32, in another order
      for (size_t c = 576; c-- > 0;) {
        single += static_cast<float>(inputs_.q[c]) * static_cast<float>(inputs_.k[t * 576 + c]);
      }
      ASSERT_EQ(single, exact[t]);
      ASSERT_LT(std::abs(exact[t]) * scale * 1.4427, std::ldexp(1, 126));
      levels.insert(exact[t] * scale);
    }
    EXPECT_EQ(levels.size(), 65u);
    EXPECT_NEAR(*levels.rbegin(), 9900, 1100);
    EXPECT_NEAR(*levels.begin(), -9900, 1100);
    for (auto low = levels.begin(), high = std::next(low); high != levels.end(); ++low, ++high) {
      ASSERT_GE(*high - *low, 32);
    }
    for (size_t c = 0; c < 512; ++c) ASSERT_EQ(inputs_.q[c], 0);
    signs.insert(std::copysign(1, inputs_.q[575]));
  }
  EXPECT_EQ(signs.size(), 2u) << "q of either sign";
}

INSTANTIATE_TEST_SUITE_P(DTypes, Extremes,
                         testing::Combine(testing::ValuesIn(kDTypes), testing::Values(0, 1)));

}  // namespace
}  // namespace mla
