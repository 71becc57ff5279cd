/// @file
/// What a kernel sees when a plain C++ compiler builds it for the GPU model: the names of CUDA C++,
/// with the meaning the CUDA programming guide gives them.
///
/// Functions that wait take the caller's file and line as last arguments, by default those of the
/// call, so that a report can say who waits where. Whatever touches the model's own state is out of
/// line: this header is compiled with the kernels' flags, sanitizers included, and the model
/// without them.
#pragma once

#include <math.h>

#include <atomic>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <type_traits>

#include "reference/gpu_model/gpu_model.h"
// NOLINTBEGIN(bugprone-reserved-identifier): the names are CUDA's
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
/// One copy per OS thread, because a block never leaves its OS thread. Only dynamic shared memory
/// is poisoned before each block, lies between guard pages and belongs to one block, so kernels
/// that are to be checked use that. So must those whose blocks are resident together: they share
/// the OS thread, and with it this copy.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
constexpr float2 make_float2(float x, float y) {
  return {x, y};
}
constexpr float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
constexpr int2 make_int2(int x, int y) {
  return {x, y};
}
constexpr int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
constexpr uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) {
  return {x, y, z};
}
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// Set by the model whenever it runs a GPU thread; constinit spares the check for a dynamic
// initialiser at every use.
extern thread_local constinit uint3 threadIdx;
extern thread_local constinit uint3 blockIdx;
extern thread_local constinit dim3 blockDim;
extern thread_local constinit dim3 gridDim;
constexpr int warpSize = 32;

namespace gpu_model {

/// Runs `kernel` once for every thread of the grid and returns when all have returned. Throws
/// KernelError for the first thing that is wrong; what the kernel wrote until then stays written.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
            const LaunchOptions& options = {});

/// The block's dynamic shared memory, of which the kernel uses `bytes`; an error if the launch
/// asked for less.
void* dynamic_shared_memory(size_t bytes);

namespace detail {

/// A member of the struct that lays out a kernel's shared memory.
struct NamedRegion {
  const void* begin;
  size_t bytes;
};
/// Whether a recording of this launch has yet to learn the names of its shared memory's regions.
bool wants_regions();
/// Tells it: "q, kv, p", in the order of `regions`.
void name_regions(const char* names, std::initializer_list<NamedRegion> regions);

/// Meets all threads of the block; returns how many brought a true `predicate`.
int block_barrier(const char* what, bool predicate, const char* file, int line);

/// __syncwarp: the one warp function that orders memory.
void warp_barrier(unsigned mask, const char* file, int line);

/// Gives every lane of `mask` the `operand` of its `source` lane.
uint64_t warp_shuffle(const char* what, unsigned mask, uint64_t operand, unsigned source,
                      const char* file, int line);

/// Gives every lane of `mask` the combination of all operands, which must not depend on their
/// order.
using Combine = uint64_t (*)(uint64_t, uint64_t);
uint64_t warp_reduce(const char* what, unsigned mask, uint64_t operand, Combine combine,
                     const char* file, int line);

/// This thread's number in its warp.
unsigned lane();

/// Lets other threads run now and then: called where a kernel may spin.
void scheduling_point();
/// Lets every other runnable thread of the block run first, and other blocks if they are resident:
/// this thread waits for something that they do.
void yield(const char* what, const char* file, int line);
/// Orders this thread's accesses to memory.
void thread_fence();

template <typename T>
concept Shuffled = std::is_trivially_copyable_v<T> &&(sizeof(T) == 4 || sizeof(T) == 8);

template <Shuffled T>
T shuffle(const char* what, unsigned mask, T value, unsigned source, const char* file, int line) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const uint64_t bits = warp_shuffle(what, mask, std::bit_cast<Bits>(value), source, file, line);
  return std::bit_cast<T>(static_cast<Bits>(bits));
}

/// First lane of a lane's segment of `width` lanes.
inline unsigned segment(unsigned lane, int width) {
  return lane & ~(static_cast<unsigned>(width) - 1);
}

/// The usual arithmetic conversions, as in CUDA's overloads of min and max.
template <typename A, typename B>
concept Arithmetic = std::is_arithmetic_v<A> && std::is_arithmetic_v<B>;

template <typename T, typename Change>
T atomic_update(T* address, Change change) {
  scheduling_point();
  std::atomic_ref<T> target(*address);
  T old = target.load(std::memory_order_relaxed);
  while (!target.compare_exchange_weak(old, change(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace detail
}  // namespace gpu_model

/// Inside the struct that lays out a kernel's shared memory: members that recordings call by name.
#define GPU_MODEL_REGIONS(...)                                                 \
  void name_regions() const {                                                  \
    [](const char* names, const auto&... members) {                            \
      gpu_model::detail::name_regions(names, {{&members, sizeof members}...}); \
    }(#__VA_ARGS__, __VA_ARGS__);                                              \
  }

/// The caller's place, as the last two parameters of everything that waits.
#define GPU_MODEL_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(GPU_MODEL_HERE) {
  gpu_model::detail::block_barrier("__syncthreads", false, file, line);
}
inline int __syncthreads_count(int predicate, GPU_MODEL_HERE) {
  return gpu_model::detail::block_barrier("__syncthreads_count", predicate != 0, file, line);
}
inline int __syncthreads_or(int predicate, GPU_MODEL_HERE) {
  return gpu_model::detail::block_barrier("__syncthreads_or", predicate != 0, file, line) > 0;
}
inline int __syncthreads_and(int predicate, GPU_MODEL_HERE) {
  return gpu_model::detail::block_barrier("__syncthreads_and", predicate == 0, file, line) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, GPU_MODEL_HERE) {
  gpu_model::detail::warp_barrier(mask, file, line);
}

template <gpu_model::detail::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, GPU_MODEL_HERE) {
  const unsigned self = gpu_model::detail::lane();
  const unsigned lane = gpu_model::detail::segment(self, width) +
                        (static_cast<unsigned>(source) & (static_cast<unsigned>(width) - 1));
  return gpu_model::detail::shuffle("__shfl_sync", mask, value, lane, file, line);
}
template <gpu_model::detail::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, GPU_MODEL_HERE) {
  const unsigned self = gpu_model::detail::lane();
  const unsigned lane = self ^ static_cast<unsigned>(lane_mask);
  const bool inside = lane < gpu_model::detail::segment(self, width) + static_cast<unsigned>(width);
  return gpu_model::detail::shuffle("__shfl_xor_sync", mask, value, inside ? lane : self, file,
                                    line);
}
template <gpu_model::detail::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, GPU_MODEL_HERE) {
  const unsigned self = gpu_model::detail::lane();
  const bool inside = self >= gpu_model::detail::segment(self, width) + delta;
  return gpu_model::detail::shuffle("__shfl_up_sync", mask, value, inside ? self - delta : self,
                                    file, line);
}
template <gpu_model::detail::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, GPU_MODEL_HERE) {
  const unsigned self = gpu_model::detail::lane();
  const bool inside =
      self + delta < gpu_model::detail::segment(self, width) + static_cast<unsigned>(width);
  return gpu_model::detail::shuffle("__shfl_down_sync", mask, value, inside ? self + delta : self,
                                    file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, GPU_MODEL_HERE) {
  const uint64_t bit = predicate ? uint64_t{1} << gpu_model::detail::lane() : 0;
  return static_cast<unsigned>(gpu_model::detail::warp_reduce(
      "__ballot_sync", mask, bit, [](uint64_t a, uint64_t b) { return a | b; }, file, line));
}
inline int __any_sync(unsigned mask, int predicate, GPU_MODEL_HERE) {
  return gpu_model::detail::warp_reduce(
             "__any_sync", mask, predicate != 0, [](uint64_t a, uint64_t b) { return a | b; }, file,
             line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, GPU_MODEL_HERE) {
  return gpu_model::detail::warp_reduce(
             "__all_sync", mask, predicate != 0, [](uint64_t a, uint64_t b) { return a & b; }, file,
             line) != 0;
}

template <typename T>
requires std::same_as<T, int> || std::same_as<T, unsigned> T __reduce_add_sync(unsigned mask,
                                                                               T value,
                                                                               GPU_MODEL_HERE) {
  return static_cast<T>(gpu_model::detail::warp_reduce(
      "__reduce_add_sync", mask, static_cast<uint64_t>(value),
      [](uint64_t a, uint64_t b) { return a + b; }, file, line));
}
template <typename T>
requires std::same_as<T, int> || std::same_as<T, unsigned> T __reduce_max_sync(unsigned mask,
                                                                               T value,
                                                                               GPU_MODEL_HERE) {
  return static_cast<T>(gpu_model::detail::warp_reduce(
      "__reduce_max_sync", mask, static_cast<uint64_t>(value),
      [](uint64_t a, uint64_t b) { return static_cast<T>(a) < static_cast<T>(b) ? b : a; }, file,
      line));
}
template <typename T>
requires std::same_as<T, int> || std::same_as<T, unsigned> T __reduce_min_sync(unsigned mask,
                                                                               T value,
                                                                               GPU_MODEL_HERE) {
  return static_cast<T>(gpu_model::detail::warp_reduce(
      "__reduce_min_sync", mask, static_cast<uint64_t>(value),
      [](uint64_t a, uint64_t b) { return static_cast<T>(b) < static_cast<T>(a) ? b : a; }, file,
      line));
}

// Atomics are relaxed, as CUDA's are: what orders memory is __threadfence, __syncwarp and
// __syncthreads.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  gpu_model::detail::scheduling_point();
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return gpu_model::detail::atomic_update(address,
                                          [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return gpu_model::detail::atomic_update(address,
                                          [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  gpu_model::detail::scheduling_point();
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  gpu_model::detail::scheduling_point();
  std::atomic_ref<T>(*address).compare_exchange_strong(compare, value, std::memory_order_relaxed);
  return compare;
}
inline void __threadfence() {
  gpu_model::detail::thread_fence();
}
inline void __threadfence_block() {
  gpu_model::detail::thread_fence();
}
inline void __nanosleep(unsigned, GPU_MODEL_HERE) {
  gpu_model::detail::yield("__nanosleep", file, line);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline int __float_as_int(float value) {
  return std::bit_cast<int>(value);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
/// Byte i of the result is byte s / 16^i % 8 of the eight of x and y, x's lowest first.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (s >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  }
  return result;
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}
inline int __clz(int bits) {
  return std::countl_zero(static_cast<unsigned>(bits));
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

// The hardware's approximations, here as exact as the library: tests compare with a tolerance.
// noexcept because glibc declares some of these names.
inline float __expf(float x) noexcept {
  return expf(x);
}
inline float __logf(float x) noexcept {
  return logf(x);
}
inline float __log2f(float x) noexcept {
  return log2f(x);
}
inline float __fmul_rn(float x, float y) {
  return x * y;
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float rsqrtf(float x) {
  return 1 / sqrtf(x);
}

/// Of a NaN and a number the number is returned, as on a GPU.
template <typename A, typename B>
requires gpu_model::detail::Arithmetic<A, B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y || y != y ? x : y;
}
template <typename A, typename B>
requires gpu_model::detail::Arithmetic<A, B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x > y || y != y ? x : y;
}
// NOLINTEND(bugprone-reserved-identifier)
