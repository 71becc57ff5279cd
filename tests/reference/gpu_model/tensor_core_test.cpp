/// @file
/// mma, ldmatrix, cp.async and named barriers on the GPU model. Right kernels give right results
/// under every schedule. Each wrong one lacks one statement of a right one, and is rejected.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "stages/common/ptx/ptx.h"
#include "tests/reference/gpu_model/gpu_model_fixture.h"

namespace gpu_model_test {
namespace {

namespace ptx = mla::model::ptx;
using mla::bfloat16;
using mla::float16;
using mla::from_float;
using mla::to_float;

template <typename T>
std::vector<T> random_values(size_t count) {
  std::mt19937 random(static_cast<unsigned>(count));
  std::vector<T> values;
  while (values.size() < count) {
    const float fraction = static_cast<float>(random()) * 0x1p-31f - 1;
    values.push_back(from_float<T>(std::ldexp(fraction, static_cast<int>(random() % 8) - 4)));
  }
  return values;
}

/// a[rows, depth] b[depth, columns], row-major, in double.
template <typename T>
std::vector<double> product(const T* a, const T* b, size_t rows, size_t columns, size_t depth) {
  std::vector<double> d(rows * columns);
  for (size_t i = 0; i < d.size(); ++i) {
    for (size_t k = 0; k < depth; ++k) {
      d[i] += static_cast<double>(to_float(a[i / columns * depth + k])) *
              static_cast<double>(to_float(b[k * columns + i % columns]));
    }
  }
  return d;
}

/// Two values as one register.
template <typename T>
uint32_t pair(T low, T high) {
  const T values[2] = {low, high};
  uint32_t result;
  std::memcpy(&result, values, sizeof result);
  return result;
}

class TensorCore : public GpuModel {
 protected:
  /// A function of the seed that runs `kernel` and says what is wrong: the error, or what `check()`
  /// returns.
  template <typename Kernel, typename Check>
  static auto runs(unsigned threads, size_t shared_bytes, Kernel kernel, Check check) {
    return [=](uint64_t seed) -> std::string {
      gpu_model::schedule().seed = seed;
      const std::string error = error_of(1, threads, shared_bytes, kernel);
      return error.empty() ? check() : error;
    };
  }

  template <typename Run>
  static void expect_right(Run run) {
    for (uint64_t seed = 0; seed < 2 * kSeeds; ++seed) EXPECT_EQ(run(seed), "") << "seed " << seed;
  }

  /// Expects the race detector to find a fault under every seed. Without it, at least one
  /// seed must show the fault.
  template <typename Run>
  static void expect_wrong(Run run) {
    if (gpu_model::kernels_are_instrumented()) {
      for (uint64_t seed = 0; seed < kSeeds; ++seed) EXPECT_NE(run(seed), "") << "seed " << seed;
    }
    gpu_model::schedule().detect_races = false;
    int rejected = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) rejected += !run(seed).empty();
    EXPECT_GE(rejected, 1);
    gpu_model::schedule() = {};
    RecordProperty("seeds_that_found_it", rejected);
  }
};

// ---------------------------------------------------------------------------------------------------------------
// Fragments.

/// Each warp multiplies its own a[16][16] and b[16][8], and adds c.
template <typename T>
__global__ void multiply(const T* a, const T* b, float c, float* out) {
  const unsigned warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, pair_of = threadIdx.x % 4 * 2;
  a += warp * 256;
  b += warp * 128;
  out += warp * 128;
  uint32_t a_registers[4], b_registers[2];
  for (unsigned i = 0; i < 4; ++i) {
    const T* element = a + (row + i % 2 * 8) * 16 + pair_of + i / 2 * 8;
    a_registers[i] = pair(element[0], element[1]);
  }
  for (unsigned i = 0; i < 2; ++i) {
    const T* element = b + (pair_of + i * 8) * 8 + row;
    b_registers[i] = pair(element[0], element[8]);
  }
  float d[4] = {c, c, c, c};
  ptx::mma_m16n8k16<T>(d, a_registers, b_registers[0], b_registers[1]);
  for (unsigned i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + pair_of + i % 2] = d[i];
}

template <typename T>
class Mma : public TensorCore {};
using Types = testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(Mma, Types);

TYPED_TEST(Mma, IsAMatrixProduct) {
  const std::vector<TypeParam> a = random_values<TypeParam>(2 * 256),
                               b = random_values<TypeParam>(2 * 128);
  GlobalArray<float> out(2 * 128);
  const auto kernel = [&] { multiply(a.data(), b.data(), 3.0f, out.data()); };
  const auto check = [&]() -> std::string {
    for (size_t warp = 0; warp < 2; ++warp) {
      const auto expected = product(&a[warp * 256], &b[warp * 128], 16, 8, 16);
      for (size_t i = 0; i < 128; ++i) {
        if (!(std::abs(static_cast<double>(out[warp * 128 + i]) - expected[i] - 3) < 1e-4)) {
          return "wrong at " + std::to_string(i);
        }
      }
    }
    out.fill(NAN);
    return {};
  };
  this->expect_right(this->runs(64, 0, kernel, check));
}

/// Every 16-bit value enters the product as Eigen converts it: subnormals, infinities and NaNs, too.
TYPED_TEST(Mma, ConvertsEveryValue) {
  std::vector<TypeParam> b(128);
  for (size_t i = 0; i < 128; ++i) b[i] = from_float<TypeParam>(i / 8 % 8 == i % 8);
  std::vector<TypeParam> a(256);
  GlobalArray<float> out(128);
  for (unsigned first = 0; first < 0x10000; first += 128) {
    for (unsigned i = 0; i < 256; ++i) {  // the second half of each row is zero
      const unsigned value = i % 16 < 8 ? first + i / 16 * 8 + i % 16 : 0;
      a[i] = std::bit_cast<TypeParam>(static_cast<uint16_t>(value));
    }
    gpu_model::launch(1, 32, 0, [&] { multiply(a.data(), b.data(), 0.0f, out.data()); });
    for (size_t i = 0; i < 128; ++i) {
      float expected = 0;
      for (size_t k = 0; k < 16; ++k) {
        expected += to_float(a[i / 8 * 16 + k]) * to_float(b[k * 8 + i % 8]);
      }
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(out[i])) << first + i;
      } else {
        ASSERT_EQ(out[i], expected) << first + i;
      }
    }
  }
}

struct MatricesSmem {
  alignas(16) uint16_t rows[32][24];  // 8 of a row's values belong to a matrix
};

__global__ void load_matrices(uint32_t* plain, uint32_t* transposed) {
  auto& smem = *shared<MatricesSmem>();
  const unsigned lane = threadIdx.x;
  for (unsigned i = 0; i < 8; ++i) smem.rows[lane][8 + i] = static_cast<uint16_t>(lane * 8 + i);
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, &smem.rows[lane][8]);
  for (unsigned i = 0; i < 4; ++i) plain[lane * 4 + i] = r[i];
  ptx::ldmatrix_x4_trans(r, &smem.rows[lane][8]);
  for (unsigned i = 0; i < 4; ++i) transposed[lane * 4 + i] = r[i];
}

TEST_F(TensorCore, LdmatrixDistributesRows) {
  GlobalArray<uint32_t> plain(128), transposed(128);
  const auto kernel = [&] { load_matrices(plain.data(), transposed.data()); };
  const auto check = [&]() -> std::string {
    const auto element = [](uint32_t matrix, uint32_t row, uint32_t column) {
      return matrix * 64 + row * 8 + column;
    };
    for (uint32_t lane = 0; lane < 32; ++lane) {
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t first = lane / 4, second = lane % 4 * 2;
        const bool right = plain[lane * 4 + i] ==
                               (element(i, first, second) | element(i, first, second + 1) << 16) &&
                           transposed[lane * 4 + i] ==
                               (element(i, second, first) | element(i, second + 1, first) << 16);
        if (!right) return "wrong in lane " + std::to_string(lane);
      }
    }
    return {};
  };
  expect_right(runs(32, sizeof(MatricesSmem), kernel, check));
}

TEST_F(TensorCore, Ex2) {
  EXPECT_EQ(ptx::ex2_approx(-3), 0.125f);
  EXPECT_EQ(ptx::ex2_approx(-INFINITY), 0);
}

template <typename T>
float fma_of(float a, float b, float c) {
  const auto both = [](float x) { return pair(from_float<T>(x), from_float<T>(-x)); };
  const uint32_t d = ptx::fma_rn_x2<T>(both(a), pair(from_float<T>(b), from_float<T>(b)), both(c));
  const float low = to_float(std::bit_cast<T>(static_cast<uint16_t>(d)));
  const float high = to_float(std::bit_cast<T>(static_cast<uint16_t>(d >> 16)));
  EXPECT_TRUE(high == -low || std::isnan(low)) << low << ' ' << high;
  return low;
}

TEST_F(TensorCore, FmaRoundsOnce) {
  EXPECT_EQ(fma_of<bfloat16>(3, 5, 7), 22);
  EXPECT_EQ(fma_of<float16>(3, 5, 7), 22);
  // Ties go to the even number. An addend breaks a tie even if it is far too small to be seen
  // otherwise.
  EXPECT_EQ(fma_of<bfloat16>(129, 129, 63), 16640);
  EXPECT_EQ(fma_of<bfloat16>(1, 256, 1), 256);
  EXPECT_EQ(fma_of<bfloat16>(9, 29, 0), 260);
  EXPECT_EQ(fma_of<bfloat16>(9, 29, 0x1p-100f), 262);
  EXPECT_EQ(fma_of<bfloat16>(9, 29, -0x1p-100f), 260);
  EXPECT_EQ(fma_of<bfloat16>(7, 37, 0), 260);
  EXPECT_EQ(fma_of<bfloat16>(7, 37, -0x1p-100f), 258);
  EXPECT_EQ(fma_of<float16>(3, 683, 0), 2048);
  EXPECT_EQ(fma_of<float16>(3, 683, 0x1p-24f), 2050);
  // Subnormals, zeros and what is too large.
  EXPECT_EQ(fma_of<bfloat16>(0x1p-133f, 0x1p+120f, 0), 0x1p-13f);
  EXPECT_EQ(fma_of<bfloat16>(0x1p-100f, 0x1p-33f, 0), 0x1p-133f);
  EXPECT_EQ(fma_of<float16>(0x1p-24f, 0x1p+8f, 0), 0x1p-16f);
  EXPECT_TRUE(std::signbit(fma_of<bfloat16>(-0.0f, 1, -0.0f)));
  EXPECT_TRUE(std::isinf(fma_of<bfloat16>(0x1p+127f, 2, 0)));
  EXPECT_TRUE(std::isinf(fma_of<float16>(65504, 1, 16)));
  EXPECT_EQ(fma_of<float16>(65504, 1, 15.9921875f), 65504);
  EXPECT_TRUE(std::isnan(fma_of<float16>(INFINITY, 0, 1)));
}

// ---------------------------------------------------------------------------------------------------------------
// A product of [16, depth] and [depth, 64] through two stages of shared memory: a tile is copied
// while the one before it is multiplied. Every warp needs what the others copied.

enum class Without { kNothing, kWait, kLastWait, kBarrierAfterWait, kBarrierBeforeRefill };

struct PipelineSmem {
  struct Tile {
    alignas(16) bfloat16 a[16][16];
    alignas(16) bfloat16 b[16][64];
  } tiles[2];
};

int copy_line = 0, load_line = 0;  // where the kernel copies, and where it reads

template <Without kWithout>
__global__ void pipeline(const bfloat16* a, const bfloat16* b, int depth, float* out) {
  auto& smem = *shared<PipelineSmem>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int tiles = (depth + 15) / 16;
  const auto copy_tile = [&](int t) {  // zeros past the depth
    PipelineSmem::Tile& tile = smem.tiles[t % 2];
    const int row = thread / 8, column = thread % 8 * 8, k = t * 16 + row;
    ptx::cp_async_16(&tile.b[row][column], b + k * 64 + column, k < depth ? 16 : 0);
    if (thread < 32) {
      const int a_row = thread / 2, a_column = thread % 2 * 8, a_k = t * 16 + a_column;
      if (thread == 0) copy_line = __LINE__ + 1;
      ptx::cp_async_16(&tile.a[a_row][a_column], a + a_row * depth + a_k, a_k < depth ? 16 : 0);
    }
    ptx::cp_async_commit_group();
  };

  float d[2][4] = {};
  copy_tile(0);
  for (int t = 0; t < tiles; ++t) {
    const bool last = t + 1 == tiles;
    if (!last) copy_tile(t + 1);
    if (kWithout == Without::kLastWait || (kWithout != Without::kWait && !last)) {
      ptx::cp_async_wait_group<1>();
    } else if (kWithout != Without::kWait) {
      ptx::cp_async_wait_group<0>();
    }
    if constexpr (kWithout != Without::kBarrierAfterWait) __syncthreads();
    const PipelineSmem::Tile& tile = smem.tiles[t % 2];
    uint32_t a_registers[4], b_registers[4];
    if (thread == 0) load_line = __LINE__ + 1;
    ptx::ldmatrix_x4(a_registers, &tile.a[lane % 16][lane / 16 * 8]);
    ptx::ldmatrix_x4_trans(b_registers, &tile.b[lane % 16][warp * 16 + lane / 16 * 8]);
    ptx::mma_m16n8k16<bfloat16>(d[0], a_registers, b_registers[0], b_registers[1]);
    ptx::mma_m16n8k16<bfloat16>(d[1], a_registers, b_registers[2], b_registers[3]);
    if constexpr (kWithout != Without::kBarrierBeforeRefill) __syncthreads();
  }
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      out[(lane / 4 + i / 2 * 8) * 64 + warp * 16 + n * 8 + lane % 4 * 2 + i % 2] = d[n][i];
    }
  }
}

class Pipeline : public TensorCore {
 protected:
  static constexpr size_t kDepth = 88;  // five tiles and a half

  std::string check() {
    std::string result;
    const auto expected = product(a.data(), b.data(), 16, 64, kDepth);
    for (size_t i = 0; i < expected.size() && result.empty(); ++i) {
      if (!(std::abs(static_cast<double>(out[i]) - expected[i]) < 1e-4)) {
        result = "wrong at " + std::to_string(i);
      }
    }
    out.fill(NAN);
    return result;
  }

  template <Without kWithout>
  auto runs_without() {
    return runs(
        128, sizeof(PipelineSmem),
        [this] { pipeline<kWithout>(a.data(), b.data(), kDepth, out.data()); },
        [this] { return check(); });
  }

  const std::vector<bfloat16> a = random_values<bfloat16>(16 * kDepth),
                              b = random_values<bfloat16>(kDepth * 64);
  GlobalArray<float> out{16 * 64};
};

TEST_F(Pipeline, IsAMatrixProduct) {
  expect_right(runs_without<Without::kNothing>());
}

TEST_F(Pipeline, WithoutWait) {
  const auto run = runs_without<Without::kWait>();
  const std::string message = run(0);
  EXPECT_EQ(message,
            "ldmatrix_x4 at " + at(load_line) +
                " reads shared memory that cp.async of thread (0,0,0) at " + at(copy_line) +
                " still writes: the thread has not waited for it, block (0,0,0), thread (0,0,0)");
  for (uint64_t seed = 1; seed < kSeeds; ++seed) {
    expect_contains(run(seed), "still writes: the thread has not waited for it");
  }
}

/// The last tile is the newest group, so that wait_group<1> does not wait for it.
TEST_F(Pipeline, WithoutLastWait) {
  const auto run = runs_without<Without::kLastWait>();
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    expect_contains(run(seed), "still writes: the thread has not waited for it");
  }
}

TEST_F(Pipeline, WithoutBarrierAfterWait) {
  expect_wrong(runs_without<Without::kBarrierAfterWait>());
}

TEST_F(Pipeline, WithoutBarrierBeforeRefill) {
  expect_wrong(runs_without<Without::kBarrierBeforeRefill>());
}

// ---------------------------------------------------------------------------------------------------------------
// cp.async, read by plain loads. The model does not see these: wrong results show a fault, or the race
// detector does.

class CpAsync : public TensorCore {
 protected:
  static constexpr unsigned kThreads = 64;
  static constexpr int kTiles = 6;
  static constexpr size_t kBytes = 2 * kThreads * sizeof(float4);

  CpAsync() : in_(kTiles * kThreads), out_(kTiles * kThreads) {
    for (size_t i = 0; i < kTiles * kThreads; ++i) {
      const float x = static_cast<float>(i);
      in_[i] = {x, x + 0.25f, x + 0.5f, x + 0.75f};
    }
  }

  /// out_[i] must equal source(i).
  template <typename Source>
  auto check(int tiles, Source source) {
    return [=, this]() -> std::string {
      std::string result;
      for (size_t i = 0; i < static_cast<size_t>(tiles) * kThreads && result.empty(); ++i) {
        const float4 expected = source(i);
        if (std::memcmp(&out_[i], &expected, sizeof expected) != 0) {
          result = "wrong at " + std::to_string(i);
        }
      }
      out_.fill({});
      return result;
    };
  }

  GlobalArray<float4> in_, out_;
};

template <bool kWaits>
__global__ void copy_own(const float4* in, float4* out) {
  float4* smem = *shared<float4[128]>();
  const unsigned i = threadIdx.x;
  ptx::cp_async_16(&smem[i], in + i, 16);
  ptx::cp_async_commit_group();
  if constexpr (kWaits) ptx::cp_async_wait_group<0>();
  out[i] = smem[i];
}

TEST_F(CpAsync, ReadBeforeTheWait) {
  const auto expected = check(1, [this](size_t i) { return in_[i]; });
  expect_right(runs(
      kThreads, kBytes, [this] { copy_own<true>(in_.data(), out_.data()); }, expected));
  if (gpu_model::kernels_are_instrumented()) {
    expect_rejected("the thread that issued it has not waited for it", 1, kThreads, kBytes,
                    [this] { copy_own<false>(in_.data(), out_.data()); });
  }
  int wrong = 0;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule() = {.seed = seed, .detect_races = false};
    gpu_model::launch(1, kThreads, kBytes, [this] { copy_own<false>(in_.data(), out_.data()); });
    for (size_t i = 0; i < kThreads; ++i) {
      if (std::isnan(out_[i].x)) {
        ++wrong;
      } else {
        EXPECT_EQ(out_[i].x, in_[i].x);
      }
    }
    if (seed == 0) {
      EXPECT_EQ(wrong, static_cast<int>(kThreads));  // as late as allowed
    }
  }
  EXPECT_GT(wrong, static_cast<int>(kThreads));
  EXPECT_LT(wrong, static_cast<int>(kThreads) * kSeeds);  // some arrive early
}

/// A copy that nobody committed belongs to no group that could be waited for.
TEST_F(CpAsync, NotCommitted) {
  gpu_model::schedule().detect_races = false;
  gpu_model::launch(1, kThreads, kBytes, [this] {
    float4* smem = *shared<float4[128]>();
    ptx::cp_async_16(&smem[threadIdx.x], in_.data(), 16);
    ptx::cp_async_wait_group<0>();
    out_[threadIdx.x] = smem[threadIdx.x];
  });
  EXPECT_TRUE(std::isnan(out_[0].x));
}

TEST_F(CpAsync, ZeroFill) {
  const auto kernel = [this] {
    float4* smem = *shared<float4[128]>();
    const unsigned i = threadIdx.x;
    // Where nothing is read, no address is wrong.
    ptx::cp_async_16(&smem[i], i % 3 == 0 ? nullptr : in_.data() + i, i % 3 == 0 ? 0 : 16);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    out_[i] = smem[i];
  };
  expect_right(runs(kThreads, kBytes, kernel,
                    check(1, [this](size_t i) { return i % 3 == 0 ? float4{} : in_[i]; })));
}

/// Every thread copies through two buffers of its own.
template <int kPending>
__global__ void copy_in_turn(const float4* in, float4* out, int tiles) {
  float4* smem = *shared<float4[128]>();
  const auto copy = [&](int t) {
    ptx::cp_async_16(&smem[t % 2 * 64 + static_cast<int>(threadIdx.x)],
                     in + t * 64 + static_cast<int>(threadIdx.x), 16);
    ptx::cp_async_commit_group();
  };
  copy(0);
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) {
      copy(t + 1);
      ptx::cp_async_wait_group<kPending>();
    } else {
      ptx::cp_async_wait_group<0>();
    }
    out[t * 64 + static_cast<int>(threadIdx.x)] = smem[t % 2 * 64 + static_cast<int>(threadIdx.x)];
  }
}

TEST_F(CpAsync, WaitsForAllButTheNewestGroups) {
  const auto expected = check(kTiles, [this](size_t i) { return in_[i]; });
  expect_right(runs(
      kThreads, kBytes, [this] { copy_in_turn<1>(in_.data(), out_.data(), kTiles); }, expected));
  // One group too many is left under way: the tile after the next goes where a copy still writes.
  gpu_model::schedule().detect_races = false;
  expect_rejected("writes shared memory that cp.async of thread (", 1, kThreads, kBytes,
                  [this] { copy_in_turn<2>(in_.data(), out_.data(), kTiles); });
}

/// Each thread reads what the opposite thread copied.
enum class Barrier { kAfterTheWait, kBeforeTheWait, kNone };
int shared_copy_line = 0;

template <Barrier kBarrier>
__global__ void copy_for_others(const float4* in, float4* out) {
  float4* smem = *shared<float4[128]>();
  const unsigned i = threadIdx.x;
  if (i == 0) shared_copy_line = __LINE__ + 1;
  ptx::cp_async_16(&smem[i], in + i, 16);
  ptx::cp_async_commit_group();
  if constexpr (kBarrier == Barrier::kBeforeTheWait) __syncthreads();
  ptx::cp_async_wait_group<0>();
  if constexpr (kBarrier == Barrier::kAfterTheWait) __syncthreads();
  out[i] = smem[63 - i];
}

TEST_F(CpAsync, MissingBarrierAfterTheWait) {
  const auto expected = check(1, [this](size_t i) { return in_[63 - i]; });
  const auto run_with = [&]<Barrier kBarrier>() {
    return runs(
        kThreads, kBytes, [this] { copy_for_others<kBarrier>(in_.data(), out_.data()); }, expected);
  };
  expect_right(run_with.operator()<Barrier::kAfterTheWait>());
  expect_wrong(run_with.operator()<Barrier::kNone>());
  // A barrier does not order a copy that has not been waited for yet, even if it arrived early.
  const auto run = run_with.operator()<Barrier::kBeforeTheWait>();
  expect_wrong(run);
  for (uint64_t seed = 0; seed < kSeeds && gpu_model::kernels_are_instrumented(); ++seed) {
    const std::string message = run(seed);
    expect_contains(message, "race: ");
    expect_contains(message, "cp_async_16 at " + at(shared_copy_line));
  }
}

/// Two tiles through one buffer.
template <bool kSynchronized>
__global__ void refill(const float4* in, float4* out) {
  float4* smem = *shared<float4[128]>();
  const unsigned i = threadIdx.x;
  for (unsigned t = 0; t < 2; ++t) {
    ptx::cp_async_16(&smem[i], in + t * 64 + i, 16);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    out[t * 64 + i] = smem[63 - i];
    if constexpr (kSynchronized) __syncthreads();
  }
}

TEST_F(CpAsync, MissingBarrierBeforeTheRefill) {
  const auto expected = check(2, [this](size_t i) { return in_[i / 64 * 64 + 63 - i % 64]; });
  expect_right(runs(
      kThreads, kBytes, [this] { refill<true>(in_.data(), out_.data()); }, expected));
  expect_wrong(runs(
      kThreads, kBytes, [this] { refill<false>(in_.data(), out_.data()); }, expected));
}

TEST_F(CpAsync, CopiesThatNobodyWaitsForEndWithTheBlock) {
  gpu_model::schedule().os_threads = 1;
  for (int launches = 0; launches < 2; ++launches) {
    EXPECT_NO_THROW(gpu_model::launch(3, kThreads, kBytes, [this] {
      ptx::cp_async_16(*shared<float4[128]>() + threadIdx.x, in_.data(), 16);
      if (threadIdx.x % 2 == 0) ptx::cp_async_commit_group();
    }));
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Addresses, rows and warps that are not allowed.

class Misuse : public CpAsync {
 protected:
  /// Expects `kernel(smem)` to be rejected. It is run by one warp with 1024 bytes of shared memory.
  template <typename Kernel>
  static void expect_misuse(const std::string& part, Kernel kernel) {
    expect_rejected(part, 1, 32, 1024, [&] { kernel(*shared<char[1024]>()); });
  }
};

TEST_F(Misuse, CopyToAMisalignedAddress) {
  int line = 0;
  const auto kernel = [&] {
    if (threadIdx.x == 5) line = __LINE__ + 1;
    ptx::cp_async_16(*shared<char[1024]>() + (threadIdx.x == 5 ? 8 : threadIdx.x * 16), in_.data(),
                     16);
  };
  const std::string message = error_of(1, 32, 1024, kernel);
  EXPECT_EQ(message, "cp_async_16 at " + at(line) +
                         " writes a misaligned address, 8 bytes past a multiple of 16, "
                         "block (0,0,0), thread (5,0,0)");
}

TEST_F(Misuse, Copies) {
  const auto* in = reinterpret_cast<const char*>(in_.data());
  expect_misuse("reads from a misaligned address, 4 bytes past a multiple of 16",
                [&](char* smem) { ptx::cp_async_16(smem + threadIdx.x * 16, in + 4, 16); });
  expect_misuse(
      "writes 16 bytes that are not in the block's dynamic shared memory: 0 bytes past the end of "
      "1024 bytes",
      [&](char* smem) { ptx::cp_async_16(smem + 1024, in, 16); });
  expect_misuse("writes 16 bytes that are not in the block's dynamic shared memory, block",
                [&](char*) { ptx::cp_async_16(out_.data(), in, 16); });
  expect_misuse("source_bytes = 8 must be 0 or 16",
                [&](char* smem) { ptx::cp_async_16(smem + threadIdx.x * 16, in, 8); });
  expect_misuse("writes shared memory that cp.async of thread (0,0,0) at ",
                [&](char* smem) { ptx::cp_async_16(smem, in, 16); });
  expect_misuse("out-of-bounds global memory read", [&](char* smem) {
    ptx::cp_async_16(smem + threadIdx.x * 16, in_.data() + kTiles * kThreads, 16);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
  });
}

TEST_F(Misuse, Ldmatrix) {
  uint32_t r[4];
  expect_misuse("reads a misaligned address, 2 bytes past a multiple of 16",
                [&](char* smem) { ptx::ldmatrix_x4(r, smem + 2); });
  expect_misuse("ldmatrix_x4_trans at tests/reference/gpu_model/tensor_core_test.cpp:",
                [&](char* smem) { ptx::ldmatrix_x4_trans(r, smem + 2); });
  expect_misuse(
      "reads 16 bytes that are not in the block's dynamic shared memory: 16 bytes before the start "
      "of 1024 bytes, block (0,0,0), thread (3,0,0)",
      [&](char* smem) { ptx::ldmatrix_x4(r, threadIdx.x == 3 ? smem - 16 : smem); });
  expect_misuse("reads 16 bytes that are not in the block's dynamic shared memory, block (0,0,0)",
                [&](char*) { ptx::ldmatrix_x4(r, in_.data()); });
}

TEST_F(Misuse, LessThanAWarp) {
  const auto mma = [] {
    float d[4] = {};
    ptx::mma_m16n8k16<bfloat16>(d, {0, 0, 0, 0}, 0, 0);
  };
  expect_rejected("thread (32,0,0) calls mma_m16n8k16(mask 0xffffffff) at ", 1, 40, 0, [&] {
    if (threadIdx.x >= 32) mma();
  });
  expect_rejected("in a warp of fewer than 32 threads", 1, 16, 0, mma);
  expect_rejected("has returned", 1, 32, 0, [&] {
    if (threadIdx.x != 7) mma();
  });
  expect_rejected("lanes of one warp disagree", 1, 32, 0, [&] {
    if (threadIdx.x < 7) {
      float d[4] = {};
      ptx::mma_m16n8k16<bfloat16>(d, {0, 0, 0, 0}, 0, 0);
    } else {
      mma();
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Named barriers.

class NamedBarriers : public TensorCore {
 protected:
  /// Each thread's value is read by the opposite thread of its pair of warps.
  template <bool kSynchronized>
  static void exchange(int* out) {
    int* values = *shared<int[128]>();
    const int i = static_cast<int>(threadIdx.x), group = i / 64;
    for (int round = 0; round < (group == 0 ? 3 : 5); ++round) {
      values[i] = 1000 * round + i;
      if constexpr (kSynchronized) {
        // Warps may call it on different lines.
        if (i % 64 < 32) {
          ptx::barrier_sync(1 + group, 64);
        } else {
          ptx::barrier_sync(1 + group, 64);
        }
      }
      out[i] = values[i ^ 63];
      ptx::barrier_sync(3 + group, 64);
    }
  }
};

TEST_F(NamedBarriers, OrderTheirThreads) {
  GlobalArray<int> out(128);
  const auto check = [&]() -> std::string {
    for (int i = 0; i < 128; ++i) {
      if (out[static_cast<size_t>(i)] != (i < 64 ? 2000 : 4000) + (i ^ 63)) {
        return "wrong at " + std::to_string(i);
      }
    }
    return {};
  };
  expect_right(runs(
      128, 512, [&] { exchange<true>(out.data()); }, check));
  expect_wrong(runs(
      128, 512, [&] { exchange<false>(out.data()); }, check));
}

TEST_F(NamedBarriers, CountsMustAgree) {
  int line = 0;
  const auto kernel = [&] {
    if (threadIdx.x == 0) line = __LINE__ + 1;
    ptx::barrier_sync(1, threadIdx.x < 32 ? 64 : 96);
  };
  const std::string message = error_of(1, 64, 0, kernel);
  EXPECT_EQ(message,
            "divergent barrier: block (0,0,0), thread (32,0,0) is in barrier_sync(1, 96) at " +
                at(line) + " while thread (0,0,0) waits in barrier_sync(1, 64) at " + at(line));
}

TEST_F(NamedBarriers, Deadlock) {
  int line = 0;
  const auto kernel = [&] {
    if (threadIdx.x == 0) line = __LINE__ + 1;
    ptx::barrier_sync(2, 96);
  };
  const std::string message = error_of(1, 64, 0, kernel);
  EXPECT_EQ(message,
            "deadlock: block (0,0,0): threads 0-63 wait in barrier_sync(2, 96) at " + at(line));
}

TEST_F(NamedBarriers, WholeWarps) {
  expect_rejected("divergent barrier: lanes of one warp disagree: thread (", 1, 64, 0, [] {
    if (threadIdx.x % 32 < 16) ptx::barrier_sync(1, 32);
  });
  expect_rejected("barrier_sync(1, 40) at tests/reference/gpu_model/tensor_core_test.cpp:", 1, 64,
                  0, [] { ptx::barrier_sync(1, 40); });
  expect_rejected("the number of threads must be a positive multiple of 32", 1, 64, 0,
                  [] { ptx::barrier_sync(1, 0); });
  expect_rejected("the barrier's number must be 1 to 15", 1, 64, 0,
                  [] { ptx::barrier_sync(0, 64); });
  expect_rejected("the barrier's number must be 1 to 15", 1, 64, 0,
                  [] { ptx::barrier_sync(16, 64); });
}

}  // namespace
}  // namespace gpu_model_test
