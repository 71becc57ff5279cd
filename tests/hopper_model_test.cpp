/// @file
/// Hopper's instructions on the GPU model: right kernels give right results under every schedule,
/// and each wrong one, which lacks one statement of a right one or has one in a wrong place, is
/// rejected.

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "stages/common/ptx_sm90.h"
#include "tests/gpu_model_fixture.h"

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
  /// Right under every schedule: `check()` gives what is wrong with the results.
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

  /// Rejected under every schedule.
  template <typename Kernel>
  static void expect_wrong(const std::string& part, unsigned threads, size_t shared_bytes,
                           Kernel kernel) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule().seed = seed;
      expect_rejected(part, 1, threads, shared_bytes, kernel);
    }
  }
  /// Rejected, or wrong results, under some.
  template <typename Kernel, typename Check>
  static void expect_found(unsigned threads, size_t shared_bytes, Kernel kernel, Check check) {
    int found = 0;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule().seed = seed;
      found += !error_of(1, threads, shared_bytes, kernel).empty() || !check().empty();
    }
    EXPECT_GE(found, 1);
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

/// The map of a matrix [rows, columns] whose boxes are [box_rows, 64], swizzled.
template <typename T>
TensorMap matrix_map(const T* values, size_t rows, size_t columns, unsigned box_rows) {
  TensorShape shape;
  shape.rank = 4;
  const size_t bytes = rows * columns * 2;
  const uint64_t size[] = {columns, rows, 1, 1}, stride[] = {2, columns * 2, bytes, bytes};
  const uint32_t box[] = {64, box_rows, 1, 1};
  std::copy_n(size, 4, shape.size);
  std::copy_n(stride, 4, shape.stride_bytes);
  std::copy_n(box, 4, shape.box);
  shape.swizzle_128b = true;
  TensorMap map;
  EXPECT_TRUE(mla::model::encode_tensor_map(values, shape, &map).ok());
  return map;
}

// ---------------------------------------------------------------------------------------------------------------
// Products: D[64, columns] = A[64, 64] B, of one warpgroup, operands brought by TMA.

struct ProductPlan {
  alignas(1024) uint16_t a[64 * 64];
  alignas(1024) uint16_t b[256 * 64];
  ptx::Mbarrier full;
};

enum class Form { kN32, kN64, kN256Shared, kN256Registers };

template <typename T, Form kForm>
__global__ void multiply(const TensorMap* a_map, const TensorMap* b_map, const T* a_global,
                         float* out) {
  auto& smem = *shared<ProductPlan>();
  constexpr bool kTransposed = kForm == Form::kN256Shared || kForm == Form::kN256Registers;
  constexpr int kColumns = kForm == Form::kN32 ? 32 : kForm == Form::kN64 ? 64 : 256;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, (64 + kColumns) * 128);
    const uint64_t policy = ptx::createpolicy_evict_first();
    ptx::cp_async_bulk_tensor_4d(smem.a, a_map, 0, 0, 0, 0, &smem.full, policy);
    // K-major: one box of all columns' rows; MN-major: boxes of 64 columns.
    for (int box = 0; box < (kTransposed ? 4 : 1); ++box) {
      ptx::cp_async_bulk_tensor_4d(&smem.b[box * 64 * 64], b_map, box * 64, 0, 0, 0, &smem.full,
                                   policy);
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
      ptx::wgmma_m64n32k16<T>(d, a + k * 2, b + k * 2, k > 0);
    } else if constexpr (kForm == Form::kN64) {
      ptx::wgmma_m64n64k16<T>(d, a + k * 2, b + k * 2, k > 0);
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
    constexpr size_t kColumns = kForm == Form::kN32 ? 32 : kForm == Form::kN64 ? 64 : 256;
    GlobalArray<T> a(64 * 64), b(kColumns * 64);
    GlobalArray<float> out(64 * kColumns);
    fill_random(a, 64 * 64, 1);
    fill_random(b, kColumns * 64, 2);
    const TensorMap a_map = matrix_map(a.data(), 64, 64, 64);
    const TensorMap b_map = kTransposed ? matrix_map(b.data(), 64, kColumns, 64)
                                        : matrix_map(b.data(), kColumns, 64, kColumns);
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
        128, sizeof(ProductPlan), [&] { multiply<T, kForm>(&a_map, &b_map, a.data(), out.data()); },
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
TYPED_TEST(HopperProduct, N256) {
  this->template expect_product<Form::kN256Shared>();
}
TYPED_TEST(HopperProduct, N256OfRegisters) {
  this->template expect_product<Form::kN256Registers>();
}

}  // namespace
}  // namespace gpu_model_test
