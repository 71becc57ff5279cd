#include "reference/problem.h"
#include "tests/status_matchers.h"

#include <gtest/gtest.h>

#include <climits>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace mla {
namespace {

Problem valid_problem() {
  Problem problem;
  problem.batch = 2;
  problem.seqlen_q = 3;
  problem.num_heads_q = 8;
  problem.num_heads_kv = 2;
  problem.num_pages = 5;
  problem.max_pages_per_seq = 4;
  problem.softmax_scale = 0.135234f;
  return problem;
}

alignas(16) int32_t aligned_words[8];

Tensors valid_tensors() {
  return {.q = aligned_words,
          .kv_cache = aligned_words,
          .block_table = aligned_words,
          .seqlens_k = aligned_words,
          .out = aligned_words,
          .lse = reinterpret_cast<float*>(aligned_words)};
}

/// Applies `spoil` to a valid problem and expects exactly this message.
void expect_refused(const std::function<void(Problem&)>& spoil, const std::string& message) {
  Problem problem = valid_problem();
  spoil(problem);
  const Status status = validate(problem);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), message);
  // The other checks call the first.
  EXPECT_EQ(validate(problem, valid_tensors()).message(), message);
  EXPECT_EQ(validate_paging(problem, aligned_words, aligned_words).message(), message);
}

TEST(Problem, ValidPasses) {
  EXPECT_OK(validate(valid_problem()));
  EXPECT_OK(validate(valid_problem(), valid_tensors()));
  Problem least = valid_problem();
  least.batch = least.seqlen_q = least.num_heads_q = least.num_heads_kv = 1;
  least.num_pages = least.max_pages_per_seq = 1;
  EXPECT_OK(validate(least));
  least.softmax_scale = std::numeric_limits<float>::denorm_min();
  EXPECT_OK(validate(least));
  EXPECT_EQ(validate(Problem{}).message(), "num_heads_q = 0 must be at least 1");
}

TEST(Problem, AnEmptyBatchNeedsNoTensors) {
  Problem problem = valid_problem();
  problem.batch = 0;
  EXPECT_OK(validate(problem));
  EXPECT_OK(validate(problem, Tensors{}));
  EXPECT_OK(validate_paging(problem, nullptr, nullptr));
  for (const int batch : {-1, INT_MIN}) {
    expect_refused([&](Problem& p) { p.batch = batch; },
                   "batch = " + std::to_string(batch) + " must be at least 0");
  }
}

TEST(Problem, PageSizesAreFive) {
  for (int page_size = -1; page_size <= 1024; ++page_size) {
    const bool allowed = page_size == 16 || page_size == 32 || page_size == 64 ||
                         page_size == 128 || page_size == 256;
    if (allowed) {
      Problem problem = valid_problem();
      problem.page_size = page_size;
      EXPECT_OK(validate(problem));
      problem.max_pages_per_seq = (1 << 30) / page_size;
      EXPECT_OK(validate(problem));
      ++problem.max_pages_per_seq;
      EXPECT_FALSE(validate(problem).ok());
    } else {
      expect_refused(
          [&](Problem& p) { p.page_size = page_size; },
          "page_size = " + std::to_string(page_size) + " must be 16, 32, 64, 128 or 256");
    }
  }
}

TEST(Problem, EachDimensionMustBePositive) {
  const std::pair<const char*, int Problem::*> dimensions[] = {
      {"seqlen_q", &Problem::seqlen_q},
      {"num_heads_q", &Problem::num_heads_q},
      {"num_heads_kv", &Problem::num_heads_kv},
      {"num_pages", &Problem::num_pages},
      {"max_pages_per_seq", &Problem::max_pages_per_seq},
  };
  for (const auto& [name, member] : dimensions) {
    for (const int value : {0, -1, INT_MIN}) {
      expect_refused([&, m = member](Problem& p) { p.*m = value; },
                     std::string(name) + " = " + std::to_string(value) + " must be at least 1");
    }
  }
}

TEST(Problem, HeadsMustDivide) {
  expect_refused(
      [](Problem& p) {
        p.num_heads_q = 5;
        p.num_heads_kv = 2;
      },
      "num_heads_q = 5 is not a multiple of num_heads_kv = 2");
  expect_refused(
      [](Problem& p) {
        p.num_heads_q = 4;
        p.num_heads_kv = 8;
      },
      "num_heads_q = 4 is not a multiple of num_heads_kv = 8");
}

TEST(Problem, DTypeMustBeOneOfTwo) {
  expect_refused([](Problem& p) { p.dtype = static_cast<DType>(7); },
                 "dtype = 7 is neither bf16 (0) nor fp16 (1)");
}

TEST(Problem, ScaleMustBeFiniteAndPositive) {
  const std::pair<float, const char*> scales[] = {
      {0.0f, "0"},        {-0.0f, "-0"},        {-1.0f, "-1"},
      {HUGE_VALF, "inf"}, {-HUGE_VALF, "-inf"}, {std::nanf(""), "nan"},
  };
  for (const auto& [scale, text] : scales) {
    expect_refused([s = scale](Problem& p) { p.softmax_scale = s; },
                   std::string("softmax_scale = ") + text + " must be finite and greater than 0");
  }
}

TEST(CacheFormats, AreFour) {
  for (const CacheFormat format : kCacheFormats) {
    Problem problem = valid_problem();
    problem.cache_format = format;
    EXPECT_OK(validate(problem)) << to_string(format);
    EXPECT_OK(validate(problem, valid_tensors()));
  }
  expect_refused([](Problem& p) { p.cache_format = static_cast<CacheFormat>(4); },
                 "cache_format = 4 is not one of 16bit (0), fp8_tile128 (1), fp8_tensor (2), "
                 "int8_tile128 (3)");
  EXPECT_EQ(Problem().cache_format, CacheFormat::k16Bit);
}

TEST(CacheFormats, TilesGoWithBFloat16) {
  const auto set = [](CacheFormat format) {
    return [format](Problem& p) {
      p.dtype = DType::kFloat16;
      p.cache_format = format;
    };
  };
  for (const CacheFormat format : {CacheFormat::kFp8Tile128, CacheFormat::kInt8Tile128}) {
    expect_refused(set(format), std::string("dtype = fp16 must be bf16, because the rotary columns "
                                            "of cache_format = ") +
                                    to_string(format) + " are bf16");
  }
  Problem problem = valid_problem();
  set(CacheFormat::kFp8Tensor)(problem);
  EXPECT_OK(validate(problem));
}

TEST(CacheFormats, TheCallsScaleIsFiniteAndPositive) {
  const std::pair<float, const char*> scales[] = {
      {0.0f, "0"}, {-1.0f, "-1"}, {HUGE_VALF, "inf"}, {std::nanf(""), "nan"}};
  for (const auto& [scale, text] : scales) {
    expect_refused(
        [s = scale](Problem& p) {
          p.cache_format = CacheFormat::kFp8Tensor;
          p.cache_scale = s;
        },
        std::string("cache_scale = ") + text + " must be finite and greater than 0");
    // Other formats do not read it.
    Problem problem = valid_problem();
    problem.cache_scale = scale;
    EXPECT_OK(validate(problem));
    problem.cache_format = CacheFormat::kFp8Tile128;
    EXPECT_OK(validate(problem));
  }
}

// Elements of a quantised cache are bytes.
TEST(CacheFormats, PlacesAndStridesCountBytes) {
  const std::pair<CacheFormat, int> rows[] = {{CacheFormat::kFp8Tile128, 656},
                                              {CacheFormat::kFp8Tensor, 576},
                                              {CacheFormat::kInt8Tile128, 656}};
  for (const auto& [format, bytes] : rows) {
    SCOPED_TRACE(to_string(format));
    Problem problem = valid_problem();  // 5 pages, 2 KV heads
    problem.cache_format = format;
    EXPECT_EQ(problem.cache_element_bytes(), 1);
    EXPECT_EQ(problem.cache_row_elements(), bytes);
    EXPECT_EQ(problem.cache_row_bytes(), bytes);
    EXPECT_EQ(problem.kv_elements(), 5 * 64 * 2 * bytes);
    const Tensors filled = with_strides(problem, valid_tensors());
    EXPECT_EQ(filled.page_place(4, 63, 1), ((4 * 64 + 63) * 2 + 1) * bytes);
    EXPECT_EQ(filled.q_place(0, 0, 1), 576) << "other tensors do not depend on the cache format";
    const int32_t table_row[] = {3, 2};
    EXPECT_EQ(cache_place(problem, filled, table_row, 65, 1), ((2 * 64 + 1) * 2 + 1) * bytes);

    Tensors tensors = valid_tensors();
    tensors.kv_strides.token = 16 * 100;
    EXPECT_OK(validate(problem, tensors));
    tensors.kv_strides.token = 16 * 100 + 8;
    EXPECT_EQ(
        validate(problem, tensors).message(),
        "kv_cache stride of page_size = 1608 must be a multiple of 16, at least 0: rows begin "
        "at multiples of 16 bytes");
    tensors.kv_strides.token = kContiguous;
    tensors.kv_strides.page = int64_t{1} << 39;
    EXPECT_OK(validate(problem, tensors));
    tensors.kv_strides.page += 16;
    EXPECT_EQ(validate(problem, tensors).message(),
              "kv_cache stride of num_pages = 549755813904 must be at most 2^39");
  }
  const Problem plain = valid_problem();
  EXPECT_EQ(plain.cache_element_bytes(), 2);
  EXPECT_EQ(plain.cache_row_elements(), 576);
  EXPECT_EQ(plain.cache_row_bytes(), 1152);
}

TEST(CacheFormats, SizesMustFit) {
  const auto largest = [](int num_pages) {
    return [num_pages](Problem& p) {
      p.cache_format = CacheFormat::kInt8Tile128;
      p.num_heads_q = p.num_heads_kv = 1 << 22;
      p.seqlen_q = 1;
      p.page_size = 256;
      p.num_pages = num_pages;
    };
  };
  constexpr int kMost = int((INT64_MAX - 656) / (int64_t{656} * 256 << 22));
  Problem problem = valid_problem();
  largest(kMost)(problem);
  EXPECT_OK(validate(problem));
  expect_refused(largest(kMost + 1),
                 "kv_cache [num_pages = " + std::to_string(kMost + 1) +
                     " x page_size = 256 x num_heads_kv = 4194304 x row_bytes = 656] has more than "
                     "2^63 - 1 bytes");
}

TEST(Problem, FixedSplitsAreWholeGrains) {
  for (const int value : {-64, -1, 1, 63, 65, 1000, INT_MIN, INT_MAX}) {
    expect_refused([&](Problem& p) { p.fixed_split_tokens = value; },
                   "fixed_split_tokens = " + std::to_string(value) +
                       " must be 0 or a positive multiple of 64");
  }
  Problem problem = valid_problem();
  for (const int value : {0, 64, 4096, 1 << 30}) {
    problem.fixed_split_tokens = value;
    EXPECT_OK(validate(problem)) << value;
  }
}

TEST(Problem, SizesMustFit) {
  expect_refused(
      [](Problem& p) {
        p.seqlen_q = 1 << 20;
        p.num_heads_q = 1 << 11;
      },
      "seqlen_q = 1048576 times num_heads_q = 2048 must be at most 2^30");
  expect_refused([](Problem& p) { p.max_pages_per_seq = kMaxTokensPerSeq / 64 + 1; },
                 "max_pages_per_seq = 16777217 must be at most 16777216 (2^30 tokens)");
  expect_refused(
      [](Problem& p) {
        p.batch = INT_MAX;
        p.seqlen_q = INT_MAX / 16;
      },
      "q [batch = 2147483647 x seqlen_q = 134217727 x num_heads_q = 8 x head_dim = 576] has more "
      "than 2^63 - 1 bytes");
  expect_refused(
      [](Problem& p) {
        p.num_heads_q = p.num_heads_kv = 1 << 30;
        p.seqlen_q = 1;
        p.num_pages = INT_MAX;
        p.batch = 1;
      },
      "kv_cache [num_pages = 2147483647 x page_size = 64 x num_heads_kv = 1073741824 x head_dim = "
      "576] has more than 2^63 - 1 bytes");
  Problem all_largest = valid_problem();
  all_largest.batch = all_largest.seqlen_q = all_largest.num_heads_q = INT_MAX;
  all_largest.num_heads_kv = all_largest.num_pages = all_largest.max_pages_per_seq = INT_MAX;
  EXPECT_EQ(validate(all_largest).code(), StatusCode::kInvalidArgument);

  Problem large = valid_problem();  // 2^31 elements and more are fine
  large.batch = 128;
  large.num_heads_q = large.num_heads_kv = 128;
  large.num_pages = 1 << 20;
  EXPECT_OK(validate(large));
  EXPECT_EQ(large.kv_elements(), (int64_t{1} << 20) * 64 * 128 * 576);
}

TEST(Problem, EachTensorMustBeThereAndAligned) {
  const auto expect = [](const char* name, int alignment,
                         const std::function<void(Tensors&, void*)>& set) {
    Tensors tensors = valid_tensors();
    set(tensors, nullptr);
    Status status = validate(valid_problem(), tensors);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), std::string(name) + " is null");

    void* const misaligned = reinterpret_cast<char*>(aligned_words) + alignment / 2;
    set(tensors, misaligned);
    status = validate(valid_problem(), tensors);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    char address[32];
    std::snprintf(address, sizeof address, "%p", misaligned);
    EXPECT_EQ(status.message(), std::string(name) + " = " + address + " is not aligned to " +
                                    std::to_string(alignment) + " bytes");
    set(tensors, reinterpret_cast<char*>(aligned_words) + (alignment == 4 ? 4 : 16));
    EXPECT_OK(validate(valid_problem(), tensors));
  };
  expect("q", 16, [](Tensors& t, void* p) { t.q = p; });
  expect("kv_cache", 16, [](Tensors& t, void* p) { t.kv_cache = p; });
  expect("block_table", 4, [](Tensors& t, void* p) { t.block_table = static_cast<int32_t*>(p); });
  expect("seqlens_k", 4, [](Tensors& t, void* p) { t.seqlens_k = static_cast<int32_t*>(p); });
  expect("out", 16, [](Tensors& t, void* p) { t.out = p; });
  expect("lse", 4, [](Tensors& t, void* p) { t.lse = static_cast<float*>(p); });
}

// Strides may be given, as by a tensor library, or left out.
TEST(Strides, AreFilledInWhereNothingIsSaid) {
  const Problem problem = valid_problem();  // 2 sequences, 3 query tokens, 8 heads, 2 KV heads
  const Tensors filled = with_strides(problem, valid_tensors());
  EXPECT_EQ(filled.q_place(1, 2, 3), ((1 * 3 + 2) * 8 + 3) * 576);
  EXPECT_EQ(filled.out_place(1, 2, 3), ((1 * 3 + 2) * 8 + 3) * 512);
  EXPECT_EQ(filled.lse_place(1, 2, 3), (1 * 8 + 3) * 3 + 2);
  EXPECT_EQ(filled.page_place(4, 63, 1), ((4 * 64 + 63) * 2 + 1) * 576);
  EXPECT_EQ(filled.table_row(1), filled.block_table + 4);
  // Given strides stay, except for a dimension of one member, whose stride means nothing.
  Tensors tensors = valid_tensors();
  tensors.q_strides = {.batch = 80000, .token = kContiguous, .head = 584};
  tensors.kv_strides.token = 1200;
  tensors.block_table_stride = 9;
  const Tensors partly = with_strides(problem, tensors);
  EXPECT_EQ(partly.q_place(1, 2, 3), 80000 + 2 * 8 * 576 + 3 * 584);
  EXPECT_EQ(partly.page_place(1, 1, 1), 64 * 2 * 576 + 1200 + 576);
  EXPECT_EQ(partly.table_row(1), partly.block_table + 9);
  Problem one = problem;
  one.batch = one.seqlen_q = one.num_heads_q = one.num_heads_kv = 1;
  tensors.q_strides = {.batch = 1, .token = 3, .head = -7};
  EXPECT_OK(validate(one, tensors));
  EXPECT_EQ(with_strides(one, tensors).q_strides.head, 576);
}

TEST(Strides, OutputsMayInterleaveButNotOverlap) {
  const Problem problem = valid_problem();
  Tensors tensors = valid_tensors();
  // [batch, heads, tokens, 512], heads outside
  tensors.out_strides = {.batch = 8 * 3 * 512, .token = 512, .head = 3 * 512};
  tensors.lse_strides = {.batch = 24, .token = 8, .head = 1};
  EXPECT_OK(validate(problem, tensors));
  // sequences inside
  tensors.out_strides = {.batch = 512, .token = 2 * 512, .head = 3 * 2 * 512};
  EXPECT_OK(validate(problem, tensors));
  tensors.out_strides.token = 512;
  EXPECT_EQ(validate(problem, tensors).message(),
            "out stride of seqlen_q = 512 must be at least 1024, else rows overlap");
  // Inputs may overlap: one q, or one row of the table, may serve all sequences.
  tensors = valid_tensors();
  tensors.q_strides.batch = 0;
  tensors.block_table_stride = 0;
  EXPECT_OK(validate(problem, tensors));
}

class Paging : public testing::Test {
 protected:
  Status check() const { return validate_paging(problem_, block_table_.data(), seqlens_k_.data()); }

  Problem problem_ = valid_problem();  // 2 sequences, 5 pages, 4 entries each
  std::vector<int32_t> block_table_ = {4, 2, 2147480000, -1, 0, 1, 3, 4};
  std::vector<int32_t> seqlens_k_ = {65, 256};
};

TEST_F(Paging, ValidPassesWhateverUnusedSlotsHold) {
  EXPECT_OK(check());
  seqlens_k_ = {0, 0};
  block_table_.assign(8, -1);
  EXPECT_OK(check());
}

TEST_F(Paging, LengthsMustFitTheTable) {
  seqlens_k_[1] = 257;
  EXPECT_EQ(check().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(check().message(),
            "seqlens_k[1] = 257 must be in [0, 256], because the block table has "
            "max_pages_per_seq = 4 pages of 64 tokens");
  seqlens_k_[0] = -1;
  EXPECT_EQ(check().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(check().message(),
            "seqlens_k[0] = -1 must be in [0, 256], because the block table has "
            "max_pages_per_seq = 4 pages of 64 tokens");
}

TEST_F(Paging, UsedEntriesMustNamePages) {
  seqlens_k_[0] = 129;
  EXPECT_EQ(check().code(), StatusCode::kOutOfRange);
  EXPECT_EQ(check().message(),
            "block_table[0, 2] = 2147480000 must be in [0, 5): sequence 0 has 129 tokens, so it "
            "uses entry 2");
  seqlens_k_[0] = 64;
  for (const int page : {5, -1, INT_MIN, INT_MAX}) {
    block_table_[7] = page;
    EXPECT_EQ(check().code(), StatusCode::kOutOfRange);
    EXPECT_EQ(check().message(), "block_table[1, 3] = " + std::to_string(page) +
                                     " must be in [0, 5): sequence 1 has 256 tokens, so it uses "
                                     "entry 3");
  }
}

TEST_F(Paging, RowsOfTheTableMayBeApart) {
  block_table_ = {4, 2, 2147480000, -1, -9, 0, 1, 3, 4};
  EXPECT_FALSE(check().ok());
  EXPECT_OK(validate_paging(problem_, block_table_.data(), seqlens_k_.data(), 5));
}

TEST_F(Paging, NullTablesAreRefused) {
  EXPECT_EQ(validate_paging(problem_, nullptr, seqlens_k_.data()).message(), "block_table is null");
  EXPECT_EQ(validate_paging(problem_, block_table_.data(), nullptr).message(), "seqlens_k is null");
}

TEST(PagingTypes, PlacesOfTokens) {
  EXPECT_EQ(pages_for(0, 64), 0);
  EXPECT_EQ(pages_for(1, 64), 1);
  EXPECT_EQ(pages_for(64, 64), 1);
  EXPECT_EQ(pages_for(65, 64), 2);
  EXPECT_EQ(pages_for(int64_t{INT_MAX} + 1, 64), int64_t{1} << 25);
  const int32_t table_row[] = {7, 2147480000 / 64};
  Problem problem = valid_problem();
  problem.num_heads_q = 8;
  const auto place = [&](int token, int heads_kv, int head_kv) {
    problem.num_heads_kv = heads_kv;
    return cache_place(problem, with_strides(problem, {}), table_row, token, head_kv);
  };
  EXPECT_EQ(place(63, 2, 1), ((7 * 64 + 63) * 2 + 1) * 576);
  EXPECT_EQ(place(64, 8, 0), int64_t{2147480000} * 8 * 576) << "needs 64 bits";
  problem.page_size = 16;
  EXPECT_EQ(place(17, 1, 0), (int64_t{2147480000} / 64 * 16 + 1) * 576);
  problem.page_size = 256;
  EXPECT_EQ(place(255, 1, 0), (7 * 256 + 255) * 576);
  EXPECT_EQ(clamped_length(problem, -1), 0);
  EXPECT_EQ(clamped_length(problem, 1024), 1024);
  EXPECT_EQ(clamped_length(problem, 1025), 1024);
  EXPECT_EQ(clamped_length(problem, INT_MIN), 0);
}

TEST(ProblemShapes, VisibleTokensAreAlignedBottomRight) {
  Problem problem = valid_problem();  // seqlen_q = 3
  EXPECT_EQ(problem.visible_tokens(10, 0), 10);
  problem.causal = true;
  EXPECT_EQ(problem.visible_tokens(10, 0), 8);
  EXPECT_EQ(problem.visible_tokens(10, 2), 10);
  EXPECT_EQ(problem.visible_tokens(1, 1), 0);
  EXPECT_EQ(problem.visible_tokens(0, 0), -2);
  EXPECT_EQ(problem.group_size(), 4);
  EXPECT_EQ(problem.rows_per_kv_head(), 12);
  EXPECT_EQ(problem.max_seqlen_k(), 256);
  EXPECT_EQ(problem.q_elements(), 2 * 3 * 8 * 576);
  EXPECT_EQ(problem.kv_elements(), 5 * 64 * 2 * 576);
  EXPECT_EQ(problem.block_table_elements(), 8);
  EXPECT_EQ(problem.out_elements(), 2 * 3 * 8 * 512);
  EXPECT_EQ(problem.lse_elements(), 2 * 8 * 3);
}

}  // namespace
}  // namespace mla
