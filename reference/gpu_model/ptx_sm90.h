/// @file
/// Hopper's instructions that kernels use through stages/common/ptx/ptx_sm90.h, on the model. What
/// they do is documented there; what the model checks, and when what is asynchronous happens, in
/// README.md.
///
/// As in ptx.h, whatever reads or writes the kernel's memory for a thread is in this header, so
/// that AddressSanitizer sees the access as that thread's.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "reference/gpu_model/ptx.h"
#include "reference/gpu_model/tensor_map.h"

namespace gpu_model {
namespace ptx {

/// The model keeps its state elsewhere (MbarrierState); this holds a mark that ordinary stores
/// would destroy.
struct alignas(8) Mbarrier {
  uint64_t state;
};

}  // namespace ptx

namespace detail {

/// What one st_async or red_async_add brings: up to 16 bytes.
using CopiedValue = std::array<uint32_t, 4>;

// mbarrier.cpp. `state` is what the thread read in the barrier's place.

/// Checks the place; returns what to write there.
uint64_t mbarrier_init(const ptx::Mbarrier* barrier, int count, const char* file, int line);
void fence_mbarrier_init(const char* file, int line);
void mbarrier_arrive(const char* what, const ptx::Mbarrier* barrier, uint64_t state, int bytes,
                     const char* file, int line);
/// `cluster`: it acquires what threads of other blocks of the cluster released, too.
void mbarrier_wait(const char* what, const ptx::Mbarrier* barrier, uint64_t state, int parity,
                   bool cluster, const char* file, int line);
/// Rejects an address that is not aligned or not in shared memory.
void check_mbarrier(const char* what, const ptx::Mbarrier* barrier, const char* file, int line);

GPU_MODEL_UNSEEN [[gnu::noinline]] inline uint64_t read_state(const ptx::Mbarrier* barrier) {
  return *static_cast<const volatile uint64_t*>(&barrier->state);
}

// bulk_copy.cpp.

constexpr uint64_t kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000;

/// Checks and remembers a load, which begins when begin_load() is called. Returns its bytes.
size_t check_tensor_load(const char* what, void* destination, const TensorMap* map,
                         const Coordinates& coordinates, const ptx::Mbarrier* barrier,
                         uint64_t state, uint64_t policy, const char* file, int line);
size_t check_linear_load(void* destination, const void* source, int bytes,
                         const ptx::Mbarrier* barrier, uint64_t state, const char* file, int line);
void begin_load();
/// Rejects a map that is not valid or, if `rank` is not 0, of another rank.
void check_tensor_map(const char* what, const TensorMap* map, int rank, const char* file, int line);
void tensor_store(const TensorMap* map, const Coordinates& coordinates, const void* source,
                  const char* file, int line);
void linear_store(void* destination, const void* source, int bytes, const char* file, int line);
void commit_stores(const char* file, int line);
void wait_stores(int pending, const char* file, int line);

// cluster.cpp, and of copies bulk_copy.cpp. Addresses may be those of any block of the cluster.

unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive(const char* what, bool release, const char* file, int line);
void cluster_wait(const char* file, int line);
void* map_address(const void* address, unsigned rank, const char* file, int line);
void fence_proxy_async_cluster(const char* file, int line);
/// Rejects an address that is not a multiple of `bytes`, or in no block that runs.
void check_in_cluster(const char* what, const void* address, size_t bytes, const char* file,
                      int line);
void arrive_in_cluster(const char* what, const ptx::Mbarrier* barrier, uint64_t state, int bytes,
                       const char* file, int line);
/// These check and remember what begin_cluster_load() begins; the two latter return its bytes.
void check_value(const char* what, bool add, void* destination, const CopiedValue& value,
                 size_t bytes, const ptx::Mbarrier* barrier, uint64_t state, const char* file,
                 int line);
size_t check_multicast(void* destination, const TensorMap* map, const Coordinates& coordinates,
                       const ptx::Mbarrier* barrier, uint64_t state, uint64_t policy,
                       const char* file, int line);
size_t check_cluster_copy(void* destination, const void* source, int bytes,
                          const ptx::Mbarrier* barrier, uint64_t state, const char* file, int line);
void begin_cluster_load();
void check_multicast_mask(unsigned mask, const char* file, int line);

/// Fills memory with NaN, so that what lay there is not taken for what a copy will write.
void poison(void* memory, size_t bytes);

// proxy.cpp.

void fence_proxy_async(const char* file, int line);
void check_matrix_row_to_write(const char* what, const void* row, const char* file, int line);
/// Remembers that this thread wrote these 16 bytes by ordinary means.
void wrote(const char* what, const void* granule, const char* file, int line);

struct StoredMatrices {
  const uint32_t* r;
  Granule row;
};
void store_matrices(void* const* lanes);
void store_transposed_matrices(void* const* lanes);

// wgmma.cpp.

struct Product {
  const char* what;
  const char* file;
  int line;
  int columns;
  bool float16;
  bool a_transposed;  ///< Whether A is MN-major,
  bool b_transposed;  ///< and B.
  bool accumulate;
  bool a_in_registers;
  uint64_t a, b;  ///< Descriptors.
};
struct ProductOperands {
  const Product* product;
  float* d;
  const uint32_t* a;
};
void issue_product(void* const* lanes);

/// Registers that a wgmma_fence or wgmma_wait_group names.
struct NamedRegisters {
  static constexpr int kMax = 8;
  const char* file;
  int line;
  int pending;  ///< For a wait: the groups that may stay incomplete.
  struct {
    void* begin;
    size_t bytes;
  } arrays[kMax];
};
void fence_registers(void* const* lanes);
void commit_products(void* const* lanes);
void wait_products(void* const* lanes);
void redistribute_registers(const char* what, int count, const char* file, int line);
uint64_t matrix_descriptor(const void* matrix, int leading_bytes, int stride_bytes, int row_bytes,
                           const char* file, int line);

/// The default of an argument that is not given. Unlike a pack, arguments with defaults can be
/// followed by the caller's file and line, which are defaults, too.
struct NoRegisters {};
inline NoRegisters no_registers;

template <typename T>
void name_registers(NamedRegisters& named, int& count, T& registers) {
  if constexpr (!std::is_same_v<T, NoRegisters>) {
    using Element = std::remove_all_extents_t<T>;
    static_assert(std::is_same_v<Element, float> || std::is_same_v<Element, uint32_t>);
    named.arrays[count].begin = &registers;
    named.arrays[count].bytes = sizeof registers;
    ++count;
  }
}

template <typename T, bool kTransposeA, bool kTransposeB, size_t kTiles>
void multiply_async(const char* what, float (&d)[kTiles][4], const uint32_t* a_registers,
                    uint64_t a, uint64_t b, bool accumulate, const char* file, int line) {
  static_assert(std::is_same_v<T, mla::bfloat16> || std::is_same_v<T, mla::float16>);
  static_assert(kTiles >= 1 && kTiles <= 32);
  static_assert(!kTransposeB || kTiles % 8 == 0, "an MN-major B comes in boxes of 64 columns");
  const Product product{what,
                        file,
                        line,
                        static_cast<int>(kTiles * 8),
                        std::is_same_v<T, mla::float16>,
                        kTransposeA,
                        kTransposeB,
                        accumulate,
                        a_registers != nullptr,
                        a,
                        b};
  ProductOperands operands{&product, &d[0][0], a_registers};
  warp_operation(what, &operands, issue_product, file, line);
}

}  // namespace detail

namespace ptx {

GPU_MODEL_UNSEEN [[gnu::noinline]] inline void mbarrier_init(Mbarrier* barrier_smem, int count,
                                                             GPU_MODEL_HERE) {
  barrier_smem->state = detail::mbarrier_init(barrier_smem, count, file, line);
}
inline void fence_mbarrier_init(GPU_MODEL_HERE) {
  detail::fence_mbarrier_init(file, line);
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void mbarrier_arrive(Mbarrier* barrier_smem,
                                                               GPU_MODEL_HERE) {
  detail::check_mbarrier("mbarrier_arrive", barrier_smem, file, line);
  detail::mbarrier_arrive("mbarrier_arrive", barrier_smem, detail::read_state(barrier_smem), 0,
                          file, line);
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void mbarrier_arrive_expect_tx(Mbarrier* barrier_smem,
                                                                         int bytes,
                                                                         GPU_MODEL_HERE) {
  detail::check_mbarrier("mbarrier_arrive_expect_tx", barrier_smem, file, line);
  detail::mbarrier_arrive("mbarrier_arrive_expect_tx", barrier_smem,
                          detail::read_state(barrier_smem), bytes, file, line);
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void mbarrier_wait(Mbarrier* barrier_smem, int parity,
                                                             GPU_MODEL_HERE) {
  detail::check_mbarrier("mbarrier_wait", barrier_smem, file, line);
  detail::mbarrier_wait("mbarrier_wait", barrier_smem, detail::read_state(barrier_smem), parity,
                        false, file, line);
}

inline void fence_proxy_async(GPU_MODEL_HERE) {
  detail::fence_proxy_async(file, line);
}

inline uint64_t createpolicy_evict_first() {
  return detail::kEvictFirst;
}
inline uint64_t createpolicy_evict_last() {
  return detail::kEvictLast;
}

inline void prefetch_tensormap(const TensorMap* map, GPU_MODEL_HERE) {
  detail::check_tensor_map("prefetch_tensormap", map, 0, file, line);
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void cp_async_bulk_tensor_4d(
    void* destination_smem, const TensorMap* map, int c0, int c1, int c2, int c3,
    Mbarrier* barrier_smem, uint64_t cache_policy, GPU_MODEL_HERE) {
  detail::check_mbarrier("cp_async_bulk_tensor_4d", barrier_smem, file, line);
  const size_t bytes = detail::check_tensor_load(
      "cp_async_bulk_tensor_4d", destination_smem, map, {4, {c0, c1, c2, c3}}, barrier_smem,
      detail::read_state(barrier_smem), cache_policy, file, line);
  detail::poison(destination_smem, bytes);
  detail::begin_load();
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void cp_async_bulk_tensor_5d(
    void* destination_smem, const TensorMap* map, int c0, int c1, int c2, int c3, int c4,
    Mbarrier* barrier_smem, uint64_t cache_policy, GPU_MODEL_HERE) {
  detail::check_mbarrier("cp_async_bulk_tensor_5d", barrier_smem, file, line);
  const size_t bytes = detail::check_tensor_load(
      "cp_async_bulk_tensor_5d", destination_smem, map, {5, {c0, c1, c2, c3, c4}}, barrier_smem,
      detail::read_state(barrier_smem), cache_policy, file, line);
  detail::poison(destination_smem, bytes);
  detail::begin_load();
}
inline void cp_async_bulk_prefetch_tensor_4d(const TensorMap* map, int, int, int, int,
                                             GPU_MODEL_HERE) {
  detail::check_tensor_map("cp_async_bulk_prefetch_tensor_4d", map, 4, file, line);
}
inline void cp_async_bulk_tensor_4d_store(const TensorMap* map, int c0, int c1, int c2, int c3,
                                          const void* source_smem, GPU_MODEL_HERE) {
  detail::tensor_store(map, {4, {c0, c1, c2, c3}}, source_smem, file, line);
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void cp_async_bulk(void* destination_smem,
                                                             const void* source_gmem, int bytes,
                                                             Mbarrier* barrier_smem,
                                                             GPU_MODEL_HERE) {
  detail::check_mbarrier("cp_async_bulk", barrier_smem, file, line);
  const size_t checked =
      detail::check_linear_load(destination_smem, source_gmem, bytes, barrier_smem,
                                detail::read_state(barrier_smem), file, line);
  detail::poison(destination_smem, checked);
  detail::begin_load();
}
inline void cp_async_bulk_store(void* destination_gmem, const void* source_smem, int bytes,
                                GPU_MODEL_HERE) {
  detail::linear_store(destination_gmem, source_smem, bytes, file, line);
}
inline void cp_async_bulk_commit_group(GPU_MODEL_HERE) {
  detail::commit_stores(file, line);
}
template <int kPending>
void cp_async_bulk_wait_group_read(GPU_MODEL_HERE) {
  static_assert(kPending >= 0);
  detail::wait_stores(kPending, file, line);
}

inline unsigned cluster_ctarank() {
  return detail::cluster_rank();
}
inline unsigned cluster_nctarank() {
  return detail::cluster_size();
}
inline void barrier_cluster_arrive(GPU_MODEL_HERE) {
  detail::cluster_arrive("barrier_cluster_arrive", true, file, line);
}
inline void barrier_cluster_arrive_relaxed(GPU_MODEL_HERE) {
  detail::cluster_arrive("barrier_cluster_arrive_relaxed", false, file, line);
}
inline void barrier_cluster_wait(GPU_MODEL_HERE) {
  detail::cluster_wait(file, line);
}
template <typename T>
T* mapa(T* address_smem, unsigned rank, GPU_MODEL_HERE) {
  return static_cast<T*>(detail::map_address(address_smem, rank, file, line));
}
inline void fence_proxy_async_cluster(GPU_MODEL_HERE) {
  detail::fence_proxy_async_cluster(file, line);
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void mbarrier_arrive_cluster(Mbarrier* barrier,
                                                                       GPU_MODEL_HERE) {
  detail::check_in_cluster("mbarrier_arrive_cluster", barrier, 8, file, line);
  detail::arrive_in_cluster("mbarrier_arrive_cluster", barrier, detail::read_state(barrier), 0,
                            file, line);
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void mbarrier_arrive_expect_tx_cluster(Mbarrier* barrier,
                                                                                 int bytes,
                                                                                 GPU_MODEL_HERE) {
  detail::check_in_cluster("mbarrier_arrive_expect_tx_cluster", barrier, 8, file, line);
  detail::arrive_in_cluster("mbarrier_arrive_expect_tx_cluster", barrier,
                            detail::read_state(barrier), bytes, file, line);
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void mbarrier_wait_cluster(Mbarrier* barrier_smem,
                                                                     int parity, GPU_MODEL_HERE) {
  detail::check_mbarrier("mbarrier_wait_cluster", barrier_smem, file, line);
  detail::mbarrier_wait("mbarrier_wait_cluster", barrier_smem, detail::read_state(barrier_smem),
                        parity, true, file, line);
}
template <typename T>
GPU_MODEL_UNSEEN [[gnu::noinline]] void st_async(T* destination, std::type_identity_t<T> value,
                                                 Mbarrier* barrier, GPU_MODEL_HERE) {
  static_assert(std::is_trivially_copyable_v<T> &&
                (sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16));
  detail::CopiedValue bits{};
  std::memcpy(bits.data(), &value, sizeof(T));
  detail::check_in_cluster("st_async", barrier, 8, file, line);
  detail::check_value("st_async", false, destination, bits, sizeof(T), barrier,
                      detail::read_state(barrier), file, line);
  bits.fill(~uint32_t{0});
  std::memcpy(&value, bits.data(), sizeof(T));
  *destination = value;
  detail::begin_cluster_load();
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void red_async_add(uint32_t* destination, uint32_t value,
                                                             Mbarrier* barrier, GPU_MODEL_HERE) {
  detail::check_in_cluster("red_async_add", barrier, 8, file, line);
  detail::check_value("red_async_add", true, destination, {value}, sizeof value, barrier,
                      detail::read_state(barrier), file, line);
  detail::begin_cluster_load();
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void cp_async_bulk_cluster(void* destination,
                                                                     const void* source_smem,
                                                                     int bytes, Mbarrier* barrier,
                                                                     GPU_MODEL_HERE) {
  detail::check_in_cluster("cp_async_bulk_cluster", barrier, 8, file, line);
  const size_t checked = detail::check_cluster_copy(destination, source_smem, bytes, barrier,
                                                    detail::read_state(barrier), file, line);
  detail::poison(destination, checked);
  detail::begin_cluster_load();
}
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void cp_async_bulk_tensor_4d_multicast(
    void* destination_smem, const TensorMap* map, int c0, int c1, int c2, int c3,
    Mbarrier* barrier_smem, uint16_t mask, uint64_t cache_policy, GPU_MODEL_HERE) {
  detail::check_multicast_mask(mask, file, line);
  for (unsigned rank = 0; rank < 16; ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    void* destination = mapa(destination_smem, rank, file, line);
    Mbarrier* barrier = mapa(barrier_smem, rank, file, line);
    detail::check_in_cluster("cp_async_bulk_tensor_4d_multicast", barrier, 8, file, line);
    const size_t bytes =
        detail::check_multicast(destination, map, {4, {c0, c1, c2, c3}}, barrier,
                                detail::read_state(barrier), cache_policy, file, line);
    detail::poison(destination, bytes);
    detail::begin_cluster_load();
  }
}

GPU_MODEL_UNSEEN [[gnu::noinline]] inline void stmatrix_x4(void* row_smem, const uint32_t (&r)[4],
                                                           GPU_MODEL_HERE) {
  detail::check_matrix_row_to_write("stmatrix_x4", row_smem, file, line);
  detail::StoredMatrices operands{r, {}};
  detail::warp_operation("stmatrix_x4", &operands, detail::store_matrices, file, line);
  *static_cast<detail::Granule*>(row_smem) = operands.row;
  detail::wrote("stmatrix_x4", row_smem, file, line);
}

/// Lanes 16 to 31 have an address, too, but no column.
GPU_MODEL_UNSEEN [[gnu::noinline]] inline void stmatrix_x2_trans(void* column_smem,
                                                                 const uint32_t (&r)[2],
                                                                 GPU_MODEL_HERE) {
  const bool stores = detail::lane() < 16;
  if (stores) detail::check_matrix_row_to_write("stmatrix_x2_trans", column_smem, file, line);
  detail::StoredMatrices operands{r, {}};
  detail::warp_operation("stmatrix_x2_trans", &operands, detail::store_transposed_matrices, file,
                         line);
  if (!stores) return;
  *static_cast<detail::Granule*>(column_smem) = operands.row;
  detail::wrote("stmatrix_x2_trans", column_smem, file, line);
}

inline void barrier_arrive(int id, int threads, GPU_MODEL_HERE) {
  detail::named_barrier_arrive(id, threads, file, line);
}

template <int kRegisters>
void setmaxnreg_inc(GPU_MODEL_HERE) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  detail::redistribute_registers("setmaxnreg_inc", kRegisters, file, line);
}
template <int kRegisters>
void setmaxnreg_dec(GPU_MODEL_HERE) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  detail::redistribute_registers("setmaxnreg_dec", kRegisters, file, line);
}

/// The address is the offset in the block's dynamic shared memory.
inline uint64_t matrix_descriptor(const void* matrix_smem, int leading_bytes, int stride_bytes,
                                  GPU_MODEL_HERE) {
  return detail::matrix_descriptor(matrix_smem, leading_bytes, stride_bytes, 128, file, line);
}
inline uint64_t matrix_descriptor_64b(const void* matrix_smem, int stride_bytes, GPU_MODEL_HERE) {
  return detail::matrix_descriptor(matrix_smem, 0, stride_bytes, 64, file, line);
}

template <typename A = detail::NoRegisters, typename B = detail::NoRegisters,
          typename C = detail::NoRegisters, typename D = detail::NoRegisters,
          typename E = detail::NoRegisters, typename F = detail::NoRegisters,
          typename G = detail::NoRegisters, typename H = detail::NoRegisters>
void wgmma_fence(A& a = detail::no_registers, B& b = detail::no_registers,
                 C& c = detail::no_registers, D& d = detail::no_registers,
                 E& e = detail::no_registers, F& f = detail::no_registers,
                 G& g = detail::no_registers, H& h = detail::no_registers, GPU_MODEL_HERE) {
  detail::NamedRegisters named{file, line, 0, {}};
  int count = 0;
  const auto name = [&](auto&... registers) {
    (detail::name_registers(named, count, registers), ...);
  };
  name(a, b, c, d, e, f, g, h);
  detail::warp_operation("wgmma_fence", &named, detail::fence_registers, file, line);
}
inline void wgmma_commit_group(GPU_MODEL_HERE) {
  detail::NamedRegisters none{file, line, 0, {}};
  detail::warp_operation("wgmma_commit_group", &none, detail::commit_products, file, line);
}
template <int kPending, typename A = detail::NoRegisters, typename B = detail::NoRegisters,
          typename C = detail::NoRegisters, typename D = detail::NoRegisters,
          typename E = detail::NoRegisters, typename F = detail::NoRegisters,
          typename G = detail::NoRegisters, typename H = detail::NoRegisters>
void wgmma_wait_group(A& a = detail::no_registers, B& b = detail::no_registers,
                      C& c = detail::no_registers, D& d = detail::no_registers,
                      E& e = detail::no_registers, F& f = detail::no_registers,
                      G& g = detail::no_registers, H& h = detail::no_registers, GPU_MODEL_HERE) {
  static_assert(kPending >= 0 && kPending <= 7);
  detail::NamedRegisters named{file, line, kPending, {}};
  int count = 0;
  const auto name = [&](auto&... registers) {
    (detail::name_registers(named, count, registers), ...);
  };
  name(a, b, c, d, e, f, g, h);
  detail::warp_operation("wgmma_wait_group", &named, detail::wait_products, file, line);
}

template <typename T>
void wgmma_m64n64k16(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate, GPU_MODEL_HERE) {
  detail::multiply_async<T, false, false>("wgmma_m64n64k16", d, nullptr, a, b, accumulate, file,
                                          line);
}
template <typename T>
void wgmma_m64n64k16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                     GPU_MODEL_HERE) {
  detail::multiply_async<T, false, false>("wgmma_m64n64k16", d, a, 0, b, accumulate, file, line);
}
template <typename T, size_t kTiles>
void wgmma_m64nNk16(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate,
                    GPU_MODEL_HERE) {
  static_assert(kTiles <= 4);
  detail::multiply_async<T, false, false>("wgmma_m64nNk16", d, nullptr, a, b, accumulate, file,
                                          line);
}
template <typename T, size_t kTiles>
void wgmma_m64nNk16(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                    GPU_MODEL_HERE) {
  static_assert(kTiles <= 4);
  detail::multiply_async<T, false, false>("wgmma_m64nNk16", d, a, 0, b, accumulate, file, line);
}
template <typename T, size_t kTiles>
void wgmma_m64nNk16_trans_a(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate,
                            GPU_MODEL_HERE) {
  static_assert(kTiles <= 4);
  detail::multiply_async<T, true, false>("wgmma_m64nNk16_trans_a", d, nullptr, a, b, accumulate,
                                         file, line);
}
template <typename T>
void wgmma_m64n256k16_trans_b(float (&d)[32][4], uint64_t a, uint64_t b, bool accumulate,
                              GPU_MODEL_HERE) {
  detail::multiply_async<T, false, true>("wgmma_m64n256k16_trans_b", d, nullptr, a, b, accumulate,
                                         file, line);
}
template <typename T>
void wgmma_m64n256k16_trans_b(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b,
                              bool accumulate, GPU_MODEL_HERE) {
  detail::multiply_async<T, false, true>("wgmma_m64n256k16_trans_b", d, a, 0, b, accumulate, file,
                                         line);
}

}  // namespace ptx
}  // namespace gpu_model
