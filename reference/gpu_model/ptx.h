/// @file
/// The PTX instructions that kernels use through stages/common/ptx/ptx.h, on the model. What they
/// do is documented there; what the model checks, and when a copy arrives, in README.md.
///
/// Kernels see these very functions, not wrappers, so that reports name the kernel's line. Whatever
/// reads or writes the kernel's memory is in this header, compiled with the kernel's flags and
/// never inlined, so that AddressSanitizer sees the access as called from that line. The race detector is
/// told of it by the model, with the kernel's line, and does not see it by itself (GPU_MODEL_UNSEEN).
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "reference/float16.h"
#include "reference/float8.h"
#include "reference/gpu_model/simt.h"

/// A function whose accesses the race detector does not see: the model tells it of them.
#define GPU_MODEL_UNSEEN [[gnu::no_sanitize_thread]]

namespace gpu_model {
namespace detail {

/// 16 bytes: a row of an 8x8 matrix, or what one cp.async copies.
using Granule [[gnu::vector_size(16), gnu::may_alias]] = uint32_t;

/// What a warp does when all 32 lanes have come, with what each brought.
using WarpOperation = void (*)(void* const* lanes);
/// Meets the 32 lanes of the warp; the last to come runs `operation` with the `operands` of all.
void warp_operation(const char* what, void* operands, WarpOperation operation, const char* file,
                    int line);

struct MmaOperands {
  uint32_t a[4], b[2];
  float d[4];
};
void multiply_bfloat16(void* const* lanes);
void multiply_float16(void* const* lanes);

struct MatrixOperands {
  Granule row;
  uint32_t* r;
};
void load_matrices(void* const* lanes);
void load_matrices_transposed(void* const* lanes);

/// Rejects a row that is not 16 aligned bytes of shared memory, or that something still writes
/// asynchronously.
void check_matrix_row(const char* what, const void* row, const char* file, int line);

/// A cp.async of 16 bytes. A null source means zeros.
struct Copy {
  void* destination = nullptr;
  const void* source = nullptr;
};
/// Checks and remembers a copy. Returns whether it must arrive at once.
bool issue_copy(const Copy& copy, int source_bytes, const char* file, int line);
/// Ends a group of copies.
void commit_copies(const char* file, int line);
/// A wait for all but `pending` groups begins, for a recording.
void wait_for_copies(int pending, const char* file, int line);
/// Gives the next of the copies that a wait for all but `pending` groups covers; false if there is
/// none left.
bool take_copy(int pending, Copy& copy);

/// Copies, or writes zeros.
GPU_MODEL_UNSEEN inline void carry_out(const Copy& copy) {
  *static_cast<Granule*>(copy.destination) =
      copy.source == nullptr ? Granule{} : *static_cast<const Granule*>(copy.source);
}

/// This thread executes an instruction that does nothing to memory, nor waits.
void count_instruction(const char* what, const char* file, int line);

/// What all earlier grids did comes before what this thread does from here on.
void wait_for_grids(const char* file, int line);
/// This thread executes an instruction that waits for nothing, for a recording.
void executed(const char* what, const char* file, int line);

/// x y + z, where none has more than 11 bits, so that rounding the result to 16 bits gives what rounding
/// the exact one would: if it is not exact, its last bit is 1.
inline float fma_to_odd(float x, float y, float z) {
  const double product = double{x} * y;  // exact
  double sum = product + z;
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  const double z_part = sum - product;
  const double error = (product - (sum - z_part)) + (z - z_part);
  const auto to_odd = [](auto value, auto bits, bool too_large) {
    bits = std::bit_cast<decltype(bits)>(value);
    return std::bit_cast<decltype(value)>((bits - too_large) | 1);
  };
  if (error != 0) sum = to_odd(sum, uint64_t{}, (error > 0) != (sum > 0));
  const auto result = static_cast<float>(sum);
  if (result == sum) return result;
  return to_odd(result, uint32_t{}, std::abs(double{result}) > std::abs(sum));
}

/// Meets `threads` threads at barrier `id`; returns the number of true predicates.
int named_barrier(int id, int threads, bool predicate, const char* file, int line);
/// Counts this thread at barrier `id` without waiting.
void named_barrier_arrive(int id, int threads, const char* file, int line);

// co_resident.cpp.

/// This thread has loaded `value` from `address`: lets others run, at once if it was there before.
void acquired(const char* what, const unsigned* address, unsigned value, const char* file,
              int line);
/// This thread has released something: `address` now holds `value`.
void released(const char* what, const unsigned* address, unsigned value, const char* file,
              int line);
/// Waits until the counter may have become at least `wanted`.
void wait_for_counter(const unsigned* counter, unsigned wanted, const char* file, int line);

template <typename T>
[[gnu::always_inline]] inline T load_acquire(const T* address) {
  return std::atomic_ref<T>(*const_cast<T*>(address)).load(std::memory_order_acquire);
}

}  // namespace detail

namespace ptx {

// Inlined, so that the race detector, which sees these accesses itself, names the kernel's line.
[[gnu::always_inline]] inline unsigned ld_acquire(const unsigned* address_gmem, GPU_MODEL_HERE) {
  const unsigned value = detail::load_acquire(address_gmem);
  detail::acquired("ld_acquire", address_gmem, value, file, line);
  return value;
}
// Of 64 bits: a report of a deadlock, and a recording, show the lower half.
[[gnu::always_inline]] inline uint64_t ld_acquire(const uint64_t* address_gmem, GPU_MODEL_HERE) {
  const uint64_t value = detail::load_acquire(address_gmem);
  detail::acquired("ld_acquire", reinterpret_cast<const unsigned*>(address_gmem),
                   static_cast<unsigned>(value), file, line);
  return value;
}
[[gnu::always_inline]] inline void st_release(uint64_t* address_gmem, uint64_t value,
                                              GPU_MODEL_HERE) {
  detail::scheduling_point();
  std::atomic_ref<uint64_t>(*address_gmem).store(value, std::memory_order_release);
  detail::released("st_release", reinterpret_cast<const unsigned*>(address_gmem),
                   static_cast<unsigned>(value), file, line);
}
[[gnu::always_inline]] inline void st_release(unsigned* address_gmem, unsigned value,
                                              GPU_MODEL_HERE) {
  detail::scheduling_point();
  std::atomic_ref<unsigned>(*address_gmem).store(value, std::memory_order_release);
  detail::released("st_release", address_gmem, value, file, line);
}
[[gnu::always_inline]] inline void red_add_release(unsigned* address_gmem, unsigned value,
                                                   GPU_MODEL_HERE) {
  detail::scheduling_point();
  const unsigned before =
      std::atomic_ref<unsigned>(*address_gmem).fetch_add(value, std::memory_order_release);
  detail::released("red_add_release", address_gmem, before + value, file, line);
}
[[gnu::always_inline]] inline void wait_until_at_least(const unsigned* counter_gmem, unsigned value,
                                                       GPU_MODEL_HERE) {
  detail::scheduling_point();
  while (detail::load_acquire(counter_gmem) < value) {
    detail::wait_for_counter(counter_gmem, value, file, line);
  }
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, GPU_MODEL_HERE) {
  static_assert(std::is_same_v<T, mla::bfloat16> || std::is_same_v<T, mla::float16>);
  detail::MmaOperands operands{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  detail::warp_operation(
      "mma_m16n8k16", &operands,
      std::is_same_v<T, mla::bfloat16> ? detail::multiply_bfloat16 : detail::multiply_float16, file,
      line);
  for (int i = 0; i < 4; ++i) d[i] = operands.d[i];
}

GPU_MODEL_UNSEEN [[gnu::noinline]] inline void ldmatrix_x4(uint32_t (&r)[4], const void* row_smem,
                                                           GPU_MODEL_HERE) {
  detail::check_matrix_row("ldmatrix_x4", row_smem, file, line);
  detail::MatrixOperands operands{*static_cast<const detail::Granule*>(row_smem), r};
  detail::warp_operation("ldmatrix_x4", &operands, detail::load_matrices, file, line);
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void ldmatrix_x4_trans(uint32_t (&r)[4],
                                                                 const void* row_smem,
                                                                 GPU_MODEL_HERE) {
  detail::check_matrix_row("ldmatrix_x4_trans", row_smem, file, line);
  detail::MatrixOperands operands{*static_cast<const detail::Granule*>(row_smem), r};
  detail::warp_operation("ldmatrix_x4_trans", &operands, detail::load_matrices_transposed, file,
                         line);
}

GPU_MODEL_UNSEEN [[gnu::noinline]] inline void cp_async_16(void* destination_smem,
                                                           const void* source_gmem,
                                                           int source_bytes, GPU_MODEL_HERE) {
  const detail::Copy copy{destination_smem, source_bytes == 0 ? nullptr : source_gmem};
  if (detail::issue_copy(copy, source_bytes, file, line)) {
    detail::carry_out(copy);
  } else {  // what lay there must not pass for what is to come
    *static_cast<detail::Granule*>(destination_smem) = ~detail::Granule{};
  }
}
inline void cp_async_commit_group(GPU_MODEL_HERE) {
  detail::commit_copies(file, line);
}
/// Copies what arrived early once more: a write may happen until here.
template <int kPending>
GPU_MODEL_UNSEEN [[gnu::noinline]] void cp_async_wait_group(GPU_MODEL_HERE) {
  static_assert(kPending >= 0);
  detail::wait_for_copies(kPending, file, line);
  for (detail::Copy copy; detail::take_copy(kPending, copy);) detail::carry_out(copy);
}

inline void barrier_sync(int id, int threads, GPU_MODEL_HERE) {
  detail::named_barrier(id, threads, false, file, line);
}
inline bool barrier_sync_or(int id, int threads, bool predicate, GPU_MODEL_HERE) {
  return detail::named_barrier(id, threads, predicate, file, line) > 0;
}

inline float ex2_approx(float x, GPU_MODEL_HERE) {
  detail::count_instruction("ex2_approx", file, line);
  return exp2f(x);
}

inline uint32_t cvt_rn_f16x2_e4m3x2(uint16_t codes, GPU_MODEL_HERE) {
  detail::count_instruction("cvt_rn_f16x2_e4m3x2", file, line);
  const auto half = [](int code) -> uint32_t {
    if ((code & 0x7F) == mla::kNanE4M3) return 0x7FFF;
    const auto value = mla::from_float<mla::float16>(mla::e4m3_value(static_cast<uint8_t>(code)));
    return std::bit_cast<uint16_t>(value);
  };
  return half(codes >> 8) << 16 | half(codes & 0xFF);
}
inline uint16_t cvt_rn_satfinite_e4m3x2_f32(float high, float low, GPU_MODEL_HERE) {
  detail::count_instruction("cvt_rn_satfinite_e4m3x2_f32", file, line);
  return static_cast<uint16_t>(mla::round_to_e4m3(high) << 8 | mla::round_to_e4m3(low));
}

template <typename T>
uint32_t fma_rn_x2(uint32_t a, uint32_t b, uint32_t c, GPU_MODEL_HERE) {
  static_assert(std::is_same_v<T, mla::bfloat16> || std::is_same_v<T, mla::float16>);
  detail::count_instruction("fma_rn_x2", file, line);
  const auto half = [&](int shift) -> uint32_t {
    const auto value = [&](uint32_t pair) {
      return mla::to_float(std::bit_cast<T>(static_cast<uint16_t>(pair >> shift)));
    };
    const auto rounded = mla::from_float<T>(detail::fma_to_odd(value(a), value(b), value(c)));
    return std::bit_cast<uint16_t>(rounded);
  };
  return half(16) << 16 | half(0);
}
inline uint32_t prmt(uint32_t bytes, uint32_t selector, GPU_MODEL_HERE) {
  detail::count_instruction("prmt", file, line);
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i & 0xF;
    uint32_t byte = digit % 8 < 4 ? bytes >> digit % 8 * 8 & 0xFF : 0;
    if (digit >= 8) byte = byte >= 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// Launches run one after the other here, so there is nothing to wait for; but the race detector knows.
inline void griddepcontrol_launch_dependents(GPU_MODEL_HERE) {
  detail::executed("griddepcontrol_launch_dependents", file, line);
}
inline void griddepcontrol_wait(GPU_MODEL_HERE) {
  detail::wait_for_grids(file, line);
}

}  // namespace ptx
}  // namespace gpu_model
