/// @file
/// How a row of the cache, 576 values of one token and KV head, is kept: in 16 bits, or quantised to
/// 8. A page, a block table and a plan know nothing of it.
///
/// What a quantised row says, exactly: a column's value is the value of its 8-bit code times an fp32
/// scale. Bytes of a row, all numbers little-endian:
///
///     fp8_tile128, int8_tile128: 656 bytes         fp8_tensor: 576 bytes
///       0 ... 511  512 codes, columns 0 ... 511      0 ... 575  576 codes
///     512 ... 527  4 fp32 scales: scale i is of      and one scale for the call,
///                  columns 128 i ... 128 i + 127     Problem::cache_scale
///     528 ... 655  64 bf16: the rotary columns
///
/// A code of fp8_* is an e4m3 (float8.h), a code of int8_* a signed byte, -128 included. Both, and
/// any scale, are taken as they are: a scale may be 0 (the values are zeros, and NaN where the code
/// is NaN), negative, subnormal, infinite or NaN; 0 times an infinity is NaN. An element of a
/// quantised cache is one byte: its strides and places count bytes.
///
/// The rotary columns of a tile128 row are bf16 whatever made it, so such a cache goes with bf16 q and
/// out alone; fp8_tensor goes with both 16-bit types.
///
/// What quantising does is defined in quantise.h.
///
/// Sources. fp8_tile128 is what FlashMLA's sparse decode reads, "FP8 with scale" in the README of
/// https://github.com/deepseek-ai/FlashMLA, and what vLLM calls fp8_ds_mla
/// (https://github.com/vllm-project/vllm, vllm/v1/attention/backends/mla/flashmla_sparse.py).
/// fp8_tensor is vLLM's other 8-bit cache of MLA, of e4m3 (what its concat_and_cache_mla makes).
/// int8_tile128 is the same layout for devices without e4m3.
#pragma once

#include "reference/dtype.h"

namespace mla {

/// How the cache keeps its rows.
enum class CacheFormat {
  k16Bit,        ///< 576 values of the problem's dtype, 1152 bytes.
  kFp8Tile128,   ///< e4m3 with a scale for each 128 columns, and bf16 rotary columns: 656 bytes.
  kFp8Tensor,    ///< e4m3 with one scale for the call: 576 bytes.
  kInt8Tile128,  ///< As kFp8Tile128, with int8 codes.
};

/// All of them, in order.
inline constexpr CacheFormat kCacheFormats[] = {CacheFormat::k16Bit, CacheFormat::kFp8Tile128,
                                                CacheFormat::kFp8Tensor, CacheFormat::kInt8Tile128};

/// "16bit", "fp8_tile128", "fp8_tensor" or "int8_tile128"
inline const char* to_string(CacheFormat format) {
  switch (format) {
    case CacheFormat::k16Bit:
      return "16bit";
    case CacheFormat::kFp8Tile128:
      return "fp8_tile128";
    case CacheFormat::kFp8Tensor:
      return "fp8_tensor";
    case CacheFormat::kInt8Tile128:
      return "int8_tile128";
  }
  return "unknown";
}

/// How the scale of a tile comes from its largest value.
enum class ScaleRule {
  kLargest,  ///< The largest value has the largest code.
  /// A power of two, so that every value of a row is exact in bf16. e4m3 loses nothing by it but at
  /// the lower end of its range, int8 up to one bit.
  kPowerOfTwo,
};

/// Columns that share a scale in a tile128 row.
inline constexpr int kTileColumns = 128;
/// Where the four scales of a tile128 row begin, in bytes: after 512 codes.
inline constexpr int kTileScalesByte = 512;
/// Where its 64 rotary columns begin, in bytes.
inline constexpr int kTileRotaryByte = kTileScalesByte + 4 * 4;
/// Bytes of a tile128 row.
inline constexpr int kTileRowBytes = kTileRotaryByte + 64 * 2;
static_assert(kTileRowBytes == 656 && kTileRowBytes % 16 == 0,
              "rows begin at multiples of 16 bytes");

/// Whether codes of 8 bits stand for the values.
MLA_HOST_DEVICE constexpr bool is_quantised(CacheFormat format) {
  return format != CacheFormat::k16Bit;
}
/// Whether a row has a scale for each 128 columns, and bf16 rotary columns.
MLA_HOST_DEVICE constexpr bool has_tile_scales(CacheFormat format) {
  return format == CacheFormat::kFp8Tile128 || format == CacheFormat::kInt8Tile128;
}

}  // namespace mla
