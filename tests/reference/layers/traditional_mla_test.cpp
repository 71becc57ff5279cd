// Traditional latent attention and multi-head attention: the formula, the chunks, the memory.
#include "reference/layers/traditional_mla.h"
#include "tests/status_matchers.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// ---- the allocation counter: malloc and its relatives, for the whole program ------------------
//
// Eigen takes its matrices from malloc, not from operator new, and glibc has no hooks any more. But
// a program's own malloc takes precedence over the library's, and glibc's own can still be called by
// another name. A sanitizer has a malloc of its own, so nothing is counted under one.
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MLA_COUNT_ALLOCATIONS

extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* pointer, size_t size);
void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* pointer);
}

namespace {

constinit std::atomic<int64_t> live_bytes{0};
constinit std::atomic<int64_t> peak_bytes{0};
constinit std::atomic<int64_t> largest_bytes{0};

void raise_to(std::atomic<int64_t>& maximum, int64_t value) {
  int64_t before = maximum.load();
  while (before < value && !maximum.compare_exchange_weak(before, value)) {
  }
}

void* count(void* pointer) {
  if (pointer == nullptr) return pointer;
  const auto bytes = static_cast<int64_t>(malloc_usable_size(pointer));
  raise_to(largest_bytes, bytes);
  raise_to(peak_bytes, live_bytes += bytes);
  return pointer;
}

void uncount(void* pointer) {
  if (pointer != nullptr) live_bytes -= static_cast<int64_t>(malloc_usable_size(pointer));
}

}  // namespace

extern "C" {
void* malloc(size_t size) noexcept {
  return count(__libc_malloc(size));
}
void* calloc(size_t number, size_t size) noexcept {
  return count(__libc_calloc(number, size));
}
void* realloc(void* pointer, size_t size) noexcept {
  const auto before = pointer ? static_cast<int64_t>(malloc_usable_size(pointer)) : int64_t{0};
  void* const moved = __libc_realloc(pointer, size);
  if (moved != nullptr || size == 0) live_bytes -= before;
  return count(moved);
}
void* memalign(size_t alignment, size_t size) noexcept {
  return count(__libc_memalign(alignment, size));
}
void* aligned_alloc(size_t alignment, size_t size) noexcept {
  return count(__libc_memalign(alignment, size));
}
int posix_memalign(void** pointer, size_t alignment, size_t size) noexcept {
  void* const memory = count(__libc_memalign(alignment, size));
  if (memory == nullptr) return 12;  // ENOMEM
  *pointer = memory;
  return 0;
}
void free(void* pointer) noexcept {
  uncount(pointer);
  __libc_free(pointer);
}
}
#endif

namespace mla::traditional {
namespace {

/// What a piece of work allocated.
struct Usage {
  int64_t peak = 0;     ///< Most bytes at one time, beyond those before it.
  int64_t largest = 0;  ///< Largest single allocation.
};

template <typename Work>
Usage measure(Work&& work) {
#ifdef MLA_COUNT_ALLOCATIONS
  const int64_t before = live_bytes;
  peak_bytes = before;
  largest_bytes = 0;
  work();
  return {peak_bytes - before, largest_bytes};
#else
  work();
  return {};
#endif
}

#ifdef MLA_COUNT_ALLOCATIONS
#define MLA_NEEDS_COUNTER() (void)0
#else
#define MLA_NEEDS_COUNTER() GTEST_SKIP() << "no allocation counter in this build"
#endif

// ---- data -------------------------------------------------------------------------------------

template <typename T>
Matrix<T> random_matrix(Eigen::Index rows, Eigen::Index cols, double deviation,
                        std::mt19937_64& random) {
  std::normal_distribution<double> normal(0, deviation);
  return Matrix<T>::NullaryExpr(rows, cols, [&] { return static_cast<T>(normal(random)); });
}

/// Keeps values of about 1 at about 1.
template <typename T>
Linear<T> random_linear(Eigen::Index in, Eigen::Index out, bool with_bias,
                        std::mt19937_64& random) {
  Linear<T> linear{random_matrix<T>(in, out, 1 / std::sqrt(double(in)), random), {}};
  if (with_bias) linear.bias = random_matrix<T>(1, out, 0.5, random);
  return linear;
}

/// Scores of deviation 2: a softmax that is neither flat nor a single token.
template <typename T>
LatentWeights<T> random_latent(Eigen::Index d_model, Eigen::Index width, bool with_bias,
                               uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto full = [&] { return random_linear<T>(d_model, d_model, with_bias, random); };
  const auto latent = [&] { return random_linear<T>(d_model, width, with_bias, random); };
  LatentWeights<T> weights;
  weights.query = full();
  weights.key = full();
  weights.value = full();
  weights.latent_query = latent();
  weights.latent_query.weight *= T{2};
  weights.latent_key = latent();
  weights.latent_value = latent();
  weights.reconstruction = random_linear<T>(width, d_model, with_bias, random);
  weights.output = full();
  return weights;
}

template <typename T>
MultiHeadWeights<T> random_multi_head(Eigen::Index d_model, Eigen::Index heads,
                                      Eigen::Index head_dim, bool with_bias, uint64_t seed) {
  std::mt19937_64 random(seed);
  const Eigen::Index width = heads * head_dim;
  MultiHeadWeights<T> weights;
  weights.num_heads = heads;
  weights.query = random_linear<T>(d_model, width, with_bias, random);
  weights.query.weight *= T{2};
  weights.key = random_linear<T>(d_model, width, with_bias, random);
  weights.value = random_linear<T>(d_model, width, with_bias, random);
  weights.output = random_linear<T>(width, d_model, with_bias, random);
  return weights;
}

template <typename T>
Matrix<T> random_tokens(Eigen::Index tokens, Eigen::Index d_model, uint64_t seed) {
  std::mt19937_64 random(seed);
  return random_matrix<T>(tokens, d_model, 1, random);
}

/// About a third of the tokens are visible, every seventh query sees none, and there is no pattern.
Mask scattered() {
  return Mask::where([](int64_t query, int64_t token) {
    if (query % 7 == 3) return false;
    const uint64_t hash =
        (uint64_t(query) * 0x9E3779B97F4A7C15ull) ^ (uint64_t(token + 1) * 0xC2B2AE3D27D4EB4Full);
    return (hash >> 40) % 3 == 0;
  });
}

std::vector<std::pair<std::string, Mask>> masks() {
  return {{"all", Mask()}, {"causal", Mask::causal()}, {"scattered", scattered()}};
}

double max_error(const auto& a, const auto& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return HUGE_VAL;
  const double error = double((a - b).cwiseAbs().maxCoeff());
  return a.allFinite() && b.allFinite() ? error : HUGE_VAL;
}

// ---- the formula in plain loops, sharing no line with the code under test ---------------------

using Rows = std::vector<std::vector<double>>;

Rows loops_linear(const Linear<double>& linear, const Rows& x) {
  Rows y;
  for (const auto& row : x) {
    std::vector<double> out;
    for (Eigen::Index c = 0; c < linear.weight.cols(); ++c) {
      double sum = linear.bias.size() > 0 ? linear.bias(c) : 0;
      for (size_t i = 0; i < row.size(); ++i) sum += row[i] * linear.weight(Eigen::Index(i), c);
      out.push_back(sum);
    }
    y.push_back(out);
  }
  return y;
}

/// Columns [first, first + dim) of q, k and v.
Rows loops_head(const Rows& q, const Rows& k, const Rows& v, size_t first, size_t dim,
                const Mask& mask) {
  Rows o(q.size(), std::vector<double>(dim, 0.0));
  for (size_t i = 0; i < q.size(); ++i) {
    double sum = 0;  // no maximum is subtracted, because the scores of these tests are small
    for (size_t t = 0; t < k.size(); ++t) {
      if (!mask.visible(int64_t(i), int64_t(t))) continue;
      double score = 0;
      for (size_t c = first; c < first + dim; ++c) score += q[i][c] * k[t][c];
      const double weight = std::exp(score / std::sqrt(double(dim)));
      sum += weight;
      for (size_t c = 0; c < dim; ++c) o[i][c] += weight * v[t][first + c];
    }
    for (double& value : o[i]) value = sum > 0 ? value / sum : 0;
  }
  return o;
}

Rows to_rows(const Matrix<double>& matrix) {
  Rows rows;
  for (Eigen::Index r = 0; r < matrix.rows(); ++r) {
    rows.emplace_back(matrix.row(r).begin(), matrix.row(r).end());
  }
  return rows;
}

Matrix<double> to_matrix(const Rows& rows) {
  Matrix<double> matrix(Eigen::Index(rows.size()), Eigen::Index(rows[0].size()));
  for (Eigen::Index r = 0; r < matrix.rows(); ++r) {
    for (Eigen::Index c = 0; c < matrix.cols(); ++c) matrix(r, c) = rows[size_t(r)][size_t(c)];
  }
  return matrix;
}

Matrix<double> loops(const LatentWeights<double>& w, const Matrix<double>& x, const Mask& mask) {
  const Rows rows = to_rows(x);
  const Rows q = loops_linear(w.latent_query, loops_linear(w.query, rows));
  const Rows k = loops_linear(w.latent_key, loops_linear(w.key, rows));
  const Rows v = loops_linear(w.latent_value, loops_linear(w.value, rows));
  const Rows o = loops_head(q, k, v, 0, q[0].size(), mask);
  return to_matrix(loops_linear(w.output, loops_linear(w.reconstruction, o)));
}

Matrix<double> loops(const MultiHeadWeights<double>& w, const Matrix<double>& x, const Mask& mask) {
  const Rows rows = to_rows(x);
  const Rows q = loops_linear(w.query, rows);
  const Rows k = loops_linear(w.key, rows);
  const Rows v = loops_linear(w.value, rows);
  const size_t dim = q[0].size() / size_t(w.num_heads);
  Rows all(rows.size());
  for (size_t head = 0; head < size_t(w.num_heads); ++head) {
    const Rows o = loops_head(q, k, v, head * dim, dim, mask);
    for (size_t i = 0; i < all.size(); ++i) all[i].insert(all[i].end(), o[i].begin(), o[i].end());
  }
  return to_matrix(loops_linear(w.output, all));
}

// ---- the function -----------------------------------------------------------------------------

struct LatentCase {
  Eigen::Index tokens, d_model, width;
};
constexpr LatentCase kLatentCases[] = {
    {1, 4, 1}, {5, 8, 2}, {33, 24, 6}, {70, 48, 48}, {97, 64, 8}};

TEST(Latent, PlainIsTheFormula) {
  uint64_t seed = 1;
  for (const auto& [tokens, d_model, width] : kLatentCases) {
    for (const bool with_bias : {false, true}) {
      const auto weights = random_latent<double>(d_model, width, with_bias, ++seed);
      const auto x = random_tokens<double>(tokens, d_model, ++seed);
      for (const auto& [name, mask] : masks()) {
        Matrix<double> y;
        const Status status = attend_plain(weights, x, mask, &y);
        ASSERT_OK(status);
        EXPECT_LT(max_error(y, loops(weights, x, mask)), 1e-12) << tokens << " " << name;
      }
    }
  }
}

TEST(Latent, ChunkedEqualsPlain) {
  uint64_t seed = 100;
  double worst = 0;
  for (const auto& [tokens, d_model, width] :
       {LatentCase{1, 4, 1}, {33, 24, 6}, {300, 96, 16}, {1500, 64, 8}}) {
    const auto weights = random_latent<double>(d_model, width, true, ++seed);
    FusedLatentWeights<double> fused;
    ASSERT_OK(fuse(weights, &fused));
    ASSERT_EQ(fused.projection.weight.cols(), d_model + 3 * width);
    const auto x = random_tokens<double>(tokens, d_model, ++seed);
    for (const auto& [name, mask] : masks()) {
      Matrix<double> plain;
      ASSERT_OK(attend_plain(weights, x, mask, &plain));
      for (const int64_t chunk : {int64_t{1}, int64_t{7}, int64_t{128}, int64_t{1024}}) {
        if (chunk == 1 && tokens > 300) continue;  // slow, and nothing new
        for (const int threads : {1, 3}) {
          Matrix<double> y;
          const Status status =
              attend_chunked(fused, x, mask, {.chunk_size = chunk, .num_threads = threads}, &y);
          ASSERT_OK(status);
          const double error = max_error(y, plain);
          worst = std::max(worst, error);
          EXPECT_LT(error, 1e-10) << tokens << " " << name << " chunk " << chunk;
        }
      }
    }
  }
  RecordProperty("max_error", std::to_string(worst));
  std::printf("chunked against plain, double: max error %.1e\n", worst);
}

TEST(Latent, FloatFollowsDouble) {
  const auto weights = random_latent<double>(96, 16, true, 7);
  const auto x = random_tokens<double>(300, 96, 8);
  LatentWeights<float> narrow;
  const auto cast = [](const Linear<double>& from, Linear<float>* to) {
    to->weight = from.weight.cast<float>();
    to->bias = from.bias.cast<float>();
  };
  cast(weights.query, &narrow.query);
  cast(weights.key, &narrow.key);
  cast(weights.value, &narrow.value);
  cast(weights.latent_query, &narrow.latent_query);
  cast(weights.latent_key, &narrow.latent_key);
  cast(weights.latent_value, &narrow.latent_value);
  cast(weights.reconstruction, &narrow.reconstruction);
  cast(weights.output, &narrow.output);
  FusedLatentWeights<float> fused;
  ASSERT_OK(fuse(narrow, &fused));
  Matrix<double> truth;
  Matrix<float> plain, chunked;
  ASSERT_OK(attend_plain(weights, x, Mask::causal(), &truth));
  const Matrix<float> x_narrow = x.cast<float>();
  ASSERT_OK(attend_plain(narrow, x_narrow, Mask::causal(), &plain));
  ASSERT_OK(attend_chunked(fused, x_narrow, Mask::causal(), {.chunk_size = 64}, &chunked));
  EXPECT_LT(max_error(plain.cast<double>(), truth), 5e-5);
  EXPECT_LT(max_error(chunked.cast<double>(), truth), 5e-5);
}

TEST(Latent, FirstColumnsCarryTheFullQuery) {
  const auto weights = random_latent<double>(48, 6, true, 11);
  FusedLatentWeights<double> fused;
  ASSERT_OK(fuse(weights, &fused));
  const auto x = random_tokens<double>(100, 48, 12);
  Matrix<double> without, y, full_query;
  ASSERT_OK(attend_chunked(fused, x, {}, {.chunk_size = 32}, &without));
  ASSERT_OK(attend_chunked(fused, x, {}, {.chunk_size = 32}, &y, &full_query));
  const Matrix<double> expected = (x * weights.query.weight).rowwise() + weights.query.bias;
  EXPECT_LT(max_error(full_query, expected), 1e-12);
  EXPECT_EQ(max_error(y, without), 0);

  // One product gives all four: [ Q | q | k | v ] = x F + f.
  const Matrix<double> all = (x * fused.projection.weight).rowwise() + fused.projection.bias;
  const Matrix<double> full_v = (x * weights.value.weight).rowwise() + weights.value.bias;
  const Matrix<double> v =
      (full_v * weights.latent_value.weight).rowwise() + weights.latent_value.bias;
  EXPECT_LT(max_error(all.leftCols(48), expected), 1e-12);
  EXPECT_LT(max_error(all.rightCols(6), v), 1e-12);
}

TEST(Latent, KnowsNoPositions) {
  const auto weights = random_latent<double>(32, 4, false, 13);
  const auto x = random_tokens<double>(40, 32, 14);
  Matrix<double> y, y_reversed;
  ASSERT_OK(attend_plain(weights, x, {}, &y));
  const Matrix<double> reversed = x.colwise().reverse();
  ASSERT_OK(attend_plain(weights, reversed, {}, &y_reversed));
  EXPECT_LT(max_error(y_reversed.colwise().reverse().eval(), y), 1e-12);
}

TEST(Latent, CausalQueriesSeeNothingLater) {
  const auto weights = random_latent<double>(32, 4, true, 15);
  FusedLatentWeights<double> fused;
  ASSERT_OK(fuse(weights, &fused));
  const auto x = random_tokens<double>(130, 32, 16);
  Matrix<double> changed = x;
  changed.bottomRows(60).setConstant(3);
  Matrix<double> y, y_changed;
  ASSERT_OK(attend_chunked(fused, x, Mask::causal(), {.chunk_size = 50}, &y));
  ASSERT_OK(attend_chunked(fused, changed, Mask::causal(), {.chunk_size = 50}, &y_changed));
  EXPECT_EQ(max_error(y.topRows(70), y_changed.topRows(70)), 0);
  EXPECT_GT(max_error(y.bottomRows(60), y_changed.bottomRows(60)), 0.1);
}

TEST(Latent, AQueryThatSeesNothingIsTheBiasAlone) {
  const auto weights = random_latent<double>(16, 4, true, 17);
  FusedLatentWeights<double> fused;
  ASSERT_OK(fuse(weights, &fused));
  const auto x = random_tokens<double>(9, 16, 18);
  const Mask nothing = Mask::where([](int64_t, int64_t) { return false; });
  const RowVector<double> expected =
      weights.reconstruction.bias * weights.output.weight + weights.output.bias;
  Matrix<double> plain, chunked;
  ASSERT_OK(attend_plain(weights, x, nothing, &plain));
  ASSERT_OK(attend_chunked(fused, x, nothing, {.chunk_size = 4}, &chunked));
  EXPECT_LT(max_error(plain, expected.replicate(9, 1)), 1e-12);
  EXPECT_LT(max_error(chunked, expected.replicate(9, 1)), 1e-12);
}

TEST(Latent, LargeScoresDoNotOverflowAndNaNShows) {
  auto weights = random_latent<double>(16, 4, false, 19);
  weights.latent_query.weight *= 1e4;  // scores of thousands: exp alone would be infinite
  FusedLatentWeights<double> fused;
  ASSERT_OK(fuse(weights, &fused));
  auto x = random_tokens<double>(20, 16, 20);
  Matrix<double> y;
  ASSERT_OK(attend_chunked(fused, x, {}, {}, &y));
  EXPECT_TRUE(y.allFinite());
  x(3, 5) = std::numeric_limits<double>::quiet_NaN();
  ASSERT_OK(attend_chunked(fused, x, {}, {}, &y));
  EXPECT_TRUE(y.array().isNaN().all());
}

TEST(Latent, InputAndOutputMayBeTheSameMatrix) {
  const auto weights = random_latent<double>(16, 4, true, 21);
  Matrix<double> x = random_tokens<double>(20, 16, 22);
  Matrix<double> y;
  ASSERT_OK(attend_plain(weights, x, {}, &y));
  ASSERT_OK(attend_plain(weights, x, {}, &x));
  EXPECT_EQ(max_error(x, y), 0);
}

TEST(MultiHead, PlainIsTheFormulaAndChunkedEqualsIt) {
  uint64_t seed = 200;
  for (const Eigen::Index head_dim : {64, 128}) {
    for (const Eigen::Index heads : {1, 3}) {
      for (const Eigen::Index tokens : {1, 45, 140}) {
        const auto weights = random_multi_head<double>(80, heads, head_dim, tokens != 45, ++seed);
        const auto x = random_tokens<double>(tokens, 80, ++seed);
        for (const auto& [name, mask] : masks()) {
          Matrix<double> plain, chunked;
          Status status = attend_plain(weights, x, mask, &plain);
          ASSERT_OK(status);
          EXPECT_LT(max_error(plain, loops(weights, x, mask)), 1e-12) << name;
          for (const int64_t chunk : {1, 33, 1024}) {
            status =
                attend_chunked(weights, x, mask, {.chunk_size = chunk, .num_threads = 2}, &chunked);
            ASSERT_OK(status);
            EXPECT_LT(max_error(chunked, plain), 1e-10) << name << " chunk " << chunk;
          }
        }
      }
    }
  }
}

/// The latent layer equals a multi-head layer with one head of width D', whose matrices are products
/// of the latent layer's. So its weights can express no more than that.
TEST(MultiHead, OneHeadOfProductsIsTheLatentLayer) {
  const auto latent = random_latent<double>(40, 8, false, 23);
  MultiHeadWeights<double> one_head;
  one_head.num_heads = 1;
  one_head.query.weight = latent.query.weight * latent.latent_query.weight;
  one_head.key.weight = latent.key.weight * latent.latent_key.weight;
  one_head.value.weight = latent.value.weight * latent.latent_value.weight;
  one_head.output.weight = latent.reconstruction.weight * latent.output.weight;
  const auto x = random_tokens<double>(50, 40, 24);
  Matrix<double> y_latent, y_head;
  ASSERT_OK(attend_plain(latent, x, Mask::causal(), &y_latent));
  ASSERT_OK(attend_plain(one_head, x, Mask::causal(), &y_head));
  EXPECT_LT(max_error(y_latent, y_head), 1e-12);
}

// ---- memory -----------------------------------------------------------------------------------

TEST(Memory, TheCounterCounts) {
  MLA_NEEDS_COUNTER();
  const Usage usage = measure([] {
    const Matrix<double> first = Matrix<double>::Zero(1000, 100);
    { const Matrix<double> second = Matrix<double>::Zero(100, 100); }
    { const Matrix<double> third = Matrix<double>::Zero(100, 100); }
    std::vector<char> fourth(1000);
    EXPECT_EQ(fourth[0] + first(0, 0), 0);
  });
  EXPECT_GE(usage.largest, 800000);
  EXPECT_LT(usage.largest, 810000);
  EXPECT_GE(usage.peak, 880000);
  EXPECT_LT(usage.peak, 900000);
}

/// A layer's chunked form: its peak and its largest allocation are compared with the bound, with
/// [N, N], and at N tokens with those at 2N.
template <typename T, typename Weights>
void check_memory(const Weights& weights, Eigen::Index d_model, const Mask& mask, int threads) {
  const ChunkOptions options{.chunk_size = 128, .num_threads = threads};
  int64_t last_peak = 0;
  for (const int64_t tokens : {1024, 2048, 4096}) {
    const auto x = random_tokens<T>(tokens, d_model, 31);
    Matrix<T> y;
    Status status;
    const Usage usage = measure([&] { status = attend_chunked(weights, x, mask, options, &y); });
    ASSERT_OK(status);
    const int64_t square = tokens * tokens * int64_t{sizeof(T)};
    const int64_t bound = chunked_memory_bound(weights, tokens, options);
    EXPECT_LT(usage.largest, square / 4) << tokens;
    EXPECT_LE(usage.peak, bound) << tokens;
    EXPECT_LE(chunked_memory_bound(weights, 2 * tokens, options), 2 * bound) << tokens;
    if (threads == 1) {  // with more, the peak is lower if products happen not to overlap in time
      EXPECT_GE(usage.peak, bound / 2) << tokens << ": the bound is too loose";
      EXPECT_LE(usage.peak, last_peak == 0 ? bound : 2 * last_peak) << tokens;
    }
    last_peak = usage.peak;
  }
}

TEST(Memory, ChunkedLatentIsLinear) {
  MLA_NEEDS_COUNTER();
  FusedLatentWeights<double> fused;
  ASSERT_OK(fuse(random_latent<double>(64, 8, true, 32), &fused));
  for (const int threads : {1, 2}) {
    check_memory<double>(fused, 64, Mask(), threads);
    check_memory<double>(fused, 64, Mask::causal(), threads);
    check_memory<double>(fused, 64, scattered(), threads);
  }
  FusedLatentWeights<float> narrow;
  ASSERT_OK(fuse(random_latent<float>(64, 8, false, 33), &narrow));
  check_memory<float>(narrow, 64, Mask::causal(), 2);
}

TEST(Memory, ChunkedMultiHeadIsLinear) {
  MLA_NEEDS_COUNTER();
  for (const int threads : {1, 2}) {
    const auto one_of_64 = random_multi_head<double>(64, 1, 64, true, 34);
    check_memory<double>(one_of_64, 64, Mask::causal(), threads);
    const auto one_of_128 = random_multi_head<double>(64, 1, 128, false, 35);
    check_memory<double>(one_of_128, 64, Mask(), threads);
  }
}

TEST(Memory, TheDefaultChunkHoldsAtLength) {
  MLA_NEEDS_COUNTER();
  FusedLatentWeights<float> fused;
  ASSERT_OK(fuse(random_latent<float>(32, 8, true, 36), &fused));
  const int64_t tokens = 8192;  // at 4096 a chunk of 1024 is a quarter of [N, N]
  const auto x = random_tokens<float>(tokens, 32, 37);
  const ChunkOptions options{.num_threads = 2};
  Matrix<float> y;
  const Usage usage =
      measure([&] { ASSERT_OK(attend_chunked(fused, x, Mask::causal(), options, &y)); });
  EXPECT_LT(usage.largest, tokens * tokens * int64_t{sizeof(float)} / 4);
  EXPECT_LE(usage.peak, chunked_memory_bound(fused, tokens, options));
}

TEST(Memory, PlainHasTheWholeScoreMatrix) {
  MLA_NEEDS_COUNTER();
  const auto weights = random_latent<double>(32, 8, true, 38);
  const auto x = random_tokens<double>(1024, 32, 39);
  Matrix<double> y;
  const Usage usage = measure([&] { ASSERT_OK(attend_plain(weights, x, Mask::causal(), &y)); });
  EXPECT_GE(usage.largest, 1024 * 1024 * 8);
}

TEST(Memory, AMaskBringsNone) {
  MLA_NEEDS_COUNTER();
  FusedLatentWeights<double> fused;
  ASSERT_OK(fuse(random_latent<double>(32, 4, false, 40), &fused));
  const auto x = random_tokens<double>(1000, 32, 41);
  const ChunkOptions options{.chunk_size = 100, .num_threads = 1};
  Matrix<double> y;
  const auto peak = [&](const Mask& mask) {
    y.resize(0, 0);
    return measure([&] { ASSERT_OK(attend_chunked(fused, x, mask, options, &y)); }).peak;
  };
  const Mask mask = scattered();
  EXPECT_EQ(peak(mask), peak(Mask()));
}

// ---- bad input --------------------------------------------------------------------------------

void expect_invalid(const Status& status, const std::string& message) {
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), message);
}

class BadInput : public testing::Test {
 protected:
  BadInput() { EXPECT_OK(fuse(weights_, &fused_)); }
  ~BadInput() override { EXPECT_EQ(y_(0, 0), 42) << "y was written"; }

  LatentWeights<double> weights_ = random_latent<double>(16, 4, true, 50);
  FusedLatentWeights<double> fused_;
  MultiHeadWeights<double> heads_ = random_multi_head<double>(16, 2, 64, true, 51);
  Matrix<double> x_ = random_tokens<double>(5, 16, 52);
  Matrix<double> y_ = Matrix<double>::Constant(1, 1, 42);
};

TEST_F(BadInput, Width) {
  int64_t width = 7;
  ASSERT_OK(default_latent_width(7168, 128, &width));
  EXPECT_EQ(width, 56);
  expect_invalid(default_latent_width(7168, 100, &width),
                 "num_heads = 100 must divide d_model = 7168");
  expect_invalid(default_latent_width(7168, 0, &width), "num_heads = 0 must divide d_model = 7168");
  expect_invalid(default_latent_width(0, 1, &width), "d_model = 0 must be at least 1");
  expect_invalid(default_latent_width(8, 1, nullptr), "width is null");
  EXPECT_EQ(width, 56);
}

TEST_F(BadInput, LatentWeightShapes) {
  const auto expect = [&](auto change, const std::string& message) {
    LatentWeights<double> bad = weights_;
    change(bad);
    FusedLatentWeights<double> out;
    expect_invalid(attend_plain(bad, x_, {}, &y_), message);
    expect_invalid(fuse(bad, &out), message);
    EXPECT_EQ(out.projection.weight.size(), 0);
  };
  expect([](auto& w) { w.query.weight.resize(0, 0); },
         "query.weight is empty; d_model must be at least 1");
  expect([](auto& w) { w.key.weight.resize(16, 15); },
         "key.weight is [16, 15]; it must be [d_model, d_model] = [16, 16]");
  expect([](auto& w) { w.value.bias.resize(15); },
         "value.bias has 15 values; it must have none or 16");
  expect([](auto& w) { w.latent_query.weight.resize(16, 0); },
         "latent_query.weight has no columns; D' must be at least 1");
  expect([](auto& w) { w.latent_key.weight.resize(16, 3); },
         "latent_key.weight is [16, 3]; it must be [d_model, D'] = [16, 4]");
  expect([](auto& w) { w.reconstruction.weight.resize(3, 16); },
         "reconstruction.weight is [3, 16]; it must be [D', d_model] = [4, 16]");
  expect([](auto& w) { w.output.weight.resize(16, 17); },
         "output.weight is [16, 17]; it must be [d_model, d_model] = [16, 16]");
  expect_invalid(fuse<double>(weights_, nullptr), "fused is null");
}

TEST_F(BadInput, FusedWeightShapes) {
  FusedLatentWeights<double> bad = fused_;
  bad.projection.weight.resize(16, 12);
  expect_invalid(attend_chunked(bad, x_, {}, {}, &y_),
                 "projection.weight is [16, 12]; it must be [d_model, d_model + 3D'] = [16, 28]");
  bad = fused_;
  bad.reconstruction.weight.resize(0, 16);
  expect_invalid(attend_chunked(bad, x_, {}, {}, &y_),
                 "reconstruction.weight is [0, 16]; D' and d_model must be at least 1");
}

TEST_F(BadInput, MultiHeadWeightShapes) {
  const auto expect = [&](auto change, const std::string& message) {
    MultiHeadWeights<double> bad = heads_;
    change(bad);
    expect_invalid(attend_plain(bad, x_, {}, &y_), message);
    expect_invalid(attend_chunked(bad, x_, {}, {}, &y_), message);
  };
  expect([](auto& w) { w.num_heads = 3; },
         "num_heads = 3 must divide the 128 columns of query.weight");
  expect([](auto& w) { w.num_heads = 0; },
         "num_heads = 0 must divide the 128 columns of query.weight");
  expect([](auto& w) { w.value.weight.resize(16, 64); },
         "value.weight is [16, 64]; it must be [d_model, heads head_dim] = [16, 128]");
  expect([](auto& w) { w.output.weight.resize(16, 128); },
         "output.weight is [16, 128]; it must be [heads head_dim, d_model] = [128, 16]");
  expect([](auto& w) { w.query.weight.resize(16, 0); },
         "query.weight is empty; it must be [d_model, heads head_dim]");
}

TEST_F(BadInput, Calls) {
  const auto expect = [&](const Matrix<double>& x, const Mask& mask, const ChunkOptions& options,
                          Matrix<double>* y, const std::string& message) {
    expect_invalid(attend_chunked(fused_, x, mask, options, y), message);
    expect_invalid(attend_chunked(heads_, x, mask, options, y), message);
    if (options.chunk_size < 1) return;
    expect_invalid(attend_plain(weights_, x, mask, y, options.num_threads), message);
    expect_invalid(attend_plain(heads_, x, mask, y, options.num_threads), message);
  };
  expect(Matrix<double>(0, 16), {}, {}, &y_, "x has no rows; it must have at least one token");
  expect(Matrix<double>(5, 15), {}, {}, &y_, "x is [5, 15]; it must have d_model = 16 columns");
  expect(x_, Mask::where(nullptr), {}, &y_, "the predicate of mask is empty");
  expect(x_, {}, {.chunk_size = 0}, &y_, "chunk_size = 0 must be at least 1");
  expect(x_, {}, {.num_threads = -1}, &y_, "num_threads = -1 must be at least 0");
  expect(x_, {}, {}, nullptr, "y is null");
  expect_invalid(attend_chunked(fused_, x_, {}, {}, &y_, &y_),
                 "full_query and y are the same matrix; they must differ");
}

TEST_F(BadInput, WhatAPredicateThrowsReachesTheCaller) {
  const Mask throws = Mask::where([](int64_t query, int64_t) {
    return query == 3 ? throw std::runtime_error("no row") : true;
  });
  EXPECT_THROW((void)attend_plain(weights_, x_, throws, &y_, 2), std::runtime_error);
  EXPECT_THROW((void)attend_chunked(fused_, x_, throws, {}, &y_), std::runtime_error);
}

// ---- the chapter's table: run with --gtest_also_run_disabled_tests --gtest_filter=*Table ------

TEST(Memory, DISABLED_Table) {
  MLA_NEEDS_COUNTER();
  constexpr Eigen::Index kDModel = 1024;
  constexpr int kThreads = 2;
  const auto latent = random_latent<double>(kDModel, 64, false, 60);
  FusedLatentWeights<double> fused;
  ASSERT_OK(fuse(latent, &fused));
  const auto heads_64 = random_multi_head<double>(kDModel, 16, 64, false, 61);
  const auto heads_128 = random_multi_head<double>(kDModel, 8, 128, false, 62);
  std::printf("double, d_model %d, causal, %d threads\n", int(kDModel), kThreads);
  std::printf("%6s  %-26s %10s %10s %10s %8s %8s\n", "N", "layer", "peak MB", "bound MB",
              "largest MB", "time s", "CPU s");
  for (const int64_t tokens : {1024, 2048, 4096}) {
    const auto x = random_tokens<double>(tokens, kDModel, 63);
    Matrix<double> plain_result;
    const auto line = [&](const std::string& name, int64_t bound, auto run) {
      Matrix<double> y;
      Usage usage;
      double seconds = HUGE_VAL;
      double cpu_seconds = HUGE_VAL;  // of all threads; shows whether other programs took cores
      for (int repeat = 0; repeat < 3; ++repeat) {
        y.resize(0, 0);
        const std::clock_t cpu_start = std::clock();
        const auto start = std::chrono::steady_clock::now();
        usage = measure([&] { ASSERT_OK(run(&y)); });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        seconds = std::min(seconds, took.count());
        cpu_seconds = std::min(cpu_seconds, double(std::clock() - cpu_start) / CLOCKS_PER_SEC);
      }
      if (bound == 0) {
        plain_result = y;
      } else {
        EXPECT_LT(max_error(y, plain_result), 1e-10);
        EXPECT_LE(usage.peak, bound);
      }
      const std::string limit = bound == 0 ? "-" : std::to_string(bound / 1'000'000);
      std::printf("%6d  %-26s %10.1f %10s %10.1f %8.3f %8.3f\n", int(tokens), name.c_str(),
                  double(usage.peak) / 1e6, limit.c_str(), double(usage.largest) / 1e6, seconds,
                  cpu_seconds);
      std::fflush(stdout);
    };
    const Mask mask = Mask::causal();
    line("latent, plain", 0,
         [&](Matrix<double>* y) { return attend_plain(latent, x, mask, y, kThreads); });
    for (const int64_t chunk : {1024, 128}) {
      const ChunkOptions options{.chunk_size = chunk, .num_threads = kThreads};
      line("latent, chunk " + std::to_string(chunk), chunked_memory_bound(fused, tokens, options),
           [&](Matrix<double>* y) { return attend_chunked(fused, x, mask, options, y); });
    }
    for (const auto* heads : {&heads_64, &heads_128}) {
      const std::string name = std::to_string(heads->num_heads) + " heads of " +
                               std::to_string(heads->query.weight.cols() / heads->num_heads);
      line(name + ", plain", 0,
           [&](Matrix<double>* y) { return attend_plain(*heads, x, mask, y, kThreads); });
      for (const int64_t chunk : {1024, 128}) {
        const ChunkOptions options{.chunk_size = chunk, .num_threads = kThreads};
        line(name + ", chunk " + std::to_string(chunk),
             chunked_memory_bound(*heads, tokens, options),
             [&](Matrix<double>* y) { return attend_chunked(*heads, x, mask, options, y); });
      }
    }
  }
}

}  // namespace
}  // namespace mla::traditional
