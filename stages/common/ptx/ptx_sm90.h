/// @file
/// Hopper's PTX: mbarriers, the bulk copy engine (TMA), warpgroup matrix products. As in
/// ptx.h, one thin function per instruction, named as in the ISA; all need the target sm_90a. On
/// the GPU model each is reference/gpu_model/ptx_sm90.h's function of that name.
///
/// Two proxies. Ordinary loads and stores see shared memory through the generic proxy; TMA and
/// wgmma read and write it through the asynchronous one. What TMA wrote is visible to all who
/// waited for its mbarrier. What ordinary stores (cp.async and stmatrix among them) wrote is
/// visible to the asynchronous proxy after fence_proxy_async() in the writing thread and then a
/// barrier.
#pragma once

#include "stages/common/ptx/ptx.h"
#include "stages/common/ptx/tensor_map.h"

#ifndef __CUDACC__
#include "reference/gpu_model/ptx_sm90.h"
#endif

namespace mla::MLA_MACHINE::ptx {

/// A matrix in shared memory, for wgmma, with 16-bit elements and a 128-byte swizzle: it consists
/// of boxes of 64 columns, and a box of atoms of 8 rows = 1024 bytes. Chunk c of row r, 16 bytes,
/// lies in place c ^ (r % 8). A descriptor counts addresses in units of 16 bytes, so
/// `descriptor + bytes / 16` is that of the matrix that begins `bytes` further on.
///
/// Read by rows (K-major: k runs along a row), `stride_bytes` lies between groups of 8 rows, and
/// `leading_bytes` is not used. Read by columns (MN-major, trans_a, trans_b: k runs down a column),
/// `leading_bytes` lies between boxes of 64 columns and `stride_bytes` between groups of 8 rows.
/// Section "Matrix Descriptor Format",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
using MatrixDescriptor = uint64_t;

#ifdef __CUDACC__

/// Counts arrivals, and bytes that TMA brings, of one phase after the other. In shared memory.
/// Section "mbarrier",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier
struct alignas(8) Mbarrier {
  uint64_t state;  ///< Opaque.
};

/// Makes a barrier whose every phase ends with `count` arrivals. One thread calls it, then
/// fence_mbarrier_init(); others may use the barrier after a block barrier.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier_smem, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;"
               :
               : "r"(shared_address(barrier_smem)), "r"(count)
               : "memory");
}
/// Makes this thread's mbarrier_init visible to the asynchronous proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/// Arrives once. What this thread did before is visible to those who wait.
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier_smem) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];"
               :
               : "r"(shared_address(barrier_smem))
               : "memory");
}
/// Arrives once, and makes the phase wait for `bytes` more that TMA brings.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Mbarrier* barrier_smem, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier_smem)), "r"(bytes)
               : "memory");
}
/// Waits until the phase of this parity has ended: 0 for the first, third, ... phase. On a new
/// barrier parity 1 does not wait. A thread that is more than one phase behind waits for the wrong
/// one.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier_smem, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}"
      :
      : "r"(shared_address(barrier_smem)), "r"(parity)
      : "memory");
}

/// Orders this thread's ordinary accesses to shared memory before the asynchronous proxy's.
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-membar
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// An L2 hint for data that is read once.
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-createpolicy
__device__ __forceinline__ uint64_t createpolicy_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}
/// An L2 hint for data that others will read.
__device__ __forceinline__ uint64_t createpolicy_evict_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
  return policy;
}

/// Fetches a tensor map into the constant cache. `map`: a __grid_constant__ parameter.
__device__ __forceinline__ void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}
/// Copies the map's box at these coordinates, innermost first, to shared memory, which is 1024-byte
/// aligned for a 128-byte swizzle. Elements outside the tensor become 0. Completes the bytes of the
/// whole box on the mbarrier. One thread calls it. `c0` must begin at a multiple of 16 bytes,
/// negative or not: elsewhere an H200 stops with an illegal instruction. Section
/// "cp.async.bulk.tensor",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
__device__ __forceinline__ void cp_async_bulk_tensor_4d(void* destination_smem,
                                                        const TensorMap* map, int c0, int c1,
                                                        int c2, int c3, Mbarrier* barrier_smem,
                                                        uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
      :
      : "r"(shared_address(destination_smem)), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
        "r"(shared_address(barrier_smem)), "l"(cache_policy)
      : "memory");
}
/// The same for a tensor of five dimensions.
__device__ __forceinline__ void cp_async_bulk_tensor_5d(void* destination_smem,
                                                        const TensorMap* map, int c0, int c1,
                                                        int c2, int c3, int c4,
                                                        Mbarrier* barrier_smem,
                                                        uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;"
      :
      : "r"(shared_address(destination_smem)), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
        "r"(c4), "r"(shared_address(barrier_smem)), "l"(cache_policy)
      : "memory");
}
/// Fetches the map's box into L2.
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-prefetch-tensor
__device__ __forceinline__ void cp_async_bulk_prefetch_tensor_4d(const TensorMap* map, int c0,
                                                                 int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];"
               :
               : "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
/// Copies a box from shared memory to the tensor, except for 16-byte chunks that lie wholly outside
/// it: the end of a row is written up to a multiple of 16 bytes. One thread calls it, after
/// fence_proxy_async() in the threads that wrote the box and a barrier.
__device__ __forceinline__ void cp_async_bulk_tensor_4d_store(const TensorMap* map, int c0, int c1,
                                                              int c2, int c3,
                                                              const void* source_smem) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
      "[%0, {%1, %2, %3, %4}], [%5];"
      :
      : "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(source_smem))
      : "memory");
}
/// Copies `bytes`, a multiple of 16, from global to shared memory, both 16-byte aligned, and
/// completes them on the mbarrier. One thread calls it. Section "cp.async.bulk",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk
__device__ __forceinline__ void cp_async_bulk(void* destination_smem, const void* source_gmem,
                                              int bytes, Mbarrier* barrier_smem) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(destination_smem)), "l"(__cvta_generic_to_global(source_gmem)),
        "r"(bytes), "r"(shared_address(barrier_smem))
      : "memory");
}
/// Copies `bytes`, a multiple of 16, from shared to global memory, both 16-byte aligned. One thread
/// calls it.
__device__ __forceinline__ void cp_async_bulk_store(void* destination_gmem, const void* source_smem,
                                                    int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :
               : "l"(__cvta_generic_to_global(destination_gmem)), "r"(shared_address(source_smem)),
                 "r"(bytes)
               : "memory");
}
/// Makes one group of the stores that this thread has issued since the last group.
__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Waits until at most `kPending` of this thread's groups, the newest, may still read shared
/// memory.
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(kPending) : "memory");
}

/// Stores four 8x8 matrices of 16-bit values, matrix i from r[i]: lane l passes the address of row
/// l % 8 of matrix l / 8, 16 bytes of shared memory; registers as in ldmatrix_x4. Section
/// "stmatrix",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-stmatrix
__device__ __forceinline__ void stmatrix_x4(void* row_smem, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(row_smem)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

/// Stores two 8x8 matrices, transposed: lane l < 16 passes the address of column l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x2_trans(void* column_smem, const uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
               :
               : "r"(shared_address(column_smem)), "r"(r[0]), "r"(r[1])
               : "memory");
}

/// Arrives at barrier `id` without waiting; `threads` counts those who arrive and those who wait.
/// Section "bar, barrier", as barrier_sync.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

/// Gives a warpgroup this many registers per thread; waits until they are free. Section
/// "setmaxnreg",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#miscellaneous-instructions-setmaxnreg
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
/// Leaves a warpgroup this many registers per thread.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

// Clusters: blocks that reach into each other's shared memory. A pointer from mapa() is good for
// ordinary loads, stores and atomics, and for the functions below whose parameters are not named
// _smem. Before a block touches another's memory the other must have started, and before a block
// ends the others must be done with its memory: both are what a cluster barrier is for.

/// This block's number in its cluster. Section "%cluster_ctarank",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#special-registers-cluster-ctarank
__device__ __forceinline__ unsigned cluster_ctarank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// Blocks of the cluster. Section "%cluster_nctarank",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#special-registers-cluster-nctarank
__device__ __forceinline__ unsigned cluster_nctarank() {
  unsigned count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}
/// Arrives at the cluster's barrier without waiting; all threads of the cluster that have not
/// returned must, a warp's lanes together. What a thread did before is visible to those who wait.
/// Section "barrier.cluster",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
/// The same, but orders no memory.
__device__ __forceinline__ void barrier_cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
}
/// Waits until all have arrived.
__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// Where the variable at `address_smem` lies in the block of this rank. Section "mapa",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-mapa
template <typename T>
__device__ __forceinline__ T* mapa(T* address_smem, unsigned rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(address)
               : "l"(reinterpret_cast<uint64_t>(address_smem)), "r"(rank));
  return reinterpret_cast<T*>(address);
}
/// fence_proxy_async() for the shared memory of all blocks of the cluster.
__device__ __forceinline__ void fence_proxy_async_cluster() {
  asm volatile("fence.proxy.async.shared::cluster;" ::: "memory");
}
/// mbarrier_arrive() at a barrier of any block of the cluster. A thread that waits and then reads what
/// this one wrote uses mbarrier_wait_cluster().
__device__ __forceinline__ void mbarrier_arrive_cluster(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
}
/// mbarrier_arrive_expect_tx() at a barrier of any block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_expect_tx_cluster(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
/// mbarrier_wait() for what threads of other blocks wrote, too.
__device__ __forceinline__ void mbarrier_wait_cluster(Mbarrier* barrier_smem, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}"
      :
      : "r"(shared_address(barrier_smem)), "r"(parity)
      : "memory");
}
/// Stores a value of 4, 8 or 16 bytes in any block of the cluster, asynchronously, and completes its
/// bytes on an mbarrier of the same block. Section "st.async",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st-async
template <typename T>
__device__ __forceinline__ void st_async(T* destination, std::type_identity_t<T> value,
                                         Mbarrier* barrier) {
  static_assert(std::is_trivially_copyable_v<T> &&
                (sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16));
  if constexpr (sizeof(T) == 16) {
    const auto* words = reinterpret_cast<const uint32_t*>(&value);
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
        "[%0], {%1, %2, %3, %4}, [%5];"
        :
        : "r"(shared_address(destination)), "r"(words[0]), "r"(words[1]), "r"(words[2]),
          "r"(words[3]), "r"(shared_address(barrier))
        : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 :
                 : "r"(shared_address(destination)),
                   "r"(*reinterpret_cast<const uint32_t*>(&value)), "r"(shared_address(barrier))
                 : "memory");
  } else {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];"
                 :
                 : "r"(shared_address(destination)),
                   "l"(*reinterpret_cast<const uint64_t*>(&value)), "r"(shared_address(barrier))
                 : "memory");
  }
}
/// Adds to a number in any block of the cluster, asynchronously, and completes 4 bytes on an
/// mbarrier of the same block. Section "red.async",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-red-async
__device__ __forceinline__ void red_async_add(uint32_t* destination, uint32_t value,
                                              Mbarrier* barrier) {
  asm volatile(
      "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 "
      "[%0], %1, [%2];"
      :
      : "r"(shared_address(destination)), "r"(value), "r"(shared_address(barrier))
      : "memory");
}
/// Copies `bytes`, a multiple of 16, from this block's shared memory to that of any block of the
/// cluster, both 16-byte aligned, and completes them on an mbarrier of the latter. One thread calls
/// it.
__device__ __forceinline__ void cp_async_bulk_cluster(void* destination, const void* source_smem,
                                                      int bytes, Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(destination)), "r"(shared_address(source_smem)), "r"(bytes),
        "r"(shared_address(barrier))
      : "memory");
}
/// cp_async_bulk_tensor_4d() to the same place in every block of the cluster whose bit in `mask` is
/// set, by rank; each block's own mbarrier completes the bytes.
__device__ __forceinline__ void cp_async_bulk_tensor_4d_multicast(
    void* destination_smem, const TensorMap* map, int c0, int c1, int c2, int c3,
    Mbarrier* barrier_smem, uint16_t mask, uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7, %8;"
      :
      : "r"(shared_address(destination_smem)), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
        "r"(shared_address(barrier_smem)), "h"(mask), "l"(cache_policy)
      : "memory");
}

namespace detail {
// The compiler does not know what an asynchronous product does to these registers. This keeps it
// from moving an access to them past this point.
/// Pins a register.
__device__ __forceinline__ void pin(float& value) {
  asm volatile("" : "+f"(value)::"memory");
}
/// Pins a register.
__device__ __forceinline__ void pin(uint32_t& value) {
  asm volatile("" : "+r"(value)::"memory");
}
/// Pins all registers of an array.
template <typename T, int kCount>
__device__ __forceinline__ void pin(T (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin(values[i]);
}

/// `swizzle`: 1 of 128 bytes, 2 of 64. Of the address 18 bits: those above say which block of a cluster it
/// is, and would reach into the leading bytes.
__device__ __forceinline__ MatrixDescriptor matrix_descriptor(const void* matrix_smem,
                                                              int leading_bytes, int stride_bytes,
                                                              uint64_t swizzle) {
  return (shared_address(matrix_smem) & 0x3ffff) >> 4 | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | swizzle << 62;
}
}  // namespace detail

/// The descriptor of a matrix; see MatrixDescriptor. `matrix_smem` is 1024-byte aligned; to begin
/// further on, add to the descriptor.
__device__ __forceinline__ MatrixDescriptor matrix_descriptor(const void* matrix_smem,
                                                              int leading_bytes, int stride_bytes) {
  return detail::matrix_descriptor(matrix_smem, leading_bytes, stride_bytes, 1);
}
/// The same of a B of one box of 32 columns, read by rows, with a 64-byte swizzle: chunk c of row r lies
/// in place c ^ (r / 2 % 4). `matrix_smem` is 512-byte aligned.
__device__ __forceinline__ MatrixDescriptor matrix_descriptor_64b(const void* matrix_smem,
                                                                  int stride_bytes) {
  return detail::matrix_descriptor(matrix_smem, 0, stride_bytes, 2);
}

/// Must come before the first wgmma, and between ordinary code that writes `registers`
/// (accumulators, or an A in registers) and the wgmma that takes them. Section "wgmma.fence",
/// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-fence
template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (detail::pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Makes one group of all wgmma that this warp has issued since the last group.
__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most `kPending` of this warp's groups, the newest, are incomplete. `registers`
/// are the accumulators and A of the completed ones, which may be touched again.
template <int kPending, typename... Registers>
__device__ __forceinline__ void wgmma_wait_group(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
  (detail::pin(registers), ...);
}

// D = A B, or D += A B where `accumulate`: 64 rows by N columns, k = 16, of one warpgroup, 16-bit A
// and B, fp32 D. In d[n] lane l of warp w holds columns 8 n + 2 (l % 4) and the next of D: [0] and
// [1] in row 16 w + l / 4, [2] and [3] in the eighth row after it. A in registers lies as in
// mma_m16n8k16, rows 16 w ... 16 w + 15. Until a wait covers a product, nothing may touch its
// registers. Section "wgmma.mma_async",
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma-async
#define MLA_WGMMA_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define MLA_WGMMA_D4(n) MLA_WGMMA_D(n), MLA_WGMMA_D(n + 1), MLA_WGMMA_D(n + 2), MLA_WGMMA_D(n + 3)
#define MLA_WGMMA_128_REGISTERS                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "  \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "  \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "  \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "    \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "   \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "

/// A and B in shared memory, both K-major; B is [64 columns, k].
template <typename T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[8][4], MatrixDescriptor a,
                                                MatrixDescriptor b, bool accumulate) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}"
        : MLA_WGMMA_D4(0), MLA_WGMMA_D4(4)
        : "l"(a), "l"(b), "r"(int{accumulate}));
  } else {
    static_assert(std::is_same_v<T, float16>);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}"
        : MLA_WGMMA_D4(0), MLA_WGMMA_D4(4)
        : "l"(a), "l"(b), "r"(int{accumulate}));
  }
}
/// A in registers; B in shared memory, K-major: [64 columns, k].
template <typename T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[8][4], const uint32_t (&a)[4],
                                                MatrixDescriptor b, bool accumulate) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
        : MLA_WGMMA_D4(0), MLA_WGMMA_D4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}));
  } else {
    static_assert(std::is_same_v<T, float16>);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
        : MLA_WGMMA_D4(0), MLA_WGMMA_D4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}));
  }
}
/// A in shared memory, K-major; B in shared memory, MN-major: [k, 256 columns].
template <typename T>
__device__ __forceinline__ void wgmma_m64n256k16_trans_b(float (&d)[32][4], MatrixDescriptor a,
                                                         MatrixDescriptor b, bool accumulate) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " MLA_WGMMA_128_REGISTERS
        "%128, %129, p, 1, 1, 0, 1;\n}"
        : MLA_WGMMA_D4(0), MLA_WGMMA_D4(4), MLA_WGMMA_D4(8), MLA_WGMMA_D4(12), MLA_WGMMA_D4(16),
          MLA_WGMMA_D4(20), MLA_WGMMA_D4(24), MLA_WGMMA_D4(28)
        : "l"(a), "l"(b), "r"(int{accumulate}));
  } else {
    static_assert(std::is_same_v<T, float16>);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 " MLA_WGMMA_128_REGISTERS
        "%128, %129, p, 1, 1, 0, 1;\n}"
        : MLA_WGMMA_D4(0), MLA_WGMMA_D4(4), MLA_WGMMA_D4(8), MLA_WGMMA_D4(12), MLA_WGMMA_D4(16),
          MLA_WGMMA_D4(20), MLA_WGMMA_D4(24), MLA_WGMMA_D4(28)
        : "l"(a), "l"(b), "r"(int{accumulate}));
  }
}
/// A in registers; B in shared memory, MN-major: [k, 256 columns].
template <typename T>
__device__ __forceinline__ void wgmma_m64n256k16_trans_b(float (&d)[32][4], const uint32_t (&a)[4],
                                                         MatrixDescriptor b, bool accumulate) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " MLA_WGMMA_128_REGISTERS
        "{%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}"
        : MLA_WGMMA_D4(0), MLA_WGMMA_D4(4), MLA_WGMMA_D4(8), MLA_WGMMA_D4(12), MLA_WGMMA_D4(16),
          MLA_WGMMA_D4(20), MLA_WGMMA_D4(24), MLA_WGMMA_D4(28)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}));
  } else {
    static_assert(std::is_same_v<T, float16>);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 " MLA_WGMMA_128_REGISTERS
        "{%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}"
        : MLA_WGMMA_D4(0), MLA_WGMMA_D4(4), MLA_WGMMA_D4(8), MLA_WGMMA_D4(12), MLA_WGMMA_D4(16),
          MLA_WGMMA_D4(20), MLA_WGMMA_D4(24), MLA_WGMMA_D4(28)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}));
  }
}
// The same for 8 to 32 columns. A number of an operand is a string to the compiler, so each number of
// columns is written out, with the six numbers that follow those of D: A's, B's and the flag's, with A in
// shared memory three, with A in registers all.
#define MLA_WGMMA_SHARED_A(columns, registers, n0, n1, n2, n3, n4, n5, type, transpose_a, ...)     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" n2                                             \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers \
               "}, "                                                                               \
               "%" n0 ", %" n1 ", p, 1, 1, " transpose_a ", 0;\n}"                                 \
               : __VA_ARGS__                                                                       \
               : "l"(a), "l"(b), "r"(int{accumulate}))
#define MLA_WGMMA_REGISTER_A(columns, registers, n0, n1, n2, n3, n4, n5, type, transpose_a, ...)   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" n5                                             \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers \
               "}, "                                                                               \
               "{%" n0 ", %" n1 ", %" n2 ", %" n3 "}, %" n4 ", p, 1, 1, 0;\n}"                     \
               : __VA_ARGS__                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}))
#define MLA_WGMMA_COLUMNS(product, type, transpose_a)                                           \
  if constexpr (kTiles == 1) {                                                                  \
    product("8", "%0, %1, %2, %3", "4", "5", "6", "7", "8", "9", type, transpose_a,             \
            MLA_WGMMA_D(0));                                                                    \
  } else if constexpr (kTiles == 2) {                                                           \
    product("16", "%0, %1, %2, %3, %4, %5, %6, %7", "8", "9", "10", "11", "12", "13", type,     \
            transpose_a, MLA_WGMMA_D(0), MLA_WGMMA_D(1));                                       \
  } else if constexpr (kTiles == 3) {                                                           \
    product("24", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11", "12", "13", "14", "15",   \
            "16", "17", type, transpose_a, MLA_WGMMA_D(0), MLA_WGMMA_D(1), MLA_WGMMA_D(2));     \
  } else {                                                                                      \
    static_assert(kTiles == 4);                                                                 \
    product("32", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "16", \
            "17", "18", "19", "20", "21", type, transpose_a, MLA_WGMMA_D4(0));                  \
  }

/// A and B in shared memory, both K-major; B is [8 kTiles columns, k].
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma_m64nNk16(float (&d)[kTiles][4], MatrixDescriptor a,
                                               MatrixDescriptor b, bool accumulate) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    MLA_WGMMA_COLUMNS(MLA_WGMMA_SHARED_A, "bf16", "0")
  } else {
    static_assert(std::is_same_v<T, float16>);
    MLA_WGMMA_COLUMNS(MLA_WGMMA_SHARED_A, "f16", "0")
  }
}
/// A in shared memory, MN-major: [k, 64 rows]; B in shared memory, K-major.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma_m64nNk16_trans_a(float (&d)[kTiles][4], MatrixDescriptor a,
                                                       MatrixDescriptor b, bool accumulate) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    MLA_WGMMA_COLUMNS(MLA_WGMMA_SHARED_A, "bf16", "1")
  } else {
    static_assert(std::is_same_v<T, float16>);
    MLA_WGMMA_COLUMNS(MLA_WGMMA_SHARED_A, "f16", "1")
  }
}
/// A in registers; B in shared memory, K-major: [8 kTiles columns, k].
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma_m64nNk16(float (&d)[kTiles][4], const uint32_t (&a)[4],
                                               MatrixDescriptor b, bool accumulate) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    MLA_WGMMA_COLUMNS(MLA_WGMMA_REGISTER_A, "bf16", "")
  } else {
    static_assert(std::is_same_v<T, float16>);
    MLA_WGMMA_COLUMNS(MLA_WGMMA_REGISTER_A, "f16", "")
  }
}
#undef MLA_WGMMA_COLUMNS
#undef MLA_WGMMA_REGISTER_A
#undef MLA_WGMMA_SHARED_A
#undef MLA_WGMMA_128_REGISTERS
#undef MLA_WGMMA_D4
#undef MLA_WGMMA_D

#else

using gpu_model::ptx::barrier_arrive;
using gpu_model::ptx::barrier_cluster_arrive;
using gpu_model::ptx::barrier_cluster_arrive_relaxed;
using gpu_model::ptx::barrier_cluster_wait;
using gpu_model::ptx::cluster_ctarank;
using gpu_model::ptx::cluster_nctarank;
using gpu_model::ptx::cp_async_bulk;
using gpu_model::ptx::cp_async_bulk_cluster;
using gpu_model::ptx::cp_async_bulk_commit_group;
using gpu_model::ptx::cp_async_bulk_prefetch_tensor_4d;
using gpu_model::ptx::cp_async_bulk_store;
using gpu_model::ptx::cp_async_bulk_tensor_4d;
using gpu_model::ptx::cp_async_bulk_tensor_4d_multicast;
using gpu_model::ptx::cp_async_bulk_tensor_4d_store;
using gpu_model::ptx::cp_async_bulk_tensor_5d;
using gpu_model::ptx::cp_async_bulk_wait_group_read;
using gpu_model::ptx::createpolicy_evict_first;
using gpu_model::ptx::createpolicy_evict_last;
using gpu_model::ptx::fence_mbarrier_init;
using gpu_model::ptx::fence_proxy_async;
using gpu_model::ptx::fence_proxy_async_cluster;
using gpu_model::ptx::mapa;
using gpu_model::ptx::matrix_descriptor;
using gpu_model::ptx::matrix_descriptor_64b;
using gpu_model::ptx::Mbarrier;
using gpu_model::ptx::mbarrier_arrive;
using gpu_model::ptx::mbarrier_arrive_cluster;
using gpu_model::ptx::mbarrier_arrive_expect_tx;
using gpu_model::ptx::mbarrier_arrive_expect_tx_cluster;
using gpu_model::ptx::mbarrier_init;
using gpu_model::ptx::mbarrier_wait;
using gpu_model::ptx::mbarrier_wait_cluster;
using gpu_model::ptx::prefetch_tensormap;
using gpu_model::ptx::red_async_add;
using gpu_model::ptx::setmaxnreg_dec;
using gpu_model::ptx::setmaxnreg_inc;
using gpu_model::ptx::st_async;
using gpu_model::ptx::stmatrix_x2_trans;
using gpu_model::ptx::stmatrix_x4;
using gpu_model::ptx::wgmma_commit_group;
using gpu_model::ptx::wgmma_fence;
using gpu_model::ptx::wgmma_m64n256k16_trans_b;
using gpu_model::ptx::wgmma_m64n64k16;
using gpu_model::ptx::wgmma_m64nNk16;
using gpu_model::ptx::wgmma_m64nNk16_trans_a;
using gpu_model::ptx::wgmma_wait_group;

#endif

}  // namespace mla::MLA_MACHINE::ptx
