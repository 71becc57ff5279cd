/// @file
/// All PTX of the project: one thin function per instruction, named as in the ISA. Under nvcc each
/// is inline assembly; on the GPU model it is reference/gpu_model/ptx.h's function of that name.
///
/// The instructions are defined in NVIDIA's PTX ISA,
/// https://docs.nvidia.com/cuda/parallel-thread-execution/; every comment names the section. All
/// need compute capability 8.0, those of e4m3 8.9; Hopper's own are in ptx_sm90.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "stages/common/machine/device.h"

#ifndef __CUDACC__
#include "reference/gpu_model/ptx.h"
#endif

namespace mla::MLA_MACHINE::ptx {

#ifdef __CUDACC__

// An instruction that reads or writes what other code may touch has the clobber "memory", so that
// the compiler moves no access past it.

/// The address that an instruction for shared memory takes.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// d += a b, one 16x8x16 product of a warp: 16-bit a and b, fp32 d. Section "Matrix Fragments for
/// mma.m16n8k16 with floating point type",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, float16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Loads four 8x8 matrices of 16-bit values, r[i] from matrix i: lane l passes the address of row
/// l % 8 of matrix l / 8, 16 bytes of shared memory, 16-byte aligned, and gets the elements of row
/// l / 4 in columns 2 (l % 4) and 2 (l % 4) + 1. Section "ldmatrix",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row_smem))
               : "memory");
}
/// The same, of the transposed matrices: lane l gets the elements of column l / 4 in rows
/// 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row_smem))
               : "memory");
}

/// Copies 16 bytes from global to shared memory, both 16-byte aligned, asynchronously and not
/// through L1. With `source_bytes` 0 instead of 16 it writes zeros and reads nothing. Section
/// "cp.async",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
__device__ __forceinline__ void cp_async_16(void* destination_smem, const void* source_gmem,
                                            int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(destination_smem)), "l"(__cvta_generic_to_global(source_gmem)),
                 "r"(source_bytes)
               : "memory");
}
/// Makes one group of all copies that this thread has issued since the last group. Section
/// "cp.async.commit_group",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-commit-group
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `kPending` of this thread's groups, the newest, are incomplete. Other
/// threads see the copies after a barrier. Section "cp.async.wait_group",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-wait-group
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

/// Meets `threads` threads (whole warps) of the block at barrier `id`, 1 to 15, and orders their
/// accesses to memory; 0 is __syncthreads'. Section "bar, barrier",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

/// The same, and returns whether any of the threads brought true. Section "bar, barrier", as
/// barrier_sync.
__device__ __forceinline__ bool barrier_sync_or(int id, int threads, bool predicate) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.b32 mine, %3, 0;\n"
      "bar.red.or.pred all, %1, %2, mine;\n"
      "selp.b32 %0, 1, 0, all;\n"
      "}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(int{predicate})
      : "memory");
  return any != 0;
}

/// 2^x within 2 units in the last place, subnormal results flushed to zero. Section "ex2",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-ex2
__device__ __forceinline__ float ex2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// Two e4m3 codes as two fp16, exact, the lower byte in the lower half. A NaN becomes 0x7fff. Needs
/// compute capability 8.9; without it, e4m3_value() of reference/float8.h. Section "cvt",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
__device__ __forceinline__ uint32_t cvt_rn_f16x2_e4m3x2(uint16_t codes) {
  uint32_t result;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(codes));
  return result;
}
/// The nearest e4m3 codes of two fp32, ties to even, `low` in the lower byte. Saturates at +-448; a NaN
/// becomes 0x7f. Needs compute capability 8.9; without it, round_to_e4m3() of reference/float8.h, which
/// gives the same. Section "cvt", as above.
__device__ __forceinline__ uint16_t cvt_rn_satfinite_e4m3x2_f32(float high, float low) {
  uint16_t result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
  return result;
}

/// a b + c of two pairs of 16-bit values, each rounded once; subnormals are kept. Section "fma" of the
/// half precision floating point instructions,
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#half-precision-floating-point-instructions-fma
template <typename T>
__device__ __forceinline__ uint32_t fma_rn_x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    static_assert(std::is_same_v<T, float16>);
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}
/// Byte i of the result is the byte of `bytes` that digit i of the hexadecimal selector names, the last digit
/// being 0: digits 0 to 3; and with 8 more, eight copies of that byte's sign bit. Section "prmt",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-prmt
__device__ __forceinline__ uint32_t prmt(uint32_t bytes, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(bytes), "r"(selector));
  return result;
}

/// Lets the grid that was launched to depend on this one start as soon as all blocks have called
/// this or ended. Before compute capability 9.0 it does nothing. Section "griddepcontrol",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Waits until the grids that this one was launched to depend on have ended and what they wrote is
/// visible. Does nothing in a grid that depends on none, and before compute capability 9.0.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Between blocks, through counters in global memory. What a thread did before a release is visible
// to a thread that acquires what it wrote, in any block; other threads' work comes along if a
// barrier ordered it before. Only blocks of a launch_cooperative() may wait for each other. Sections
// "ld", "st", "red" and "Memory Consistency Model",
// https://docs.nvidia.com/cuda/parallel-thread-execution/#memory-consistency-model

/// Loads and acquires, at the scope of the GPU.
__device__ __forceinline__ unsigned ld_acquire(const unsigned* address_gmem) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address_gmem))
               : "memory");
  return value;
}
/// The same of 64 bits.
__device__ __forceinline__ uint64_t ld_acquire(const uint64_t* address_gmem) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(__cvta_generic_to_global(address_gmem))
               : "memory");
  return value;
}
/// Stores and releases, at the scope of the GPU.
__device__ __forceinline__ void st_release(unsigned* address_gmem, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(address_gmem)), "r"(value)
               : "memory");
}
/// The same of 64 bits.
__device__ __forceinline__ void st_release(uint64_t* address_gmem, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(address_gmem)), "l"(value)
               : "memory");
}
/// Adds and releases, at the scope of the GPU.
__device__ __forceinline__ void red_add_release(unsigned* address_gmem, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(address_gmem)), "r"(value)
               : "memory");
}
/// Loads and acquires until the counter is at least `value`. On the model a wait that nothing can
/// end is reported with both.
__device__ __forceinline__ void wait_until_at_least(const unsigned* counter_gmem, unsigned value) {
  while (ld_acquire(counter_gmem) < value) {
  }
}

#else

using gpu_model::ptx::barrier_sync;
using gpu_model::ptx::barrier_sync_or;
using gpu_model::ptx::cp_async_16;
using gpu_model::ptx::cp_async_commit_group;
using gpu_model::ptx::cp_async_wait_group;
using gpu_model::ptx::cvt_rn_f16x2_e4m3x2;
using gpu_model::ptx::cvt_rn_satfinite_e4m3x2_f32;
using gpu_model::ptx::ex2_approx;
using gpu_model::ptx::fma_rn_x2;
using gpu_model::ptx::griddepcontrol_launch_dependents;
using gpu_model::ptx::griddepcontrol_wait;
using gpu_model::ptx::ld_acquire;
using gpu_model::ptx::ldmatrix_x4;
using gpu_model::ptx::ldmatrix_x4_trans;
using gpu_model::ptx::mma_m16n8k16;
using gpu_model::ptx::prmt;
using gpu_model::ptx::red_add_release;
using gpu_model::ptx::st_release;
using gpu_model::ptx::wait_until_at_least;

#endif

}  // namespace mla::MLA_MACHINE::ptx
