// Merging partial softmaxes in float and in double, as host code and as device code. Any partition,
// merged in any order, gives the softmax of the whole.
#include "reference/lse_merge.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "stages/common/machine/machine.h"
#include "tests/status_matchers.h"

namespace mla {

#ifdef MLA_HAVE_CUDA
namespace gpu {
Status launch_merge(const float*, const float*, LseMerge<float>*, int64_t);
Status launch_merge(const double*, const double*, LseMerge<double>*, int64_t);
}  // namespace gpu
#endif
namespace model {
Status launch_merge(const float*, const float*, LseMerge<float>*, int64_t);
Status launch_merge(const double*, const double*, LseMerge<double>*, int64_t);
}  // namespace model

namespace {

constexpr int kColumns = 4;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

enum class Where { kHost, kModel, kGpu };

class LseMergeTest : public testing::TestWithParam<Where> {
 protected:
  void SetUp() override {
    std::string why_not;
    if (GetParam() == Where::kModel) machine_ = &model_machine();
    if (GetParam() == Where::kGpu) machine_ = gpu_machine(&why_not);
    if (GetParam() == Where::kGpu && machine_ == nullptr) GTEST_SKIP() << why_not;
  }

  // Every pair of lse_a and lse_b.
  template <typename Real>
  std::vector<LseMerge<Real>> merge(const std::vector<Real>& lse_a,
                                    const std::vector<Real>& lse_b) {
    std::vector<LseMerge<Real>> merged(lse_a.size());
    if (machine_ == nullptr) {
      for (size_t i = 0; i < lse_a.size(); ++i) merged[i] = merge_lse(lse_a[i], lse_b[i]);
      return merged;
    }
    DeviceBuffer a, b, result;
    EXPECT_OK(a.assign(*machine_, lse_a.data(), lse_a.size() * sizeof(Real)));
    EXPECT_OK(b.assign(*machine_, lse_b.data(), lse_b.size() * sizeof(Real)));
    EXPECT_OK(result.allocate(*machine_, merged.size() * sizeof(merged[0])));
    const auto pairs = static_cast<int64_t>(merged.size());
#ifdef MLA_HAVE_CUDA
    const Status status =
        machine_->kind() == MachineKind::kGpu
            ? gpu::launch_merge(a.as<Real>(), b.as<Real>(), result.as<LseMerge<Real>>(), pairs)
            : model::launch_merge(a.as<Real>(), b.as<Real>(), result.as<LseMerge<Real>>(), pairs);
#else
    const Status status =
        model::launch_merge(a.as<Real>(), b.as<Real>(), result.as<LseMerge<Real>>(), pairs);
#endif
    EXPECT_OK(status);
    EXPECT_OK(machine_->synchronize());
    EXPECT_OK(machine_->copy_to_host(merged.data(), result.data(), result.bytes()));
    return merged;
  }

  template <typename Real>
  LseMerge<Real> merge_one(double lse_a, double lse_b) {
    return merge<Real>({static_cast<Real>(lse_a)}, {static_cast<Real>(lse_b)})[0];
  }

  template <typename Real>
  void expect_partitions_give_the_whole();
  template <typename Real>
  void expect_special_values();
  template <typename Real>
  void expect_extremes();

  Machine* machine_ = nullptr;  // null: host code
};

struct Token {
  double logit;
  double value[kColumns];
};

// Softmax over tokens in double; out = 0 and lse = +inf over none.
struct Whole {
  double out[kColumns] = {};
  double lse = kInfinity;

  explicit Whole(const std::vector<Token>& tokens) {
    if (tokens.empty()) return;
    double largest = -kInfinity, sum = 0;
    for (const Token& token : tokens) largest = std::max(largest, token.logit);
    for (const Token& token : tokens) sum += std::exp(token.logit - largest);
    for (const Token& token : tokens) {
      const double weight = std::exp(token.logit - largest) / sum;
      for (int c = 0; c < kColumns; ++c) out[c] += weight * token.value[c];
    }
    lse = largest + std::log(sum);
  }
};

template <typename Real>
struct Part {
  Real out[kColumns] = {};
  Real lse = 0;
};

struct Row {
  Whole whole;
  double largest_lse;  // the largest magnitude among the whole and all parts
};

template <typename Real>
void LseMergeTest::expect_partitions_give_the_whole() {
  constexpr int kRows = 600;
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };

  std::vector<Row> rows;
  std::vector<std::vector<Part<Real>>> parts;
  int all_empty = 0;
  for (int r = 0; r < kRows; ++r) {
    // By turns: ordinary logits; logits of large magnitude, but close together; logits far apart.
    const double centre = r % 3 == 1 ? 1e4 * normal(random) : 0;
    const double spread = r % 3 == 2 ? 3e3 : 3;
    std::vector<Token> tokens(r % 20 == 0 ? 0 : 1 + below(40));
    for (Token& token : tokens) {
      token.logit = centre + spread * normal(random);
      for (double& value : token.value) value = normal(random);
    }
    const size_t count = 1 + static_cast<size_t>(r) % 9;
    std::vector<std::vector<Token>> shares(count);  // some stay empty
    for (const Token& token : tokens) shares[below(count)].push_back(token);
    Row row{Whole(tokens), 1};
    all_empty += tokens.empty();
    std::vector<Part<Real>> row_parts;
    for (const auto& share : shares) {
      const Whole exact(share);
      Part<Real> part;
      for (int c = 0; c < kColumns; ++c) part.out[c] = static_cast<Real>(exact.out[c]);
      part.lse = static_cast<Real>(exact.lse);
      if (share.empty()) {
        if (random() % 2 == 0) part.lse = -part.lse;
      } else {
        row.largest_lse = std::max(row.largest_lse, std::abs(exact.lse));
      }
      row_parts.push_back(part);
    }
    rows.push_back(row);
    parts.push_back(row_parts);
  }
  EXPECT_GE(all_empty, 20);

  // In every row, two parts chosen at random are merged, until one is left.
  for (bool merging = true; merging;) {
    merging = false;
    std::vector<Real> lse_a, lse_b;
    std::vector<size_t> merged_rows;
    for (size_t r = 0; r < parts.size(); ++r) {
      if (parts[r].size() < 2) continue;
      merging = true;
      for (size_t i = 0; i < 2; ++i) {  // puts the chosen two at the end
        std::swap(parts[r][below(parts[r].size() - i)], parts[r][parts[r].size() - 1 - i]);
      }
      lse_a.push_back(parts[r][parts[r].size() - 2].lse);
      lse_b.push_back(parts[r].back().lse);
      merged_rows.push_back(r);
    }
    if (!merging) break;
    const auto merged = merge(lse_a, lse_b);
    for (size_t i = 0; i < merged.size(); ++i) {
      std::vector<Part<Real>>& row_parts = parts[merged_rows[i]];
      const Part<Real> b = row_parts.back();
      row_parts.pop_back();
      Part<Real>& a = row_parts.back();
      for (int c = 0; c < kColumns; ++c) {
        a.out[c] = merged[i].weight_a * a.out[c] + merged[i].weight_b * b.out[c];
      }
      a.lse = merged[i].lse;
    }
  }

  for (size_t r = 0; r < rows.size(); ++r) {
    SCOPED_TRACE("row " + std::to_string(r));
    const Part<Real>& part = parts[r][0];
    // An lse is as exact as its magnitude allows. The weights are no more exact than the lse.
    const double tolerance = 32.0 * std::numeric_limits<Real>::epsilon() * rows[r].largest_lse;
    const double lse = static_cast<double>(part.lse);
    if (std::isinf(rows[r].whole.lse)) {
      // An empty row has +inf; or the single part's own -inf, if it was never merged.
      EXPECT_TRUE(lse == kInfinity || (r % 9 == 0 && lse == -kInfinity)) << lse;
    } else {
      EXPECT_NEAR(lse, rows[r].whole.lse, tolerance);
    }
    for (int c = 0; c < kColumns; ++c) {
      EXPECT_NEAR(static_cast<double>(part.out[c]), rows[r].whole.out[c], 4 * tolerance);
    }
  }
}

template <typename Real>
void LseMergeTest::expect_special_values() {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  // Both parts are empty: the weights are 0 and the lse is decode()'s +inf, whether the parts had +inf
  // or -inf.
  for (const double a : {kInfinity, -kInfinity}) {
    for (const double b : {kInfinity, -kInfinity}) {
      const auto merged = merge_one<Real>(a, b);
      EXPECT_EQ(merged.weight_a, 0);
      EXPECT_EQ(merged.weight_b, 0);
      EXPECT_EQ(merged.lse, std::numeric_limits<Real>::infinity());
    }
    // One part is empty: the other stays as it was, to the bit.
    for (const double lse : {-1e4, -0.3, 0.0, 2.5, 1e4}) {
      const auto left = merge_one<Real>(lse, a), right = merge_one<Real>(a, lse);
      EXPECT_EQ(left.weight_a, 1);
      EXPECT_EQ(left.weight_b, 0);
      EXPECT_EQ(left.lse, static_cast<Real>(lse));
      EXPECT_EQ(right.weight_a, 0);
      EXPECT_EQ(right.weight_b, 1);
      EXPECT_EQ(right.lse, static_cast<Real>(lse));
    }
  }
  for (const double other : {kNaN, kInfinity, -kInfinity, 0.0, 1e4, -1e4}) {
    for (const auto& merged : {merge_one<Real>(kNaN, other), merge_one<Real>(other, kNaN)}) {
      EXPECT_TRUE(std::isnan(merged.lse)) << other;
      EXPECT_TRUE(std::isnan(merged.weight_a)) << other;
      EXPECT_TRUE(std::isnan(merged.weight_b)) << other;
    }
  }
}

template <typename Real>
void LseMergeTest::expect_extremes() {
  constexpr double kEpsilon = std::numeric_limits<Real>::epsilon();
  for (const double base : {-1e4, -1.0, 0.0, 1e4}) {
    // Equal parts have equal weights. A gap is a difference of logits.
    for (const double gap : {0.0, 1.0, 20.0, 100.0, 1000.0, 2e4}) {
      const double lower = static_cast<double>(static_cast<Real>(base - gap));
      const double upper = static_cast<double>(static_cast<Real>(base));
      SCOPED_TRACE(std::to_string(upper) + " and " + std::to_string(lower));
      const double weight = 1 / (1 + std::exp(lower - upper));
      for (const bool swapped : {false, true}) {
        auto merged = swapped ? merge_one<Real>(lower, upper) : merge_one<Real>(upper, lower);
        if (swapped) std::swap(merged.weight_a, merged.weight_b);
        EXPECT_TRUE(std::isfinite(merged.lse));
        EXPECT_NEAR(static_cast<double>(merged.weight_a), weight, 4 * kEpsilon);
        EXPECT_NEAR(static_cast<double>(merged.weight_b), 1 - weight, 4 * kEpsilon);
        EXPECT_NEAR(static_cast<double>(merged.lse), upper - std::log(weight),
                    2 * kEpsilon * std::max(1.0, std::abs(upper)));
      }
    }
  }
}

TEST_P(LseMergeTest, AnyPartitionInAnyOrderGivesTheWhole) {
  expect_partitions_give_the_whole<float>();
  expect_partitions_give_the_whole<double>();
}

TEST_P(LseMergeTest, EmptyPartsWeighNothingAndNanStays) {
  expect_special_values<float>();
  expect_special_values<double>();
}

TEST_P(LseMergeTest, LargeLogitsAndGapsStayFinite) {
  expect_extremes<float>();
  expect_extremes<double>();
}

INSTANTIATE_TEST_SUITE_P(Machines, LseMergeTest,
                         testing::Values(Where::kHost, Where::kModel, Where::kGpu),
                         [](const auto& test) {
                           return std::string(test.param == Where::kHost    ? "Host"
                                              : test.param == Where::kModel ? "Model"
                                                                            : "Gpu");
                         });

}  // namespace
}  // namespace mla
