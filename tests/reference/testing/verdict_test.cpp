// The verdict on data of every size: an ideal 16-bit kernel passes, and no kernel with a fault does.
//
// The kernel rounds to fp32 and 16 bits where a real one must, and otherwise computes in double on
// plain arrays. A fault is put where it can show: at the heaviest token of its row, or in the page or
// half of the tokens that holds it. In long flat rows no token weighs enough for that: one of 100,000
// changes lse by 1e-5, and fp32 sums of so many may be off by more. So one token is raised to a weight
// of 1/1000. In rows of a single tile of 64 tokens, and in some flat ones, the maximum moves too little
// to show; these get no faults of the rescaling.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "reference/attention.h"
#include "reference/float16.h"
#include "reference/testing/compare.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kTile = 64;

double round_to(DType dtype, double value) {
  return visit_dtype(dtype, [&](auto zero) {
    return double{to_float(from_float<decltype(zero)>(static_cast<float>(value)))};
  });
}

uint16_t bits_of(DType dtype, double value) {
  return visit_dtype(dtype, [&](auto zero) {
    return std::bit_cast<uint16_t>(from_float<decltype(zero)>(static_cast<float>(value)));
  });
}

// Normally distributed numbers by a table, which is quick enough for 58 million values.
class Normal {
 public:
  explicit Normal(uint64_t seed) : state_(seed * 2 + 1) {
    if (table().empty()) {
      std::mt19937_64 random(1);
      std::normal_distribution<float> normal;
      for (int i = 0; i < 65536; ++i) table().push_back(normal(random));
    }
  }
  float operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return table()[state_ >> 48];
  }

 private:
  static std::vector<float>& table() {
    static std::vector<float> values;
    return values;
  }
  uint64_t state_;
};

enum class Logits {
  kFlat,    // standard deviation 0.05
  kPeaky,   // standard deviation 4: a few tokens have most of the weight
  kFarOff,  // flat, but all at about 10,000
};

struct Data {
  DType dtype = DType::kBFloat16;
  double deviation = 1;      // of the cache
  int outliers = 0;          // columns of V that are larger
  double outlier_size = 20;  // how many times larger these are
  Logits logits = Logits::kFlat;
  int64_t tokens = 1;
  int heads = 4;
  uint64_t seed = 0;

  std::string name() const {
    return std::string(to_string(dtype)) + ", deviation " + std::to_string(deviation) +
           (outliers > 0 ? ", " + std::to_string(outliers) + " outliers" : "") + ", logits " +
           std::to_string(int(logits)) + ", " + std::to_string(tokens) + " tokens, seed " +
           std::to_string(seed);
  }
};

// The maximum that a kernel's weights are relative to.
struct Kernel {
  bool running = false;  // true: the maximum so far; false: that of all tokens
  double headroom = 0;   // the largest weight is e^-headroom
};
struct Fault {
  int64_t token = -1;        // a token that is counted wrongly
  int count = 1;             // how many times it is counted
  bool only_in_out = false;  // but once in the sum of the weights
  int64_t page = -1;         // a page whose neighbour is read instead
  int64_t part_begin = 0;    // the tokens that are left out: from here
  int64_t part_end = 0;
  bool inverted_rescale = false, stale_maximum = false;
};

// One sequence, its reference, and kernels' results on it.
class Decode {
 public:
  explicit Decode(const Data& of) : data(of) {
    Normal normal(data.seed);
    problem.dtype = data.dtype;
    problem.batch = problem.num_heads_kv = problem.seqlen_q = 1;
    problem.num_heads_q = data.heads;
    problem.num_pages = problem.max_pages_per_seq = int((data.tokens + 63) / 64);
    problem.softmax_scale = 1.F / 24;
    std::vector<int32_t> table;
    for (int i = 0; i < problem.num_pages; ++i) table.push_back(i);

    // Column 575 of q is 16. That of the cache is 0, except where a logit is raised.
    const double wanted = data.logits == Logits::kPeaky ? 4 : 0.05;
    const double squares = 575 + (data.outlier_size * data.outlier_size - 1) * data.outliers;
    const double q_deviation = wanted * 24 / (data.deviation * std::sqrt(squares));
    std::vector<uint16_t> q(size_t(data.heads) * 576), cache(size_t(problem.num_pages) * 64 * 576);
    for (uint16_t& bits : q) bits = bits_of(data.dtype, q_deviation * normal());
    for (int head = 0; head < data.heads; ++head)
      q[size_t(head) * 576 + 575] = bits_of(data.dtype, 16);
    k_.resize(size_t(data.tokens) * 576);
    for (int64_t t = 0; t < data.tokens; ++t) {
      for (int64_t c = 0; c < 576; ++c) {
        double value = data.deviation * normal() * (c < data.outliers ? data.outlier_size : 1);
        if (c == 575) {
          const double raised = std::log(data.tokens / 1000.0);
          value = 1.5 * (data.logits == Logits::kFarOff ? 10000 : 0);
          if (data.logits == Logits::kFlat && raised > 0 && t == data.tokens / 3)
            value = 1.5 * raised;
        }
        const size_t i = size_t(t * 576 + c);
        cache[i] = bits_of(data.dtype, value);
        k_[i] = static_cast<float>(round_to(data.dtype, value));
      }
    }
    const std::vector<int32_t> lengths{static_cast<int32_t>(data.tokens)};
    EXPECT_OK(reference_attention(
        problem, {q.data(), cache.data(), table.data(), lengths.data(), nullptr, nullptr},
        &expected));

    for (int head = 0; head < data.heads; ++head) {
      std::vector<double> row;
      for (int c = 0; c < 576; ++c) {
        row.push_back(visit_dtype(data.dtype, [&](auto zero) {
          return double{to_float(std::bit_cast<decltype(zero)>(q[size_t(head * 576 + c)]))};
        }));
      }
      for (int64_t t = 0; t < data.tokens; ++t) {
        double dot = 0;
        for (int64_t c = 0; c < 576; ++c) dot += row[size_t(c)] * k_[size_t(t * 576 + c)];
        logits_.push_back(double{static_cast<float>(dot) * problem.softmax_scale});
      }
    }
  }

  // Computes row `head` of out and lse.
  void run(int head, const Kernel& kernel, const Fault& fault = {}) {
    const double* const s = &logits_[size_t(head * data.tokens)];
    double m =
        kernel.running ? -kInfinity : *std::max_element(s, s + data.tokens) + kernel.headroom;
    float l = 0;
    std::vector<float> o(512, 0.0F);
    std::vector<double> sums(512);
    for (int64_t begin = 0; begin < data.tokens; begin += kTile) {
      const int64_t end = std::min(begin + kTile, data.tokens);
      int64_t shift = 0;
      if (begin / kTile == fault.page) shift = begin == 0 ? kTile : -kTile;
      const auto source = [&](int64_t t) { return std::min(t + shift, data.tokens - 1); };
      double m_new = m;
      if (kernel.running) {
        for (int64_t t = begin; t < end; ++t)
          m_new = std::max(m_new, s[source(t)] + kernel.headroom);
      }
      double rescale = std::exp(m - m_new);
      if (fault.inverted_rescale && begin > 0) rescale = 1 / rescale;
      if (fault.stale_maximum && begin > 0) rescale = 1;
      m = m_new;
      double sum = l * rescale;
      for (size_t c = 0; c < 512; ++c) sums[c] = o[c] * rescale;
      for (int64_t t = begin; t < end; ++t) {
        if (t >= fault.part_begin && t < fault.part_end) continue;
        const int count = t == fault.token ? fault.count : 1;
        const double p = std::exp(s[source(t)] - m);
        sum += (fault.only_in_out ? 1 : count) * p;
        const double p16 = count * round_to(data.dtype, p);
        if (p16 == 0) continue;
        const float* const v = &k_[size_t(source(t) * 576)];
        for (size_t c = 0; c < 512; ++c) sums[c] += p16 * v[c];
      }
      l = static_cast<float>(sum);
      for (size_t c = 0; c < 512; ++c) o[c] = static_cast<float>(sums[c]);
    }
    out.resize(expected.out.size());
    lse.resize(expected.lse.size());
    for (size_t c = 0; c < 512; ++c) out[size_t(head) * 512 + c] = bits_of(data.dtype, o[c] / l);
    lse[size_t(head)] = static_cast<float>(m + std::log(double{l}));
  }
  void run_all(const Kernel& kernel) {
    for (int head = 0; head < data.heads; ++head) run(head, kernel);
  }

  DecodeComparison check() const { return compare_decode(problem, out, lse, expected); }
  int64_t heaviest(int head) const {
    const auto first = logits_.begin() + head * data.tokens;
    return std::max_element(first, first + data.tokens) - first;
  }
  // How far the running maximum rises after the first tile.
  double rise(int head) const {
    const auto first = logits_.begin() + head * data.tokens;
    return *std::max_element(first, first + data.tokens) -
           *std::max_element(first, first + std::min(kTile, data.tokens));
  }

  Data data;
  Problem problem;
  ReferenceResult expected;
  std::vector<uint16_t> out;
  std::vector<float> lse;

 private:
  std::vector<float> k_;        // [tokens, 576]
  std::vector<double> logits_;  // [heads, tokens], rounded to fp32
};

constexpr Kernel kKernels[] = {{false, 0}, {true, 0}, {true, 0.3}, {false, -4.852}};

double share_of(const DecodeComparison& comparison) {
  return std::max(comparison.out.share, comparison.lse.share);
}

// What the checks found: how near a right kernel came to its limit, and how near a fault did.
struct Margins {
  double right_out = 0, right_lse = 0;
  double fault = kInfinity;
  std::string nearest, nearest_fault;
  int64_t rows = 0, faults = 0;

  void add_right(const Decode& decode) {
    const DecodeComparison comparison = decode.check();
    EXPECT_TRUE(comparison.ok()) << decode.data.name() << ": " << comparison.describe();
    if (comparison.out.share > right_out) nearest = decode.data.name();
    right_out = std::max(right_out, comparison.out.share);
    right_lse = std::max(right_lse, comparison.lse.share);
    rows += decode.data.heads;
  }
  void add_fault(const Decode& decode, const std::string& name) {
    const DecodeComparison comparison = decode.check();
    const double share = share_of(comparison);
    EXPECT_FALSE(comparison.ok()) << name << " in " << decode.data.name() << ": "
                                  << comparison.describe();
    ++faults;
    if (share < fault) nearest_fault = name + " in " + decode.data.name();
    fault = std::min(fault, share);
  }
  void print() const {
    std::printf("  %lld right rows: at most %.2f of the limit in out (%s), %.2f in lse\n",
                static_cast<long long>(rows), right_out, nearest.c_str(), right_lse);
    if (faults > 0) {
      std::printf("  %lld faults: at least %.2f times the limit (%s)\n",
                  static_cast<long long>(faults), fault, nearest_fault.c_str());
    }
  }
};

void plant_faults(Decode& decode, Margins* margins) {
  const Data& data = decode.data;
  const DType dtype = data.dtype;
  constexpr Kernel kKernel{true, 0};
  decode.run_all(kKernel);
  const int64_t heaviest = decode.heaviest(0);
  const auto plant = [&](const char* name, const Fault& fault) {
    decode.run(0, kKernel, fault);
    margins->add_fault(decode, name);
    decode.run(0, kKernel);
  };
  plant("missing token", {.token = heaviest, .count = 0});
  plant("token missing in out alone", {.token = heaviest, .count = 0, .only_in_out = true});
  plant("doubled token", {.token = heaviest, .count = 2});
  if (data.tokens >= 2 * kTile) plant("swapped page", {.page = heaviest / kTile});
  if (data.tokens >= 2) {
    const int64_t half = data.tokens / 2;
    plant("dropped part", {.part_begin = heaviest < half ? 0 : half,
                           .part_end = heaviest < half ? half : data.tokens});
  }
  if (decode.rise(0) > 0.01) {
    plant("inverted rescale", {.inverted_rescale = true});
    plant("stale maximum", {.stale_maximum = true});
  }

  // An element of median size.
  std::vector<size_t> columns(512);
  for (size_t c = 0; c < 512; ++c) columns[c] = c;
  std::nth_element(columns.begin(), columns.begin() + 256, columns.end(), [&](size_t a, size_t b) {
    return std::abs(decode.expected.out[a]) < std::abs(decode.expected.out[b]);
  });
  uint16_t& element = decode.out[columns[256]];
  const uint16_t right = element;
  const std::pair<const char*, uint16_t> wrong[] = {
      {"wrong sign", uint16_t(right ^ 0x8000)}, {"zero", uint16_t{0}}, {"NaN", nan_bits(dtype)}};
  for (const auto& [name, bits] : wrong) {
    element = bits;
    margins->add_fault(decode, name);
  }
  element = right;
  decode.lse[0] = std::numeric_limits<float>::quiet_NaN();
  margins->add_fault(decode, "NaN in lse");
}

void check(const Data& data, Margins* margins) {
  Decode decode(data);
  for (const Kernel& kernel : kKernels) {
    decode.run_all(kernel);
    margins->add_right(decode);
  }
  plant_faults(decode, margins);
}

void expect_margins(const Margins& margins) {
  margins.print();
  EXPECT_LT(margins.right_out, 0.95);
  EXPECT_LT(margins.right_lse, 0.5);
  EXPECT_GT(margins.fault, 1.5);
}

TEST(Verdict, FitsDataOfEverySize) {
  Margins margins;
  uint64_t seed = 0;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const double deviation : {0.01, 0.1, 1.0, 10.0, 100.0}) {
      for (const int outliers : {0, 8}) {
        for (const Logits logits : {Logits::kFlat, Logits::kPeaky}) {
          for (const int64_t tokens : {1, 2, 3, 11, 64, 130, 501, 1000}) {
            check({dtype, deviation, outliers, 20, logits, tokens, 4, ++seed}, &margins);
          }
        }
      }
    }
  }
  expect_margins(margins);
}

TEST(Verdict, FitsLongSequences) {
  Margins margins;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const Logits logits : {Logits::kFlat, Logits::kPeaky}) {
      check({dtype, 1, 8, 20, logits, 8000, 2, 1}, &margins);
    }
  }
  check({DType::kBFloat16, 1, 0, 20, Logits::kFlat, 100'000, 1, 2}, &margins);
  check({DType::kFloat16, 0.1, 0, 20, Logits::kPeaky, 100'000, 1, 3}, &margins);
  expect_margins(margins);
}

TEST(Verdict, NoFalseAlarms) {
  Margins margins;
  std::mt19937 random(1);
  const auto one_of = [&](const auto& values) { return values[random() % std::size(values)]; };
  for (int i = 0; i < 4000; ++i) {
    Data data;
    data.dtype = i % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
    data.deviation = one_of(std::array{0.01, 0.1, 0.5, 1.0, 2.0, 10.0, 100.0});
    data.outliers = one_of(std::array{0, 0, 1, 2, 8, 100});
    if (data.deviation <= 10 && random() % 2 == 0) data.outlier_size = 300;  // within fp16
    data.logits = one_of(std::array{Logits::kFlat, Logits::kPeaky, Logits::kFarOff});
    data.tokens = int64_t(std::exp2(random() % 800 / 100.0));  // 1 ... 255
    data.heads = one_of(std::array{1, 2, 4, 16});
    data.seed = random();
    Decode decode(data);
    decode.run_all(one_of(kKernels));
    margins.add_right(decode);
  }
  margins.print();
}

}  // namespace
}  // namespace mla
