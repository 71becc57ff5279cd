/// @file
/// Hopper's instructions on the GPU model. Right kernels give right results under every schedule.
/// Each wrong one lacks one statement of a right one, or has it in a wrong place, and is rejected.

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <random>
#include <string>
#include <vector>

#include "stages/common/ptx/ptx_sm90.h"
#include "tests/reference/gpu_model/gpu_model_fixture.h"
#include "tests/status_matchers.h"

namespace gpu_model_test {
namespace {

namespace ptx = mla::model::ptx;
using mla::bfloat16;
using mla::float16;
using mla::from_float;
using mla::to_float;
using mla::model::TensorMap;
using mla::model::TensorShape;

class Hopper : public GpuModel {
 protected:
  /// Expects right results under every schedule: `check()` says what is wrong with them.
  template <typename Kernel, typename Check>
  static void expect_right(unsigned threads, size_t shared_bytes, Kernel kernel, Check check) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule().seed = seed;
      EXPECT_EQ(error_of(1, threads, shared_bytes, kernel), "") << "seed " << seed;
      EXPECT_EQ(check(), "") << "seed " << seed;
    }
  }
  template <typename Kernel>
  static void expect_right(unsigned threads, size_t shared_bytes, Kernel kernel) {
    expect_right(threads, shared_bytes, kernel, [] { return std::string(); });
  }

  /// Expects a rejection with `part` in its message under every schedule, without the race detector.
  template <typename Kernel>
  static void expect_wrong(const std::string& part, unsigned threads, size_t shared_bytes,
                           Kernel kernel) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule() = {.seed = seed, .detect_races = false};
      const std::string error = error_of(1, threads, shared_bytes, kernel);
      EXPECT_NE(error, "") << "seed " << seed;
      expect_contains(error, part);
    }
  }
  /// Expects a rejection or wrong results under some schedules, and under the first one a rejection by
  /// the race detector.
  template <typename Kernel, typename Check>
  static void expect_found(unsigned threads, size_t shared_bytes, Kernel kernel, Check check) {
    int found = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule() = {.seed = seed, .detect_races = false};
      found += !error_of(1, threads, shared_bytes, kernel).empty() || !check().empty();
    }
    EXPECT_GE(found, 1);
    gpu_model::schedule() = {};
    if (gpu_model::kernels_are_instrumented()) {
      EXPECT_NE(error_of(1, threads, shared_bytes, kernel), "");
    }
    RecordProperty("seeds_that_found_it", found);
  }
};

template <typename T>
void fill_random(const GlobalArray<T>& values, size_t count, unsigned seed) {
  std::mt19937 random(seed);
  for (size_t i = 0; i < count; ++i) {
    values[i] = from_float<T>(static_cast<float>(random()) * 0x1p-31f - 1);
  }
}

/// The map of a matrix [rows, columns] whose boxes are [box_rows, box_columns], 64 or 32, swizzled.
template <typename T>
TensorMap matrix_map(const T* values, size_t rows, size_t columns, unsigned box_rows,
                     unsigned box_columns = 64) {
  TensorShape shape;
  shape.rank = 4;
  const size_t bytes = rows * columns * 2;
  const uint64_t size[] = {columns, rows, 1, 1}, stride[] = {2, columns * 2, bytes, bytes};
  const uint32_t box[] = {box_columns, box_rows, 1, 1};
  std::copy_n(size, 4, shape.size);
  std::copy_n(stride, 4, shape.stride_bytes);
  std::copy_n(box, 4, shape.box);
  shape.swizzle_128b = box_columns == 64;
  shape.swizzle_64b = box_columns == 32;
  TensorMap map;
  EXPECT_OK(mla::model::encode_tensor_map(values, shape, &map));
  return map;
}

// ---------------------------------------------------------------------------------------------------------------
// Products: D[64, columns] = A[64, 64] B, of one warpgroup, operands brought by TMA.

struct ProductSmem {
  alignas(1024) uint16_t a[64 * 64];
  alignas(1024) uint16_t b[256 * 64];
  ptx::Mbarrier full;
};

enum class Form { kN32, kN64, kN64HalfBoxes, kN256Shared, kN256Registers };

template <typename T, Form kForm>
__global__ void multiply(const TensorMap* a_map, const TensorMap* b_map, const T* a_global,
                         float* out) {
  auto& smem = *shared<ProductSmem>();
  constexpr bool kTransposed = kForm == Form::kN256Shared || kForm == Form::kN256Registers;
  constexpr bool kHalfBoxes = kForm == Form::kN64HalfBoxes;
  constexpr int kColumns = kForm == Form::kN32 ? 32 : kTransposed ? 256 : 64;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, (64 + kColumns) * 128);
    const uint64_t policy = ptx::createpolicy_evict_first();
    ptx::cp_async_bulk_tensor_4d(smem.a, a_map, 0, 0, 0, 0, &smem.full, policy);
    // K-major: one box with the rows of all columns, or two halves of it. MN-major: boxes of 64
    // columns.
    constexpr int kBoxColumns = kHalfBoxes ? 32 : 64;
    for (int box = 0; box < (kTransposed ? 4 : kHalfBoxes ? 2 : 1); ++box) {
      ptx::cp_async_bulk_tensor_4d(&smem.b[box * 64 * kBoxColumns], b_map, box * kBoxColumns, 0, 0,
                                   0, &smem.full, policy);
    }
  }
  const unsigned row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
  uint32_t a_registers[4][4];
  for (unsigned k = 0; k < 4; ++k) {
    for (unsigned i = 0; i < 4; ++i) {
      std::memcpy(&a_registers[k][i], a_global + (row + i % 2 * 8) * 64 + k * 16 + pair + i / 2 * 8,
                  4);
    }
  }
  ptx::mbarrier_wait(&smem.full, 0);
  float d[kColumns / 8][4];
  const uint64_t a = ptx::matrix_descriptor(smem.a, 0, 1024);
  const uint64_t b = ptx::matrix_descriptor(smem.b, kTransposed ? 8192 : 0, 1024);
  ptx::wgmma_fence(d, a_registers);
  for (uint64_t k = 0; k < 4; ++k) {
    if constexpr (kForm == Form::kN32) {
      ptx::wgmma_m64nNk16<T>(d, a + k * 2, b + k * 2, k > 0);
    } else if constexpr (kForm == Form::kN64) {
      ptx::wgmma_m64n64k16<T>(d, a + k * 2, b + k * 2, k > 0);
    } else if constexpr (kHalfBoxes) {
      const uint64_t half = ptx::matrix_descriptor_64b(&smem.b[k / 2 * 64 * 32], 512);
      ptx::wgmma_m64n64k16<T>(d, a_registers[k], half + k % 2 * 2, k > 0);
    } else if constexpr (kForm == Form::kN256Shared) {
      ptx::wgmma_m64n256k16_trans_b<T>(d, a + k * 2, b + k * 2048 / 16, k > 0);
    } else {
      ptx::wgmma_m64n256k16_trans_b<T>(d, a_registers[k], b + k * 2048 / 16, k > 0);
    }
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>(d, a_registers);
  for (unsigned n = 0; n < kColumns / 8; ++n) {
    for (unsigned i = 0; i < 4; ++i) {
      out[(row + i / 2 * 8) * kColumns + n * 8 + pair + i % 2] = d[n][i];
    }
  }
}

template <typename T>
class HopperProduct : public Hopper {
 protected:
  template <Form kForm>
  static void expect_product() {
    constexpr bool kTransposed = kForm == Form::kN256Shared || kForm == Form::kN256Registers;
    constexpr size_t kColumns = kForm == Form::kN32 ? 32 : kTransposed ? 256 : 64;
    GlobalArray<T> a(64 * 64), b(kColumns * 64);
    GlobalArray<float> out(64 * kColumns);
    fill_random(a, 64 * 64, 1);
    fill_random(b, kColumns * 64, 2);
    const TensorMap a_map = matrix_map(a.data(), 64, 64, 64);
    const TensorMap b_map = kTransposed ? matrix_map(b.data(), 64, kColumns, 64)
                                        : matrix_map(b.data(), kColumns, 64, kColumns,
                                                     kForm == Form::kN64HalfBoxes ? 32 : 64);
    const auto check = [&]() -> std::string {
      for (size_t i = 0; i < 64; ++i) {
        for (size_t n = 0; n < kColumns; ++n) {
          double sum = 0;
          for (size_t k = 0; k < 64; ++k) {
            sum += static_cast<double>(to_float(a[i * 64 + k])) *
                   static_cast<double>(to_float(kTransposed ? b[k * kColumns + n] : b[n * 64 + k]));
          }
          if (!(std::abs(static_cast<double>(out[i * kColumns + n]) - sum) < 1e-4)) {
            return "wrong at " + std::to_string(i) + ", " + std::to_string(n);
          }
        }
      }
      out.fill(NAN);
      return {};
    };
    expect_right(
        128, sizeof(ProductSmem), [&] { multiply<T, kForm>(&a_map, &b_map, a.data(), out.data()); },
        check);
  }
};
using Types = testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(HopperProduct, Types);

TYPED_TEST(HopperProduct, N32) {
  this->template expect_product<Form::kN32>();
}
TYPED_TEST(HopperProduct, N64) {
  this->template expect_product<Form::kN64>();
}
TYPED_TEST(HopperProduct, N64OfHalfBoxes) {
  this->template expect_product<Form::kN64HalfBoxes>();
}
TYPED_TEST(HopperProduct, N256) {
  this->template expect_product<Form::kN256Shared>();
}
TYPED_TEST(HopperProduct, N256OfRegisters) {
  this->template expect_product<Form::kN256Registers>();
}

// ---------------------------------------------------------------------------------------------------------------
// A pipeline: thread 128 loads tiles of A into two stages, a warpgroup multiplies each by one B.

enum class Break {
  kNothing,
  kNoEmptyWait,
  kNoFullWait,
  kTooManyBytesExpected,
  kTooFewBytesExpected,
  kNoInitFence,
  kArriveTwice,
  kNeverFenced,
  kWriteAfterFence,
  kNoCommit,
  kNoWaitGroup,
  kNotNamed,
  kTouchInFlight,
  kOtherDescriptor,
  kWarpLeftOut,
  kWarpIssuesMore,
  kStoreWhileRead,
  kLastTileNotWaitedFor,
  kBarrierOverwritten,
  kArriveBeforeWait,
};

struct PipelineSmem {
  alignas(1024) uint16_t a[2][64 * 64];
  alignas(1024) uint16_t b[64 * 64];
  ptx::Mbarrier full[2], empty[2];
};
constexpr unsigned kTiles = 5;
int load_line = 0, wait_line = 0, full_wait_line = 0;

/// Notes where a kernel is. Only one thread writes it, because otherwise it would be a race.
void note(unsigned thread, int& line, int value) {
  if (threadIdx.x == thread) line = value;
}

template <Break kBreak>
__global__ void pipeline(const TensorMap* a_map, const TensorMap* b_map, float* out) {
  auto& smem = *shared<PipelineSmem>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&smem.full[i], 1);
      ptx::mbarrier_init(&smem.empty[i], 128);
    }
    if constexpr (kBreak != Break::kNoInitFence) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x != 128) return;
    const uint64_t policy = ptx::createpolicy_evict_last();
    ptx::prefetch_tensormap(a_map);
    for (unsigned tile = 0; tile < kTiles; ++tile) {
      const unsigned stage = tile % 2;
      if constexpr (kBreak != Break::kNoEmptyWait) {
        ptx::mbarrier_wait(&smem.empty[stage], tile / 2 % 2 == 0);
      }
      int bytes = tile == 0 ? 16384 : 8192;
      if (kBreak == Break::kTooManyBytesExpected && tile == 3) bytes += 128;
      if (kBreak == Break::kTooFewBytesExpected && tile == 3) bytes -= 128;
      ptx::mbarrier_arrive_expect_tx(&smem.full[stage], bytes);
      if (tile == 0) {
        ptx::cp_async_bulk_tensor_4d(smem.b, b_map, 0, 0, 0, 0, &smem.full[0], policy);
      }
      note(128, load_line, __LINE__ + 1);
      ptx::cp_async_bulk_tensor_4d(smem.a[stage], a_map, 0, static_cast<int>(tile * 64), 0, 0,
                                   &smem.full[stage], policy);
    }
    return;
  }
  ptx::setmaxnreg_inc<240>();
  float d[8][4] = {};
  if constexpr (kBreak != Break::kNeverFenced) ptx::wgmma_fence(d);
  if constexpr (kBreak == Break::kWriteAfterFence) d[3][1] = 1;
  const unsigned tiles = kBreak == Break::kLastTileNotWaitedFor ? kTiles - 1 : kTiles;
  for (unsigned tile = 0; tile < tiles; ++tile) {
    const unsigned stage = tile % 2;
    note(0, full_wait_line, __LINE__ + 2);
    if constexpr (kBreak != Break::kNoFullWait) {
      ptx::mbarrier_wait(&smem.full[stage], static_cast<int>(tile / 2 % 2));
    }
    const uint64_t a = ptx::matrix_descriptor(smem.a[stage], 0, 1024);
    uint64_t b = ptx::matrix_descriptor(smem.b, 0, 1024);
    if (kBreak == Break::kOtherDescriptor && threadIdx.x / 32 == 2) b = a;
    if (kBreak == Break::kWarpLeftOut && threadIdx.x / 32 == 2 && tile == 4) continue;
    for (uint64_t k = 0; k < 4; ++k) {
      ptx::wgmma_m64n64k16<bfloat16>(d, a + k * 2, b + k * 2, true);
    }
    if (kBreak == Break::kStoreWhileRead && tile == 2) {
      smem.a[stage][64 * threadIdx.x / 2] = 0;
    }
    if (kBreak == Break::kTouchInFlight && tile == 2) d[2][3] += 1;
    if constexpr (kBreak != Break::kNoCommit) ptx::wgmma_commit_group();
    if constexpr (kBreak == Break::kArriveBeforeWait) ptx::mbarrier_arrive(&smem.empty[stage]);
    note(0, wait_line, __LINE__ + 2);
    if constexpr (kBreak == Break::kNotNamed) {
      ptx::wgmma_wait_group<0>();
    } else if constexpr (kBreak != Break::kNoWaitGroup) {
      ptx::wgmma_wait_group<0>(d);
    }
    if (kBreak == Break::kBarrierOverwritten && tile == 3) smem.empty[stage].state = 0;
    if constexpr (kBreak != Break::kArriveBeforeWait) ptx::mbarrier_arrive(&smem.empty[stage]);
    if constexpr (kBreak == Break::kArriveTwice) ptx::mbarrier_arrive(&smem.empty[stage]);
  }
  if (kBreak == Break::kWarpIssuesMore && threadIdx.x / 32 == 1) {
    ptx::wgmma_m64n64k16<bfloat16>(d, ptx::matrix_descriptor(smem.b, 0, 1024),
                                   ptx::matrix_descriptor(smem.b, 0, 1024), true);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>(d);
  }
  const unsigned row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
  for (unsigned n = 0; n < 8; ++n) {
    for (unsigned i = 0; i < 4; ++i) {
      out[(row + i / 2 * 8) * 64 + n * 8 + pair + i % 2] = d[n][i];
    }
  }
}

class HopperPipeline : public Hopper {
 protected:
  HopperPipeline()
      : a_(kTiles * 64 * 64),
        b_(64 * 64),
        out_(64 * 64),
        a_map_(matrix_map(a_.data(), kTiles * 64, 64, 64)),
        b_map_(matrix_map(b_.data(), 64, 64, 64)) {
    fill_random(a_, kTiles * 64 * 64, 3);
    fill_random(b_, 64 * 64, 4);
    for (size_t i = 0; i < 64; ++i) {
      for (size_t n = 0; n < 64; ++n) {
        double sum = 0;
        for (size_t tile = 0; tile < kTiles; ++tile) {
          for (size_t k = 0; k < 64; ++k) {
            sum += static_cast<double>(to_float(a_[(tile * 64 + i) * 64 + k])) *
                   static_cast<double>(to_float(b_[n * 64 + k]));
          }
        }
        expected_.push_back(sum);
      }
    }
  }
  template <Break kBreak>
  auto kernel() {
    return [this] { pipeline<kBreak>(&a_map_, &b_map_, out_.data()); };
  }
  template <Break kBreak>
  void expect_broken(const std::string& part) {
    expect_wrong(part, 256, sizeof(PipelineSmem), kernel<kBreak>());
  }
  auto check() {
    return [this]() -> std::string {
      for (size_t i = 0; i < 64 * 64; ++i) {
        if (!(std::abs(static_cast<double>(out_[i]) - expected_[i]) < 1e-3)) {
          return "wrong at " + std::to_string(i);
        }
      }
      out_.fill(NAN);
      return {};
    };
  }

  GlobalArray<bfloat16> a_, b_;
  GlobalArray<float> out_;
  TensorMap a_map_, b_map_;
  std::vector<double> expected_;
};

TEST_F(HopperPipeline, Right) {
  expect_right(256, sizeof(PipelineSmem), kernel<Break::kNothing>(), check());
}
TEST_F(HopperPipeline, StageOverwrittenTooSoon) {
  expect_found(256, sizeof(PipelineSmem), kernel<Break::kNoEmptyWait>(), check());
  expect_found(256, sizeof(PipelineSmem), kernel<Break::kArriveBeforeWait>(), check());
}
TEST_F(HopperPipeline, ReadBeforeItArrives) {
  expect_broken<Break::kNoFullWait>("");
}
TEST_F(HopperPipeline, WrongBytes) {
  expect_broken<Break::kTooManyBytesExpected>(": phase 1 wants 0 of 1 arrivals and 128 bytes");
  expect_contains(error_of(1, 256, sizeof(PipelineSmem), kernel<Break::kTooManyBytesExpected>()),
                  "wait in mbarrier_wait(barrier at byte 24584, parity 1) at " +
                      at(full_wait_line) + ": phase 1 wants");
  expect_broken<Break::kTooFewBytesExpected>("128 bytes more than were expected in phase 1");
}
TEST_F(HopperPipeline, BarrierNotFenced) {
  expect_broken<Break::kNoInitFence>(
      "the thread that initialised the barrier has not called fence_mbarrier_init");
}
TEST_F(HopperPipeline, TooManyArrivals) {
  expect_found(256, sizeof(PipelineSmem), kernel<Break::kArriveTwice>(), check());
}
TEST_F(HopperPipeline, BarrierOverwritten) {
  expect_broken<Break::kBarrierOverwritten>("was overwritten by ordinary stores");
}
TEST_F(HopperPipeline, WgmmaFence) {
  expect_broken<Break::kWriteAfterFence>(
      ": the accumulators were written after the last wgmma_fence that names them, block (0,0,0)");
  expect_broken<Break::kNeverFenced>(": no wgmma_fence names the accumulators, block (0,0,0)");
}
TEST_F(HopperPipeline, Groups) {
  expect_broken<Break::kNoCommit>("");
  expect_broken<Break::kNoWaitGroup>("");
  expect_broken<Break::kNotNamed>("it does not name the accumulators of wgmma_");
  expect_contains(error_of(1, 256, sizeof(PipelineSmem), kernel<Break::kNotNamed>()),
                  "wgmma_wait_group at " + at(wait_line));
}
TEST_F(HopperPipeline, TouchedInFlight) {
  expect_broken<Break::kTouchInFlight>("the accumulators were written while wgmma_");
  expect_broken<Break::kStoreWhileRead>("");
}
TEST_F(HopperPipeline, WarpsDisagree) {
  expect_broken<Break::kOtherDescriptor>("warps of one warpgroup disagree: ");
  expect_broken<Break::kWarpLeftOut>("of the 4 warps of a warpgroup");
  expect_broken<Break::kWarpIssuesMore>("was executed by 1 of the 4 warps of a warpgroup");
}
TEST_F(HopperPipeline, CopyNotWaitedFor) {
  expect_broken<Break::kLastTileNotWaitedFor>("block ended while cp_async_bulk_tensor_4d at " +
                                              at(load_line) + " was under way");
}

// ---------------------------------------------------------------------------------------------------------------
// The two proxies: a tile is written by ordinary means and stored by TMA, or read by wgmma.

enum class Writer { kPlain, kStmatrix, kCpAsync };
enum class Fence { kRight, kNone, kBeforeTheWrite, kOneThread };
enum class Use { kTensorStore, kStore, kProduct };

struct TileSmem {
  alignas(1024) uint16_t tile[64 * 64];
};

template <Writer kWriter, Fence kFence, Use kUse>
__global__ void write_and_use(const uint16_t* in, uint16_t* out, const TensorMap* out_map) {
  auto& smem = *shared<TileSmem>();
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto place = [&](unsigned row, unsigned piece) {
    return &smem.tile[row * 64 + (piece ^ row % 8) * 8];
  };
  if constexpr (kFence == Fence::kBeforeTheWrite) ptx::fence_proxy_async();
  for (unsigned i = 0; i < 4; ++i) {
    if constexpr (kWriter == Writer::kStmatrix) {  // 16 rows of 16 columns
      uint32_t r[4];
      for (unsigned j = 0; j < 4; ++j) {
        const unsigned row = warp * 16 + lane / 4 + j % 2 * 8, column = i * 16 + j / 2 * 8;
        std::memcpy(&r[j], in + row * 64 + column + lane % 4 * 2, 4);
      }
      ptx::stmatrix_x4(place(warp * 16 + lane % 16, i * 2 + lane / 16), r);
    } else {
      const unsigned piece = threadIdx.x + 128 * i;
      const uint16_t* source = in + piece * 8;
      if constexpr (kWriter == Writer::kCpAsync) {
        ptx::cp_async_16(place(piece / 8, piece % 8), source, 16);
      } else {
        for (unsigned j = 0; j < 8; ++j) place(piece / 8, piece % 8)[j] = source[j];
      }
    }
  }
  if constexpr (kWriter == Writer::kCpAsync) {
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
  }
  if constexpr (kFence == Fence::kRight) ptx::fence_proxy_async();
  __syncthreads();
  if (kFence == Fence::kOneThread && threadIdx.x == 0) ptx::fence_proxy_async();
  if constexpr (kFence == Fence::kOneThread) __syncthreads();
  if constexpr (kUse == Use::kProduct) {  // the tile times itself transposed
    float d[8][4];
    const uint64_t tile = ptx::matrix_descriptor(smem.tile, 0, 1024);
    ptx::wgmma_fence(d);
    for (uint64_t k = 0; k < 4; ++k) {
      ptx::wgmma_m64n64k16<float16>(d, tile + k * 2, tile + k * 2, k > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>(d);
    if (threadIdx.x == 0) std::memcpy(out, d, 4);
  } else if (threadIdx.x == 0) {
    if constexpr (kUse == Use::kTensorStore) {
      ptx::cp_async_bulk_tensor_4d_store(out_map, 0, 0, 0, 0, smem.tile);
    } else {
      ptx::cp_async_bulk_store(out, smem.tile, sizeof smem.tile);
    }
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

class HopperProxies : public Hopper {
 protected:
  HopperProxies() : in_(64 * 64), out_(64 * 64), map_(matrix_map(out_.data(), 64, 64, 64)) {
    for (size_t i = 0; i < 64 * 64; ++i) in_[i] = static_cast<uint16_t>(i % 0x3c00);
  }
  template <Writer kWriter, Fence kFence, Use kUse>
  auto kernel() {
    return [this] { write_and_use<kWriter, kFence, kUse>(in_.data(), out_.data(), &map_); };
  }
  template <Writer kWriter, Use kUse>
  void expect_right_with_fence() {
    const auto check = [this]() -> std::string {
      for (size_t i = 0; i < 64 * 64 && kUse != Use::kProduct; ++i) {
        const size_t at = kUse == Use::kTensorStore ? i : (i ^ i / 64 % 8 * 8);
        if (out_[at] != in_[i]) return "wrong at " + std::to_string(i);
      }
      if (kUse == Use::kProduct) {
        float first, sum = 0;
        std::memcpy(&first, out_.data(), 4);
        for (size_t k = 0; k < 64; ++k) {
          const float value = to_float(std::bit_cast<float16>(in_[k]));
          sum += value * value;
        }
        if (!(std::abs(first - sum) <= 1e-4f * sum)) return "wrong product";
      }
      out_.fill(0xffff);
      return {};
    };
    expect_right(128, sizeof(TileSmem), kernel<kWriter, Fence::kRight, kUse>(), check);
  }
  template <Writer kWriter, Fence kFence, Use kUse>
  void expect_unfenced(const std::string& part = " fence_proxy_async since") {
    expect_wrong(part, 128, sizeof(TileSmem), kernel<kWriter, kFence, kUse>());
  }
  template <Use kUse>
  void expect_all() {
    const std::string known = ", which has not called fence_proxy_async since";
    expect_right_with_fence<Writer::kPlain, kUse>();
    expect_right_with_fence<Writer::kStmatrix, kUse>();
    expect_right_with_fence<Writer::kCpAsync, kUse>();
    expect_unfenced<Writer::kPlain, Fence::kNone, kUse>(
        "by ordinary stores, with no fence_proxy_async since");
    expect_unfenced<Writer::kStmatrix, Fence::kNone, kUse>(known);
    expect_unfenced<Writer::kCpAsync, Fence::kNone, kUse>(known);
    expect_unfenced<Writer::kPlain, Fence::kBeforeTheWrite, kUse>();
    expect_unfenced<Writer::kStmatrix, Fence::kBeforeTheWrite, kUse>(known);
    expect_unfenced<Writer::kCpAsync, Fence::kBeforeTheWrite, kUse>(known);
    expect_unfenced<Writer::kStmatrix, Fence::kOneThread, kUse>(known);
    expect_unfenced<Writer::kCpAsync, Fence::kOneThread, kUse>(known);
  }

  GlobalArray<uint16_t> in_, out_;
  TensorMap map_;
};

TEST_F(HopperProxies, TensorStore) {
  expect_all<Use::kTensorStore>();
}
TEST_F(HopperProxies, Store) {
  expect_all<Use::kStore>();
}
TEST_F(HopperProxies, Product) {
  expect_all<Use::kProduct>();
}

enum class StoreBreak { kNothing, kNoWait, kNoCommit, kOverwritten, kOverwrittenPlainly };
template <StoreBreak kBreak>
__global__ void store_and_reuse(uint16_t* out) {
  auto& smem = *shared<TileSmem>();
  uint32_t r[4] = {1, 2, 3, 4};
  for (int i = 0; i < 2; ++i) {
    ptx::stmatrix_x4(&smem.tile[threadIdx.x * 8], r);
    ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x == 0) {
      ptx::cp_async_bulk_store(out + i * 256, smem.tile, 512);
      if constexpr (kBreak != StoreBreak::kNoCommit) ptx::cp_async_bulk_commit_group();
      if (kBreak == StoreBreak::kOverwrittenPlainly) smem.tile[8] = 7;
      if (kBreak == StoreBreak::kNothing || kBreak == StoreBreak::kNoCommit ||
          kBreak == StoreBreak::kOverwrittenPlainly || i == 1) {
        if (kBreak != StoreBreak::kNoWait) ptx::cp_async_bulk_wait_group_read<0>();
      }
    }
    __syncwarp();
    if (kBreak == StoreBreak::kNoWait) break;
    for (uint32_t& word : r) word += 4;
  }
}

TEST_F(HopperProxies, StoreIsWaitedFor) {
  const auto check = [this]() -> std::string {
    for (uint16_t i = 0; i < 512; i += 2) {  // matrices of 64 elements
      const uint16_t expected = static_cast<uint16_t>(i / 256 * 4 + i % 256 / 64 + 1);
      if (out_[i] != expected || out_[i + size_t{1}] != 0) return "wrong at " + std::to_string(i);
    }
    out_.fill(0xffff);
    return {};
  };
  uint16_t* out = out_.data();
  expect_right(
      32, sizeof(TileSmem), [=] { store_and_reuse<StoreBreak::kNothing>(out); }, check);
  expect_wrong("block ended while cp_async_bulk_store", 32, sizeof(TileSmem),
               [=] { store_and_reuse<StoreBreak::kNoWait>(out); });
  expect_wrong("that cp_async_bulk_store at ", 32, sizeof(TileSmem),
               [=] { store_and_reuse<StoreBreak::kNoCommit>(out); });
  expect_wrong("still reads, block (0,0,0)", 32, sizeof(TileSmem),
               [=] { store_and_reuse<StoreBreak::kOverwritten>(out); });
  expect_found(
      32, sizeof(TileSmem), [=] { store_and_reuse<StoreBreak::kOverwrittenPlainly>(out); }, check);
}

// ---------------------------------------------------------------------------------------------------------------
// A in registers, and groups that overlap.

enum class Registers { kRight, kAChanged, kANotFenced, kANotNamed, kReadTooEarly, kBStoredTo };

/// P[64, 64] times the same V for two accumulators. The second group is waited for after the first.
template <Registers kBreak>
__global__ void multiply_registers(float* out) {
  auto& smem = *shared<ProductSmem>();
  for (unsigned i = threadIdx.x; i < 256 * 64; i += 128) {
    smem.b[i] = std::bit_cast<uint16_t>(from_float<bfloat16>(1));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float first[32][4], second[32][4];
  uint32_t a[2][4], other[4];
  for (auto& row : a) {
    for (uint32_t& word : row) word = 0x3f803f80;
  }
  for (uint32_t& word : other) word = 0x40004000;
  const uint64_t b = ptx::matrix_descriptor(smem.b, 8192, 1024);
  ptx::wgmma_fence(first, second, a);
  if (kBreak != Registers::kANotFenced) ptx::wgmma_fence(other);
  ptx::wgmma_m64n256k16_trans_b<bfloat16>(first, a[0], b, false);
  ptx::wgmma_m64n256k16_trans_b<bfloat16>(first, a[1], b + 128, true);
  ptx::wgmma_commit_group();
  ptx::wgmma_m64n256k16_trans_b<bfloat16>(second, other, b, false);
  ptx::wgmma_commit_group();
  if (kBreak == Registers::kAChanged) a[1][2] = 0;
  if (kBreak == Registers::kBStoredTo) {
    if (threadIdx.x == 50) smem.b[100] = 0;
    ptx::fence_proxy_async();
  }
  if (kBreak == Registers::kANotNamed) {
    ptx::wgmma_wait_group<1>(first);
  } else {
    ptx::wgmma_wait_group<1>(first, a);
  }
  const float early = second[3][1];
  ptx::wgmma_wait_group<0>(second, other);
  out[threadIdx.x] = first[7][1] + (kBreak == Registers::kReadTooEarly ? early : second[3][1]);
}

TEST_F(Hopper, ProductOfRegisters) {
  GlobalArray<float> out(128);
  const auto check = [&]() -> std::string {
    for (size_t i = 0; i < 128; ++i) {
      if (out[i] != 64) return "wrong at " + std::to_string(i);
    }
    out.fill(NAN);
    return {};
  };
  const size_t bytes = sizeof(ProductSmem);
  expect_right(
      128, bytes, [&] { multiply_registers<Registers::kRight>(out.data()); }, check);
  expect_wrong("the A registers were changed while wgmma_", 128, bytes,
               [&] { multiply_registers<Registers::kAChanged>(out.data()); });
  expect_wrong("no wgmma_fence names the A registers", 128, bytes,
               [&] { multiply_registers<Registers::kANotFenced>(out.data()); });
  expect_wrong("it does not name the A registers of wgmma_", 128, bytes,
               [&] { multiply_registers<Registers::kANotNamed>(out.data()); });
  expect_wrong("ordinary stores wrote shared memory at byte ", 128, bytes,
               [&] { multiply_registers<Registers::kBStoredTo>(out.data()); });
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    EXPECT_EQ(
        error_of(1, 128, bytes, [&] { multiply_registers<Registers::kReadTooEarly>(out.data()); }),
        "");
    EXPECT_NE(check(), "") << "seed " << seed;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Products of few columns, A as it lies or transposed.

enum class FewBreak { kNothing, kAStoredTo, kBNotFenced };

template <int kTiles>
struct FewSmem {
  alignas(1024) uint16_t a[64 * 64];
  alignas(1024) uint16_t b[kTiles * 8 * 64];
};

// Small whole numbers, so that sums are exact: A[m, k] and B[k, n].
int a_value(unsigned m, unsigned k) {
  return static_cast<int>(m % 7 + k % 3) - 2;
}
int b_value(unsigned k, unsigned n) {
  return static_cast<int>(n + k % 5) - 3;
}

/// D[64, 8 kTiles] = A[64, 64] B. In shared memory A is [m, k], or [k, m] if transposed; B is [n, k].
template <typename T, bool kTransposed, int kTiles, FewBreak kBreak>
__global__ void multiply_few(float* out) {
  auto& smem = *shared<FewSmem<kTiles>>();
  const auto place = [](unsigned row, unsigned column) {
    return row * 64 + (column / 8 ^ row % 8) * 8 + column % 8;
  };
  const auto bits = [](int value) {
    return std::bit_cast<uint16_t>(from_float<T>(static_cast<float>(value)));
  };
  for (unsigned i = threadIdx.x; i < 64 * 64; i += 128) {
    const unsigned m = i / 64, k = i % 64;
    smem.a[kTransposed ? place(k, m) : place(m, k)] = bits(a_value(m, k));
  }
  if (kBreak == FewBreak::kBNotFenced) ptx::fence_proxy_async();
  for (unsigned i = threadIdx.x; i < kTiles * 8 * 64; i += 128) {
    smem.b[place(i / 64, i % 64)] = bits(b_value(i % 64, i / 64));
  }
  if (kBreak != FewBreak::kBNotFenced) ptx::fence_proxy_async();
  __syncthreads();
  float d[kTiles][4];
  const uint64_t a = ptx::matrix_descriptor(smem.a, 0, 1024);
  const uint64_t b = ptx::matrix_descriptor(smem.b, 0, 1024);
  ptx::wgmma_fence(d);
  for (uint64_t k = 0; k < 4; ++k) {
    if constexpr (kTransposed) {
      ptx::wgmma_m64nNk16_trans_a<T>(d, a + k * 2048 / 16, b + k * 2, k > 0);
    } else {
      ptx::wgmma_m64nNk16<T>(d, a + k * 2, b + k * 2, k > 0);
    }
  }
  ptx::wgmma_commit_group();
  if (kBreak == FewBreak::kAStoredTo) {
    if (threadIdx.x == 50)
      smem.a[16 * 64 + 16] ^= 1;  // in either layout, the element is read by its own warp
    ptx::fence_proxy_async();
  }
  ptx::wgmma_wait_group<0>(d);
  const unsigned lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (unsigned n = 0; n < kTiles; ++n) {
    for (unsigned i = 0; i < 4; ++i) {
      out[(row + i / 2 * 8) * kTiles * 8 + n * 8 + lane % 4 * 2 + i % 2] = d[n][i];
    }
  }
}

template <typename Columns>
class HopperFewColumns : public Hopper {
 protected:
  static constexpr int kTiles = Columns();
  static constexpr size_t kBytes = sizeof(FewSmem<kTiles>);

  template <typename T, bool kTransposed>
  static void expect_product() {
    GlobalArray<float> out(size_t{64} * kTiles * 8);
    const auto check = [&]() -> std::string {
      for (unsigned m = 0; m < 64; ++m) {
        for (unsigned n = 0; n < kTiles * 8; ++n) {
          int sum = 0;
          for (unsigned k = 0; k < 64; ++k) sum += a_value(m, k) * b_value(k, n);
          if (out[size_t{m} * kTiles * 8 + n] != static_cast<float>(sum)) {
            return "wrong at " + std::to_string(m) + ", " + std::to_string(n);
          }
        }
      }
      out.fill(NAN);
      return {};
    };
    expect_right(
        128, kBytes, [&] { multiply_few<T, kTransposed, kTiles, FewBreak::kNothing>(out.data()); },
        check);
    expect_wrong("ordinary stores wrote shared memory at byte 2080 that wgmma_m64nNk16", 128,
                 kBytes,
                 [&] { multiply_few<T, kTransposed, kTiles, FewBreak::kAStoredTo>(out.data()); });
    expect_wrong("by ordinary stores, with no fence_proxy_async since", 128, kBytes,
                 [&] { multiply_few<T, kTransposed, kTiles, FewBreak::kBNotFenced>(out.data()); });
  }
};

using FewColumns = ::testing::Types<std::integral_constant<int, 1>, std::integral_constant<int, 2>,
                                    std::integral_constant<int, 3>, std::integral_constant<int, 4>>;
TYPED_TEST_SUITE(HopperFewColumns, FewColumns);
TYPED_TEST(HopperFewColumns, AAsItLies) {
  this->template expect_product<bfloat16, false>();
  this->template expect_product<float16, false>();
}
TYPED_TEST(HopperFewColumns, ATransposed) {
  this->template expect_product<bfloat16, true>();
  this->template expect_product<float16, true>();
}

// ---------------------------------------------------------------------------------------------------------------
// Matrices that are stored transposed.

enum class TransposedBreak { kNothing, kMisaligned, kOutside, kNoBarrier };

/// Stores two matrices of 8 x 8 and copies them to `out`. Element [row, column] of matrix i is
/// 64 i + 8 row + column.
template <TransposedBreak kBreak>
__global__ void store_transposed(uint16_t* out) {
  auto& smem = *shared<TileSmem>();
  const unsigned lane = threadIdx.x;
  uint32_t r[2];
  for (unsigned i = 0; i < 2; ++i) {
    const uint32_t first = 64 * i + lane / 4 * 8 + lane % 4 * 2;
    r[i] = first | (first + 1) << 16;
  }
  size_t place = lane * size_t{8};  // of a column
  if (kBreak == TransposedBreak::kMisaligned && lane == 13) place += 4;
  if (kBreak == TransposedBreak::kOutside && lane == 13) place = 64 * 64;
  // The other lanes' addresses are not used.
  ptx::stmatrix_x2_trans(lane < 16 ? &smem.tile[place] : nullptr, r);
  if (kBreak != TransposedBreak::kNoBarrier) __syncwarp();
  for (unsigned i = lane; i < 128; i += 32) out[i] = smem.tile[i];
}

TEST_F(Hopper, MatricesAreStoredTransposed) {
  GlobalArray<uint16_t> out(128);
  const auto check = [&]() -> std::string {
    for (size_t i = 0; i < 128; ++i) {  // column, row
      if (out[i] != i / 64 * 64 + i % 8 * 8 + i / 8 % 8) return "wrong at " + std::to_string(i);
    }
    out.fill(0xffff);
    return {};
  };
  const size_t bytes = sizeof(TileSmem);
  expect_right(
      32, bytes, [&] { store_transposed<TransposedBreak::kNothing>(out.data()); }, check);
  expect_wrong("writes a misaligned address, 8 bytes past a multiple of 16", 32, bytes,
               [&] { store_transposed<TransposedBreak::kMisaligned>(out.data()); });
  expect_wrong("not in the block's dynamic shared memory", 32, bytes,
               [&] { store_transposed<TransposedBreak::kOutside>(out.data()); });
  gpu_model::schedule() = {};
  if (gpu_model::kernels_are_instrumented()) {
    expect_rejected("after stmatrix_x2_trans at", 1, 32, bytes,
                    [&] { store_transposed<TransposedBreak::kNoBarrier>(out.data()); });
  }
}

TEST_F(Hopper, DescriptorsAreChecked) {
  const auto run = [](uint64_t a, uint64_t b) {
    return [=] {
      shared<ProductSmem>();
      float d[8][4];
      ptx::wgmma_fence(d);
      ptx::wgmma_m64n64k16<bfloat16>(d, a, b, false);
    };
  };
  const uint64_t right = uint64_t{1} << 62 | uint64_t{64} << 32;
  const size_t bytes = sizeof(ProductSmem);
  expect_wrong("is not a descriptor of A with a 128-byte swizzle", 128, bytes, run(64, right));
  expect_wrong("is not a descriptor of B with a 128-byte swizzle", 128, bytes,
               run(right, right | uint64_t{1} << 49));
  expect_wrong("is not a descriptor of A with a 128-byte swizzle", 128, bytes,
               run(right ^ uint64_t{3} << 62, right));  // of rows of 64 bytes
  expect_wrong("reads past the end of shared memory, at byte", 128, bytes,
               run(right, right | 0x3f00));
  expect_wrong("in a warpgroup of fewer than 128 threads", 96, bytes, run(right, right));
  expect_wrong("describes a misaligned address, 64 bytes past a multiple of 1024", 32, bytes,
               [] { ptx::matrix_descriptor(&shared<ProductSmem>()->a[32], 0, 1024); });
  expect_wrong("has other operands than in lane 0", 128, bytes, [=] {
    shared<ProductSmem>();
    float d[8][4];
    ptx::wgmma_fence(d);
    ptx::wgmma_m64n64k16<bfloat16>(d, right, right, threadIdx.x == 67);
  });
}

TEST_F(Hopper, RegistersAreRedistributedByWarpgroups) {
  expect_right(128, 0, [] { ptx::setmaxnreg_dec<40>(); });
  expect_wrong("setmaxnreg_inc at ", 128, 0, [] {
    if (threadIdx.x < 96) ptx::setmaxnreg_inc<160>();
  });
  expect_wrong("warps of one warpgroup disagree: ", 128, 0, [] {
    if (threadIdx.x < 64) {
      ptx::setmaxnreg_inc<160>();
    } else {
      ptx::setmaxnreg_inc<168>();
    }
  });
}

/// Two warpgroups want what the third gives back: 2 x 128 x (240 - 168) registers of its 128 x 168.
template <bool kGivesBack>
__global__ void three_warpgroups() {
  if (threadIdx.x < 256) {
    ptx::setmaxnreg_inc<240>();
  } else if constexpr (kGivesBack) {
    ptx::setmaxnreg_dec<24>();
  }
}

TEST_F(Hopper, RegistersComeFromOnePool) {
  expect_right(384, 0, three_warpgroups<true>);
  expect_wrong("a warp wants 2304 registers more, and the block has 0 to give", 384, 0,
               three_warpgroups<false>);
}

// ---------------------------------------------------------------------------------------------------------------
// Loads: boxes at a tensor's edges, and what is wrong with them.

struct LoadSmem {
  alignas(1024) uint16_t box[3 * 2 * 5 * 64];
  ptx::Mbarrier barrier;
};

/// Copies a box to `out`, for maps without a swizzle, and writes it back by `out_map`, for maps with one.
__global__ void load_box(const TensorMap* map, int c0, int c1, int c2, int c3, uint16_t* out,
                         const TensorMap* out_map) {
  auto& smem = *shared<LoadSmem>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.barrier, sizeof smem.box);
    ptx::cp_async_bulk_prefetch_tensor_4d(map, c0, c1, c2, c3);
    ptx::cp_async_bulk_tensor_4d(smem.box, map, c0, c1, c2, c3, &smem.barrier,
                                 ptx::createpolicy_evict_first());
  }
  __syncwarp();
  ptx::mbarrier_wait(&smem.barrier, 0);
  for (size_t i = threadIdx.x; i < sizeof smem.box / 2; i += 32) out[i] = smem.box[i];
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_tensor_4d_store(out_map, c0, c1, c2, c3, smem.box);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

TEST_F(Hopper, BoxesAtEdges) {
  constexpr int64_t kSize[4] = {100, 7, 3, 4}, kRowElements = 104;
  GlobalArray<uint16_t> tensor(kRowElements * 7 * 3 * 4), copy(kRowElements * 7 * 3 * 4);
  GlobalArray<uint16_t> out(sizeof(LoadSmem::box) / 2);
  for (size_t i = 0; i < kRowElements * 7 * 3 * 4; ++i) tensor[i] = static_cast<uint16_t>(i + 1);
  TensorShape shape;
  shape.rank = 4;
  for (size_t i = 0; i < 4; ++i) {
    shape.size[i] = static_cast<uint64_t>(kSize[i]);
    shape.stride_bytes[i] = i == 0   ? 2
                            : i == 1 ? kRowElements * 2
                                     : shape.stride_bytes[i - 1] * shape.size[i - 1];
    shape.box[i] = i == 0 ? 64 : i == 1 ? 5 : i == 2 ? 2 : 3;
  }
  for (const bool swizzle : {false, true}) {
    shape.swizzle_128b = swizzle;
    TensorMap map, copy_map;
    ASSERT_OK(mla::model::encode_tensor_map(tensor.data(), shape, &map));
    ASSERT_OK(mla::model::encode_tensor_map(copy.data(), shape, &copy_map));
    for (const auto& c :
         {std::array{0, 0, 0, 0}, std::array{64, 5, 2, 3}, std::array{-8, -1, 1, 2},
          std::array{56, 3, -1, -2}, std::array{-200, 0, 0, 0}, std::array{8, 9, 0, 0}}) {
      const auto at = [&](int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
        return static_cast<size_t>(((i3 * 3 + i2) * 7 + i1) * kRowElements + i0);
      };
      const auto check = [&]() -> std::string {
        size_t row = 0;
        for (int i3 = 0; i3 < 3; ++i3) {
          for (int i2 = 0; i2 < 2; ++i2) {
            for (int i1 = 0; i1 < 5; ++i1, ++row) {
              for (int i0 = 0; i0 < 64; ++i0) {
                const int64_t x[4] = {c[0] + i0, c[1] + i1, c[2] + i2, c[3] + i3};
                bool inside = true;
                for (size_t i = 0; i < 4; ++i) inside = inside && x[i] >= 0 && x[i] < kSize[i];
                const uint16_t expected = inside ? tensor[at(x[0], x[1], x[2], x[3])] : 0;
                const auto column = static_cast<size_t>(i0);
                const size_t found = row * 64 + (swizzle ? column ^ row % 8 * 8 : column);
                if (out[found] != expected) return "wrong at " + std::to_string(found);
                if (inside && copy[at(x[0], x[1], x[2], x[3])] != expected) return "wrong copy";
              }
            }
          }
        }
        copy.fill(0xffff);
        return {};
      };
      expect_right(
          32, sizeof(LoadSmem),
          [&] { load_box(&map, c[0], c[1], c[2], c[3], out.data(), &copy_map); }, check);
    }
  }
}

/// Copies a box of five dimensions.
struct FiveSmem {
  alignas(1024) uint16_t box[2 * 2 * 2 * 2 * 64];
  ptx::Mbarrier barrier;
};
__global__ void load_five(const TensorMap* map, const std::array<int, 5>& c, uint16_t* out) {
  auto& smem = *shared<FiveSmem>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.barrier, sizeof smem.box);
    ptx::cp_async_bulk_tensor_5d(smem.box, map, c[0], c[1], c[2], c[3], c[4], &smem.barrier,
                                 ptx::createpolicy_evict_first());
  }
  __syncwarp();
  ptx::mbarrier_wait(&smem.barrier, 0);
  for (size_t i = threadIdx.x; i < sizeof smem.box / 2; i += 32) out[i] = smem.box[i];
}

TEST_F(Hopper, BoxesOfFiveDimensions) {
  // The third dimension's stride is less than the second's, as that of 64 columns within a row.
  constexpr int64_t kSize[5] = {64, 3, 2, 3, 2}, kStride[5] = {1, 128, 64, 384, 1152};
  GlobalArray<uint16_t> tensor(2304), out(sizeof(FiveSmem::box) / 2);
  for (size_t i = 0; i < 2304; ++i) tensor[i] = static_cast<uint16_t>(i + 1);
  TensorShape shape;
  shape.rank = 5;
  for (size_t i = 0; i < 5; ++i) {
    shape.size[i] = static_cast<uint64_t>(kSize[i]);
    shape.stride_bytes[i] = static_cast<uint64_t>(kStride[i]) * 2;
    shape.box[i] = i == 0 ? 64 : 2;
  }
  std::vector<std::array<int, 5>> places = {{}, {-8, -1, -1, -1, -1}, {8, 2, 1, 2, 1}};
  for (size_t i = 0; i < 5; ++i) {  // outside in one dimension, half and whole
    for (const int start : {-1, 1}) {
      for (const int most : {1, 4}) {
        places.push_back({});
        places.back()[i] = start * (i == 0 ? most * 16 : start < 0 ? most : most + 1);
      }
    }
  }
  for (const bool swizzle : {false, true}) {
    shape.swizzle_128b = swizzle;
    TensorMap map;
    ASSERT_OK(mla::model::encode_tensor_map(tensor.data(), shape, &map));
    for (const auto& c : places) {
      const auto check = [&]() -> std::string {
        for (size_t i = 0; i < sizeof(FiveSmem::box) / 2; ++i) {
          const size_t row = i / 64;
          const size_t column = swizzle ? i % 64 ^ row % 8 * 8 : i % 64;
          const size_t in_box[5] = {column, row % 2, row / 2 % 2, row / 4 % 2, row / 8};
          bool inside = true;
          int64_t at = 0;
          for (size_t d = 0; d < 5; ++d) {
            const int64_t x = c[d] + static_cast<int64_t>(in_box[d]);
            inside = inside && x >= 0 && x < kSize[d];
            at += x * kStride[d];
          }
          const uint16_t expected = inside ? tensor[static_cast<size_t>(at)] : 0;
          if (out[i] != expected) return "wrong at " + std::to_string(i);
        }
        out.fill(0xffff);
        return {};
      };
      expect_right(
          32, sizeof(FiveSmem), [&] { load_five(&map, c, out.data()); }, check);
    }
  }
  const TensorMap four = matrix_map(tensor.data(), 16, 64, 8);
  expect_wrong("the tensor map must have rank 5", 32, sizeof(FiveSmem),
               [&] { load_five(&four, {}, out.data()); });
  TensorMap five;
  ASSERT_OK(mla::model::encode_tensor_map(tensor.data(), shape, &five));
  expect_wrong("the tensor map must have rank 4", 32, sizeof(LoadSmem),
               [&] { load_box(&five, 0, 0, 0, 0, out.data(), &four); });
  expect_wrong("the box begins at column 3", 32, sizeof(FiveSmem), [&] {
    load_five(&five, {3, 0, 0, 0, 0}, out.data());
  });
}

/// A kernel in which one thread calls `function`.
template <typename Function>
auto one_thread(Function function) {
  return [function] {
    auto& smem = *shared<LoadSmem>();
    if (threadIdx.x != 0) return;
    ptx::mbarrier_init(&smem.barrier, 1);
    ptx::fence_mbarrier_init();
    function(smem);
  };
}

TEST_F(Hopper, LoadsAreChecked) {
  GlobalArray<bfloat16> values(64 * 64);
  GlobalArray<float> floats(64);
  const TensorMap map = matrix_map(values.data(), 64, 64, 8);
  const TensorMap beyond = matrix_map(values.data(), 128, 64, 8);
  TensorMap garbage = map;
  garbage.rank = 77;
  const auto load = [](const TensorMap* of, int row, size_t element, uint64_t policy) {
    return one_thread([=](LoadSmem& smem) {
      ptx::mbarrier_arrive_expect_tx(&smem.barrier, 1024);
      ptx::cp_async_bulk_tensor_4d(&smem.box[element], of, 0, row, 0, 0, &smem.barrier, policy);
      ptx::mbarrier_wait(&smem.barrier, 0);
    });
  };
  const uint64_t policy = ptx::createpolicy_evict_first();
  const size_t bytes = sizeof(LoadSmem);
  expect_right(32, bytes, load(&map, 0, 0, policy));
  expect_wrong("writes a misaligned address, 512 bytes past a multiple of 1024", 32, bytes,
               load(&map, 0, 256, policy));
  expect_wrong("the tensor map is null", 32, bytes, load(nullptr, 0, 0, policy));
  expect_wrong("the tensor map must have rank 4", 32, bytes, load(&garbage, 0, 0, policy));
  expect_wrong("the cache policy is not one that createpolicy_evict_first or _last made", 32, bytes,
               load(&map, 0, 0, 5));
  expect_wrong("out-of-bounds global memory read", 32, bytes, load(&beyond, 64, 0, policy));
  expect_wrong("the box begins at column 3", 32, bytes, one_thread([=](LoadSmem& smem) {
                 ptx::mbarrier_arrive_expect_tx(&smem.barrier, 1024);
                 ptx::cp_async_bulk_tensor_4d(smem.box, &map, 3, 0, 0, 0, &smem.barrier, policy);
               }));
  expect_wrong("that are not in the block's dynamic shared memory", 32, bytes,
               load(&map, 0, size_t{1} << 20, policy));
  const auto bulk = [&](int count, int again) {
    return one_thread([=, source = floats.data()](LoadSmem& smem) {
      ptx::mbarrier_arrive_expect_tx(&smem.barrier, count);
      ptx::cp_async_bulk(smem.box, source, count, &smem.barrier);
      if (again == 1) ptx::cp_async_bulk(smem.box, source, count, &smem.barrier);
      if (again == 2) smem.box[5] = 3;
      ptx::mbarrier_wait(&smem.barrier, 0);
      if (again == 3) {
        smem.box[5] = 3;
        ptx::cp_async_bulk(smem.box, source, count, &smem.barrier);
      }
    });
  };
  expect_right(32, bytes, bulk(256, 0));
  expect_wrong("both must be multiples of 16", 32, bytes, bulk(8, 0));
  expect_wrong("out-of-bounds global memory read", 32, bytes, bulk(272, 0));
  expect_found(32, bytes, bulk(256, 1), [] { return std::string(); });
  expect_found(32, bytes, bulk(256, 2), [] { return std::string(); });
  expect_wrong("was written by ordinary stores, with no fence_proxy_async since", 32, bytes,
               bulk(256, 3));
}

// ---------------------------------------------------------------------------------------------------------------
// Barriers.

struct BarrierSmem {
  ptx::Mbarrier barrier;
  int values[128];
};

/// In every phase, all warps but the last write, and the last one adds up.
template <bool kWaits>
__global__ void phases(int* out) {
  auto& smem = *shared<BarrierSmem>();
  auto* barriers = reinterpret_cast<ptx::Mbarrier*>(&smem.values[96]);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&barriers[0], 96);
    ptx::mbarrier_init(&barriers[1], 32);
  }
  __syncthreads();
  int sum = 0;
  for (int phase = 0; phase < 5; ++phase) {
    if (threadIdx.x < 96) {
      ptx::mbarrier_wait(&barriers[1], (phase & 1) ^ 1);  // the first does not wait
      smem.values[threadIdx.x] = static_cast<int>(threadIdx.x) + phase;
      ptx::mbarrier_arrive(&barriers[0]);
    } else {
      if (kWaits) ptx::mbarrier_wait(&barriers[0], phase & 1);
      for (int i = 0; i < 96; ++i) sum += smem.values[i];
      ptx::mbarrier_arrive(&barriers[1]);
    }
  }
  if (threadIdx.x >= 96) out[threadIdx.x - 96] = sum;
}

TEST_F(Hopper, MbarrierPhases) {
  GlobalArray<int> out(32);
  const auto check = [&]() -> std::string {
    for (size_t i = 0; i < 32; ++i) {
      if (out[i] != 5 * 96 * 95 / 2 + 96 * 10) return "wrong at " + std::to_string(i);
    }
    out.fill(0);
    return {};
  };
  expect_right(
      128, sizeof(BarrierSmem), [&] { phases<true>(out.data()); }, check);
  expect_found(
      128, sizeof(BarrierSmem), [&] { phases<false>(out.data()); }, check);
}

TEST_F(Hopper, MbarriersAreChecked) {
  const size_t bytes = sizeof(BarrierSmem);
  expect_wrong("mbarrier_arrive(barrier at byte 0) at ", 32, bytes,
               [] { ptx::mbarrier_arrive(&shared<BarrierSmem>()->barrier); });
  expect_wrong("the barrier is not initialised", 32, bytes,
               [] { ptx::mbarrier_wait(&shared<BarrierSmem>()->barrier, 0); });
  expect_wrong("mbarrier_init at ", 32, bytes, [] {
    auto* byte = reinterpret_cast<std::byte*>(shared<BarrierSmem>());
    ptx::mbarrier_init(reinterpret_cast<ptx::Mbarrier*>(byte + 4), 1);
  });
  expect_wrong("not in the block's dynamic shared memory", 32, bytes, [] {
    ptx::Mbarrier local;
    ptx::mbarrier_init(&local, 1);
  });
  expect_wrong("must be 1 to 1048575", 32, bytes,
               [] { ptx::mbarrier_init(&shared<BarrierSmem>()->barrier, 0); });
  expect_wrong("too many arrivals: phase 0 takes 1 and still waits for", 32, bytes, [] {
    auto& barrier = shared<BarrierSmem>()->barrier;
    if (threadIdx.x != 0) return;
    ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_arrive_expect_tx(&barrier, 64);
    ptx::mbarrier_arrive(&barrier);
  });
  int line = 0;
  const auto deadlock = [&line] {
    auto& barrier = shared<BarrierSmem>()->barrier;
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&barrier, 4);
      ptx::mbarrier_arrive_expect_tx(&barrier, 8192);
    }
    __syncthreads();
    note(0, line, __LINE__ + 1);
    ptx::mbarrier_wait(&barrier, 0);
  };
  expect_wrong("phase 0 wants 3 of 4 arrivals and 8192 bytes", 32, bytes, deadlock);
  expect_contains(error_of(1, 32, bytes, deadlock),
                  "deadlock: block (0,0,0): threads 0-31 wait in mbarrier_wait(barrier at byte 0, "
                  "parity 0) at " +
                      at(line) + ": phase 0 wants");
  expect_wrong("mbarrier_init(barrier at byte 0)", 64, bytes, [] {
    auto& barrier = shared<BarrierSmem>()->barrier;
    if (threadIdx.x == 0) ptx::mbarrier_init(&barrier, 1);
    __syncthreads();
    if (threadIdx.x == 32) ptx::mbarrier_wait(&barrier, 0);
    __nanosleep(1);  // lets the other thread go first
    if (threadIdx.x == 0) ptx::mbarrier_init(&barrier, 1);
  });
}

enum class Named { kRight, kNoArrive, kWrongCount, kTwice, kPartOfAWarp };

/// A warp writes what two others read, in turn.
template <Named kBreak>
__global__ void named_barriers(int* out) {
  auto& smem = *shared<BarrierSmem>();
  int sum = 0;
  for (int turn = 0; turn < 4; ++turn) {
    if (threadIdx.x < 32) {
      if (turn > 0) ptx::barrier_sync(2, 96);
      smem.values[threadIdx.x] = turn + 1;
      if (kBreak == Named::kNoArrive && turn == 2) break;
      if (kBreak == Named::kPartOfAWarp && threadIdx.x == 7) continue;
      ptx::barrier_arrive(1, kBreak == Named::kWrongCount ? 64 : 96);
      if (kBreak == Named::kTwice) ptx::barrier_arrive(1, 96);
    } else {
      ptx::barrier_sync(1, 96);
      sum += smem.values[threadIdx.x % 32];
      if (turn < 3) ptx::barrier_arrive(2, 96);
    }
  }
  if (threadIdx.x >= 32) out[threadIdx.x - 32] = sum;
}

TEST_F(Hopper, NamedBarriersThatOneArrivesAt) {
  GlobalArray<int> out(64);
  const auto check = [&]() -> std::string {
    for (size_t i = 0; i < 64; ++i) {
      if (out[i] != 10) return "wrong at " + std::to_string(i);
    }
    out.fill(0);
    return {};
  };
  const size_t bytes = sizeof(BarrierSmem);
  expect_right(
      96, bytes, [&] { named_barriers<Named::kRight>(out.data()); }, check);
  expect_wrong("deadlock: block (0,0,0): ", 96, bytes,
               [&] { named_barriers<Named::kNoArrive>(out.data()); });
  expect_wrong("divergent barrier: ", 96, bytes,
               [&] { named_barriers<Named::kWrongCount>(out.data()); });
  expect_wrong("but the barrier has not completed since the same thread passed barrier_arrive(1",
               96, bytes, [&] { named_barriers<Named::kTwice>(out.data()); });
  expect_wrong("", 96, bytes, [&] { named_barriers<Named::kPartOfAWarp>(out.data()); });
  expect_wrong("32 threads, the first of them thread ", 64, bytes, [] {
    if (threadIdx.x < 32) {
      ptx::barrier_arrive(3, 96);
    } else {
      ptx::barrier_sync(3, 96);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------
// All of it: O = sum over tiles of (Q K^T) K, which is attention without its softmax. One warpgroup
// makes P for both. Each warpgroup multiplies P by half of K's columns. A warp loads.

struct AttentionSmem {
  alignas(1024) uint16_t q[8][64 * 64];
  alignas(1024) uint16_t k[2][8][64 * 64];
  alignas(1024) uint16_t p[64 * 64];
  ptx::Mbarrier full[2], empty[2];
};
constexpr int kAttentionTiles = 3;
enum class Lack { kNothing, kFence, kBarrierAfterWrite, kBarrierBeforeWrite, kLateRelease };

template <Lack kLack>
__global__ void attention(const TensorMap* q_map, const TensorMap* k_map, float* out) {
  auto& smem = *shared<AttentionSmem>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&smem.full[i], 1);
      ptx::mbarrier_init(&smem.empty[i], 256);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const unsigned group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (group == 2) {
    if (threadIdx.x != 256) return;
    const uint64_t policy = ptx::createpolicy_evict_first();
    for (int tile = 0; tile < kAttentionTiles; ++tile) {
      const int stage = tile % 2;
      ptx::mbarrier_wait(&smem.empty[stage], tile / 2 % 2 == 0);
      ptx::mbarrier_arrive_expect_tx(&smem.full[stage], tile == 0 ? 131072 : 65536);
      for (int box = 0; box < 8; ++box) {
        if (tile == 0) {
          ptx::cp_async_bulk_tensor_4d(smem.q[box], q_map, box * 64, 0, 0, 0, &smem.full[0],
                                       policy);
        }
        ptx::cp_async_bulk_tensor_4d(smem.k[stage][box], k_map, box * 64, tile * 64, 0, 0,
                                     &smem.full[stage], policy);
      }
    }
    return;
  }
  float o[32][4] = {};
  for (int tile = 0; tile < kAttentionTiles; ++tile) {
    const int stage = tile % 2;
    ptx::mbarrier_wait(&smem.full[stage], tile / 2 % 2);
    if (group == 0) {
      float s[8][4];
      ptx::wgmma_fence(s);
      const uint64_t q = ptx::matrix_descriptor(smem.q, 0, 1024);
      const uint64_t k = ptx::matrix_descriptor(smem.k[stage], 0, 1024);
      for (uint64_t i = 0; i < 32; ++i) {
        const uint64_t on = (i / 4 * 8192 + i % 4 * 32) / 16;
        ptx::wgmma_m64n64k16<bfloat16>(s, q + on, k + on, i > 0);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(s);
      if (tile > 0 && kLack != Lack::kBarrierBeforeWrite) ptx::barrier_sync(2, 256);
      for (unsigned i = 0; i < 4; ++i) {  // 16 rows of 16 columns
        uint32_t r[4];
        for (unsigned j = 0; j < 4; ++j) {
          const float* pair = &s[i * 2 + j / 2][j % 2 * 2];
          const bfloat16 rounded[2] = {from_float<bfloat16>(pair[0]),
                                       from_float<bfloat16>(pair[1])};
          std::memcpy(&r[j], rounded, 4);
        }
        const unsigned row = warp * 16 + lane % 16, piece = i * 2 + lane / 16;
        ptx::stmatrix_x4(&smem.p[row * 64 + (piece ^ row % 8) * 8], r);
      }
      if (kLack != Lack::kFence) ptx::fence_proxy_async();
    }
    if (kLack != Lack::kBarrierAfterWrite) ptx::barrier_sync(1, 256);
    if (kLack == Lack::kLateRelease) ptx::mbarrier_arrive(&smem.empty[stage]);
    ptx::wgmma_fence(o);
    const uint64_t p = ptx::matrix_descriptor(smem.p, 0, 1024);
    const uint64_t v = ptx::matrix_descriptor(smem.k[stage][group * 4], 8192, 1024);
    for (uint64_t i = 0; i < 4; ++i) {
      ptx::wgmma_m64n256k16_trans_b<bfloat16>(o, p + i * 2, v + i * 128, true);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>(o);
    if (kLack != Lack::kLateRelease) ptx::mbarrier_arrive(&smem.empty[stage]);
    if (kLack != Lack::kBarrierBeforeWrite && group == 1 && tile + 1 < kAttentionTiles) {
      ptx::barrier_arrive(2, 256);
    }
  }
  const unsigned row = warp * 16 + lane / 4;
  for (unsigned n = 0; n < 32; ++n) {
    for (unsigned i = 0; i < 4; ++i) {
      out[(row + i / 2 * 8) * 512 + group * 256 + n * 8 + lane % 4 * 2 + i % 2] = o[n][i];
    }
  }
}

TEST_F(Hopper, Attention) {
  constexpr size_t kTokens = kAttentionTiles * 64;
  GlobalArray<bfloat16> q(64 * 512), k(kTokens * 512);
  GlobalArray<float> out(64 * 512);
  std::mt19937 random(5);  // small integers: everything is exact
  const auto small = [&] { return from_float<bfloat16>(static_cast<float>(random() % 3) - 1); };
  for (size_t i = 0; i < 64 * 512; ++i) q[i] = small();
  for (size_t i = 0; i < kTokens * 512; ++i) k[i] = small();
  std::vector<float> expected(64 * 512), keys(kTokens * 512);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = to_float(k[i]);
  for (size_t row = 0; row < 64; ++row) {
    for (size_t token = 0; token < kTokens; ++token) {
      float p = 0;
      for (size_t i = 0; i < 512; ++i) p += to_float(q[row * 512 + i]) * keys[token * 512 + i];
      for (size_t i = 0; i < 512; ++i) expected[row * 512 + i] += p * keys[token * 512 + i];
    }
  }
  const TensorMap q_map = matrix_map(q.data(), 64, 512, 64);
  const TensorMap k_map = matrix_map(k.data(), kTokens, 512, 64);
  const auto check = [&]() -> std::string {
    const bool right = out.values() == expected;
    out.fill(NAN);
    return right ? "" : "wrong";
  };
  const size_t bytes = sizeof(AttentionSmem);
  expect_right(
      288, bytes, [&] { attention<Lack::kNothing>(&q_map, &k_map, out.data()); }, check);
  expect_wrong(", which has not called fence_proxy_async since", 288, bytes,
               [&] { attention<Lack::kFence>(&q_map, &k_map, out.data()); });
  expect_found(
      288, bytes, [&] { attention<Lack::kBarrierAfterWrite>(&q_map, &k_map, out.data()); }, check);
  expect_found(
      288, bytes, [&] { attention<Lack::kBarrierBeforeWrite>(&q_map, &k_map, out.data()); }, check);
  expect_found(
      288, bytes, [&] { attention<Lack::kLateRelease>(&q_map, &k_map, out.data()); }, check);
}

// ---------------------------------------------------------------------------------------------------------------
// What the instructions cost; not a test. Times the model on this machine.

TEST_F(Hopper, DISABLED_Cost) {
  gpu_model::schedule().os_threads = 1;
  const auto time = [](const char* what, int count, size_t bytes, auto kernel) {
    const std::clock_t start = std::clock();
    gpu_model::launch(1, 128, bytes, kernel);
    const double elapsed = static_cast<double>(std::clock() - start) * 1e6 / CLOCKS_PER_SEC;
    std::printf("%s: %.1f us\n", what, elapsed / count);
  };
  const auto zero = [] {
    auto& smem = *shared<ProductSmem>();
    for (unsigned i = threadIdx.x; i < 64 * 64; i += 128) smem.a[i] = 0;
    for (unsigned i = threadIdx.x; i < 256 * 64; i += 128) smem.b[i] = 0;
    ptx::fence_proxy_async();
    __syncthreads();
    return &smem;
  };
  const auto products = [&](const char* what, auto form) {
    constexpr uint64_t kProducts = decltype(form)::value == 64 ? 36 : 8;  // in a group
    time(what, 100 * kProducts, 232448, [&] {
      ProductSmem& smem = *zero();
      float d[decltype(form)::value == 64 ? 8 : 32][4];
      const uint64_t a = ptx::matrix_descriptor(smem.a, 0, 1024);
      const uint64_t b = ptx::matrix_descriptor(smem.b, 8192, 1024);
      for (int i = 0; i < 100; ++i) {
        ptx::wgmma_fence(d);
        for (uint64_t product = 0; product < kProducts; ++product) {
          const uint64_t k = product % 4;
          if constexpr (decltype(form)::value == 64) {
            ptx::wgmma_m64n64k16<bfloat16>(d, a + k * 2, b + k * 2, product > 0);
          } else {
            ptx::wgmma_m64n256k16_trans_b<bfloat16>(d, a + k * 2, b + k * 128, product > 0);
          }
        }
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>(d);
      }
    });
  };
  products("m64n64k16 of a group of 36", std::integral_constant<int, 64>());
  products("m64n256k16 of a group of 8", std::integral_constant<int, 256>());
  time("fence_proxy_async of 128 threads, with a barrier, 227 KiB", 1000, 232448, [&] {
    zero();
    for (int i = 0; i < 1000; ++i) {
      ptx::fence_proxy_async();
      __syncthreads();
    }
  });
  GlobalArray<bfloat16> values(64 * 64);
  const TensorMap map = matrix_map(values.data(), 64, 64, 64);
  time("8 KiB load", 2000, 232448, [&] {
    auto& smem = *shared<PipelineSmem>();
    if (threadIdx.x != 0) return;
    ptx::mbarrier_init(&smem.full[0], 1);
    ptx::fence_mbarrier_init();
    for (int i = 0; i < 2000; ++i) {
      ptx::mbarrier_arrive_expect_tx(&smem.full[0], 8192);
      ptx::cp_async_bulk_tensor_4d(smem.b, &map, 0, 0, 0, 0, &smem.full[0],
                                   ptx::createpolicy_evict_first());
      ptx::mbarrier_wait(&smem.full[0], i & 1);
    }
  });
}

}  // namespace
}  // namespace gpu_model_test
