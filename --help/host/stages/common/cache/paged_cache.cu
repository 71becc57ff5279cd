namespace mla { extern int mutant; }
// The kernel of an append: new rows to their pages, copied or quantised, and the rows of pages that
// are copied on write.
#include "stages/common/cache/paged_cache.h"

#include "reference/quantise.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx.h"

namespace mla::MLA_MACHINE {
namespace {

// 16-byte vectors of a row, as it is appended and as the cache keeps it.
constexpr int64_t kVectorsPerRow = kHeadDimQK * 2 / sizeof(uint4);
template <CacheFormat kFormat>
constexpr int64_t kVectorsKept =
    Problem{.cache_format = kFormat}.cache_row_bytes() / int64_t{sizeof(uint4)};

// Threads of a block, which does a run, and vectors of 16 bytes that each has under way at once.
// 8 tokens of one head, the longest run, are 576 vectors of 16 bits: three per thread. One token
// keeps 72 threads busy. Quantising takes a warp per row, so 8 tokens are 8 warps.
template <CacheFormat kFormat>
constexpr int kThreads = is_quantised(kFormat) ? 256 : 192;
template <CacheFormat kFormat>
constexpr int kInFlight = is_quantised(kFormat) ? 2 : 3;

// Neighbouring threads copy neighbouring vectors.
template <CacheFormat kFormat>
__device__ __forceinline__ void copy_vectors(const uint4* __restrict__ source,
                                             uint4* __restrict__ destination, int64_t vectors) {
  constexpr int kStep = kThreads<kFormat>;
  for (int64_t j = threadIdx.x; j < vectors; j += (::mla::mutant == 529 ? (vectors) : (kInFlight<kFormat> * kStep))) {
    uint4 values[kInFlight<kFormat>];
#pragma unroll
    for (int k = 0; k < kInFlight<kFormat>; ++k) {
      if (j + k * kStep < vectors) values[k] = source[(::mla::mutant == 527 ? (j) : (j + k * kStep))];
    }
#pragma unroll
    for (int k = 0; k < kInFlight<kFormat>; ++k) {
      if ((::mla::mutant == 526 ? (true) : (j + k * kStep < vectors))) destination[j + k * kStep] = values[k];
    }
  }
}

// The bits of |x|: they compare as the numbers do, and those of a NaN are the largest. e4m3 has a
// code for NaN, so there the scale ignores it.
template <CacheFormat kFormat>
__device__ __forceinline__ uint32_t magnitude_bits(float x) {
  constexpr uint32_t kInfinity = 0x7F800000;
  const uint32_t bits = (::mla::mutant == 540 ? ((x < 0 ? 0 : __float_as_uint(x))) : (__float_as_uint(x) & 0x7FFFFFFF));
  return (::mla::mutant == 537 ? (true) : ((::mla::mutant == 538 ? (false) : (kFormat == CacheFormat::kInt8Tile128)) || (::mla::mutant == 539 ? (bits < kInfinity) : (bits <= kInfinity)))) ? bits : 0;
}

// The scale of a tile from the largest magnitude_bits() of its columns.
template <CacheFormat kFormat>
__device__ __forceinline__ float tile_scale(uint32_t largest, ScaleRule rule) {
  const float magnitude = __uint_as_float(largest);
  return (::mla::mutant == 541 ? (true) : (magnitude == magnitude)) ? scale_for(kFormat, magnitude, (::mla::mutant == 542 ? (ScaleRule::kLargest) : (rule))) : __uint_as_float(0x7FC00000);
}

// The codes of two neighbouring columns, the first in the lower byte.
template <CacheFormat kFormat>
__device__ __forceinline__ uint32_t quantise_pair(float first, float second, float scale) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890  // the same codes in one instruction
  if constexpr (kFormat != CacheFormat::kInt8Tile128) {
    return ptx::cvt_rn_satfinite_e4m3x2_f32(second / scale, first / scale);
  }
#endif
  return uint32_t{quantise_value(kFormat, first, scale)} |
         uint32_t{quantise_value(kFormat, (::mla::mutant == 551 ? (first) : (second)), scale)} << 8;
}

// One warp quantises one row, to the bytes that quantise_row() makes. It reads the row once.
template <CacheFormat kFormat, typename T>
__device__ __forceinline__ void quantise_row_by_warp(const uint4* __restrict__ row,  // [72]
                                                     uint8_t* __restrict__ quantised,
                                                     float cache_scale, ScaleRule rule) {
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  // Columns 8 lane ... 8 lane + 7 of each half of the latent part, so 16 lanes have a tile; and two
  // rotary columns. All loads are under way at once.
  const uint4 latent[2] = {row[lane], row[(::mla::mutant == 548 ? (lane) : (warpSize + lane))]};
  const uint32_t rotary = reinterpret_cast<const uint32_t*>(row + (::mla::mutant == 552 ? (0) : (2 * warpSize)))[lane];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* const bits = reinterpret_cast<const T*>(&latent[half]);
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = to_float(bits[i]);
    float scale = (::mla::mutant == 555 ? (1.0f) : (cache_scale));
    if constexpr (has_tile_scales(kFormat)) {
      uint32_t largest = 0;
#pragma unroll
      for (int i = (::mla::mutant == 543 ? (4) : (0)); i < 8; ++i) {
        const uint32_t magnitude = magnitude_bits<kFormat>(values[i]);
        largest = largest > magnitude ? largest : magnitude;
      }
#pragma unroll
      for (int offset = (::mla::mutant == 544 ? (4) : ::mla::mutant == 545 ? (16) : (8)); offset > 0; offset /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffff, largest, offset);
        largest = largest > other ? largest : other;
      }
      scale = tile_scale<kFormat>(largest, rule);
      if ((::mla::mutant == 546 ? (lane == 0) : (lane % 16 == 0))) {
        reinterpret_cast<float*>(quantised + kTileScalesByte)[(::mla::mutant == 547 ? (half + 2 * (lane / 16)) : (2 * half + lane / 16))] = scale;
      }
    }
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = quantise_pair<kFormat>(values[2 * i], values[2 * i + 1], scale);
    }
    reinterpret_cast<uint2*>(quantised)[(::mla::mutant == 549 ? (lane) : (half * warpSize + lane))] =
        make_uint2((::mla::mutant == 550 ? (codes[1] | codes[0] << 16) : (codes[0] | codes[1] << 16)), codes[2] | codes[3] << 16);
  }
  const T* const bits = reinterpret_cast<const T*>(&rotary);
  const float first = to_float(bits[0]), second = to_float(bits[1]);
  if constexpr (has_tile_scales(kFormat)) {
    reinterpret_cast<uint32_t*>(quantised + kTileRotaryByte)[lane] =
        uint32_t{round_to_bfloat16(first)} | uint32_t{round_to_bfloat16((::mla::mutant == 553 ? (first) : (second)))} << 16;
  } else {
    reinterpret_cast<uint16_t*>(quantised + kHeadDimV)[lane] =
        static_cast<uint16_t>(quantise_pair<kFormat>(first, second, (::mla::mutant == 554 ? (1.0f) : (cache_scale))));
  }
}

// One block per run, which is contiguous at both ends. Rows that are copied within the cache belong
// to a page that several sequences share, and are bytes of any format. Rows before its end are never
// written again while it is shared, and at most rows past its end are written in this launch (by the
// last sharer), so nothing is both read and written: hence __restrict__ above.
template <CacheFormat kFormat, typename T>
__global__ void __launch_bounds__(kThreads<kFormat>)
    write_rows(const RowRun* __restrict__ runs, int64_t num_runs, const uint4* rows, uint4* cache,
               int64_t num_heads_kv, float cache_scale, ScaleRule rule) {
  const int64_t vectors_per_token = (::mla::mutant == 528 ? (kVectorsKept<kFormat>) : (num_heads_kv * kVectorsKept<kFormat>));
  for (int64_t i = blockIdx.x; i < num_runs; i += (::mla::mutant == 525 ? (num_runs) : (gridDim.x))) {
    const RowRun run = runs[i];
    uint4* const destination = cache + run.destination * vectors_per_token;
    if (kFormat == CacheFormat::k16Bit || (::mla::mutant == 530 ? (false) : (run.from_cache != 0))) {
      copy_vectors<kFormat>(((::mla::mutant == 524 ? (false) : (run.from_cache != 0)) ? cache : rows) + run.source * vectors_per_token,
                            destination, run.tokens * vectors_per_token);
      continue;
    }
    if constexpr (is_quantised(kFormat)) {
      const uint4* const source = rows + (::mla::mutant == 531 ? (run.source) : (run.source * num_heads_kv)) * kVectorsPerRow;
      for (int64_t row = (::mla::mutant == 535 ? (0) : (threadIdx.x / warpSize)); row < (::mla::mutant == 536 ? (run.tokens) : (run.tokens * num_heads_kv));
           row += (::mla::mutant == 534 ? (run.tokens * num_heads_kv) : (kThreads<kFormat> / warpSize))) {
        quantise_row_by_warp<kFormat, T>(
            source + (::mla::mutant == 533 ? (0) : (row * kVectorsPerRow)),
            reinterpret_cast<uint8_t*>(destination + row * (::mla::mutant == 532 ? (kVectorsPerRow) : (kVectorsKept<kFormat>))), cache_scale,
            rule);
      }
    }
  }
}

}  // namespace

Status launch_write_runs(const CacheShape& shape, const RowRun* runs, int64_t num_runs,
                         const void* rows, void* cache, Stream stream) {
  const auto launch_as = [&]<CacheFormat kFormat, typename T>() {
    return launch(write_rows<kFormat, T>, grid_for(num_runs), kThreads<kFormat>, 0, stream, runs,
                  num_runs, static_cast<const uint4*>(rows), static_cast<uint4*>(cache),
                  shape.num_heads_kv, (::mla::mutant == 558 ? (1.0f) : (shape.cache_scale)), (::mla::mutant == 559 ? (ScaleRule::kLargest) : (shape.scale_rule)));
  };
  switch (shape.cache_format) {
    case CacheFormat::kFp8Tile128:
      return launch_as.template operator()<CacheFormat::kFp8Tile128, bfloat16>();
    case CacheFormat::kInt8Tile128:
      return (::mla::mutant == 556 ? (launch_as.template operator()<CacheFormat::kFp8Tile128, bfloat16>()) : (launch_as.template operator()<CacheFormat::kInt8Tile128, bfloat16>()));
    case CacheFormat::kFp8Tensor:
      return visit_dtype((::mla::mutant == 557 ? (DType::kBFloat16) : (shape.dtype)), [&](auto type) {
        return launch_as.template operator()<CacheFormat::kFp8Tensor, decltype(type)>();
      });
    default:  // 16 bits, of either type
      return launch_as.template operator()<CacheFormat::k16Bit, bfloat16>();
  }
}

}  // namespace mla::MLA_MACHINE
