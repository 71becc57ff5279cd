/// @file
/// Quantising rows of the cache, and what quantised rows say (layouts: cache_format.h). One definition
/// for the host, the GPU model and GPUs, equal to the bit.
///
/// With `code max` 448 for e4m3 and 127 for int8, and all arithmetic in fp32, each result rounded to
/// nearest even:
///
///     scale  max(largest |x| of the 128 columns / code max, 2^-126); with ScaleRule::kPowerOfTwo the
///            least power of two that is not below that. So it is never 0 and never subnormal, and
///            zeros have the scale 2^-126.
///     code   x / scale, rounded to the nearest code, ties to even, saturating at +-code max.
///
/// Codes of fp8_tensor are made in the same way, by the scale of the call. Rotary columns of tile128
/// rows are rounded to bf16, ties to even; too large becomes an infinity, and a NaN 0x7fc0.
///
/// What is not a finite number stays none, or, where the scale is the caller's, saturates:
///
///     input     fp8_tile128             int8_tile128               fp8_tensor
///     NaN       code 0x7f; the scale    scale NaN, codes 0: the    code 0x7f
///               ignores it              tile's 128 columns are NaN
///     infinity  scale +inf, codes 0, and 0x7f for infinities in    code of +-448, as
///               e4m3: the tile's 128 columns are NaN               what is too large
///     -0        code 0x80               code 0                     code 0x80
///
/// A NaN in a row of the cache makes the whole row of attention NaN that sees it, in 16 bits, too, so
/// it does not matter that its neighbours share it.
///
/// For finite values these are the rules of vLLM's concat_and_cache_ds_mla and concat_and_cache_mla;
/// FlashMLA's tests make powers of two.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "reference/float16_bits.h"
#include "reference/float8.h"
#include "reference/problem.h"

namespace mla {

/// The least scale that quantising makes: the smallest normal number.
inline constexpr float kLeastScale = 0x1p-126f;

/// The largest magnitude of a code: 448 or 127.
MLA_HOST_DEVICE constexpr float largest_code(CacheFormat format) {
  return format == CacheFormat::kInt8Tile128 ? 127.0f : kLargestE4M3;
}

/// The scale of values of which the largest magnitude is `largest`, which is not NaN.
MLA_HOST_DEVICE inline float scale_for(CacheFormat format, float largest, ScaleRule rule) {
  float scale = largest / largest_code(format);
  if (scale < kLeastScale) scale = kLeastScale;
  if (rule == ScaleRule::kPowerOfTwo) {
    uint32_t bits = 0;
    memcpy(&bits, &scale, sizeof bits);
    bits = (bits + 0x7FFFFF) & 0x7F800000;  // up to the next exponent; an infinity stays
    memcpy(&scale, &bits, sizeof bits);
  }
  return scale;
}

/// The bf16 nearest to x, as a pattern.
MLA_HOST_DEVICE inline uint16_t round_to_bfloat16(float x) {
  if (!(x == x)) return nan_bits(DType::kBFloat16);
  uint32_t bits = 0;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/// The code of x / scale: an e4m3 or an int8.
MLA_HOST_DEVICE inline uint8_t quantise_value(CacheFormat format, float x, float scale) {
  const float quotient = x / scale;
  if (format != CacheFormat::kInt8Tile128) return round_to_e4m3(quotient);
  if (!(quotient == quotient)) return 0;  // NaN
  const float most = largest_code(format);
  const float code = quotient > most ? most : quotient < -most ? -most : rintf(quotient);
  return static_cast<uint8_t>(static_cast<int8_t>(code));
}

/// Parts of a row that can be quantised apart: four tiles, and the rotary columns.
inline constexpr int kRowParts = 5;

/// Quantises part `part` of a row.
/// @param values  [576] the row
/// @param row     problem.cache_row_bytes() bytes, 16-byte aligned
MLA_HOST_DEVICE inline void quantise_part(const Problem& problem, ScaleRule rule,
                                          const float* values, int part, uint8_t* row) {
  const CacheFormat format = problem.cache_format;
  const int begin = part * kTileColumns;
  const int end = begin + kTileColumns < kHeadDimQK ? begin + kTileColumns : kHeadDimQK;
  float scale = problem.cache_scale;
  if (has_tile_scales(format)) {
    if (begin >= kHeadDimV) {
      for (int column = begin; column < end; ++column) {
        const uint16_t rotary = round_to_bfloat16(values[column]);
        memcpy(row + kTileRotaryByte + 2 * (column - begin), &rotary, sizeof rotary);
      }
      return;
    }
    float largest = 0;
    bool has_nan = false;
    for (int column = begin; column < end; ++column) {
      const float magnitude = fabsf(values[column]);
      if (magnitude > largest) largest = magnitude;
      has_nan |= !(magnitude == magnitude);
    }
    scale = scale_for(format, largest, rule);
    if (has_nan && format == CacheFormat::kInt8Tile128) {
      constexpr uint32_t kNaN = 0x7FC00000;
      memcpy(&scale, &kNaN, sizeof scale);
    }
    memcpy(row + kTileScalesByte + 4 * part, &scale, sizeof scale);
  }
  for (int column = begin; column < end; ++column) {
    row[column] = quantise_value(format, values[column], scale);
  }
}

/// Quantises a row.
/// @param values  [576]
/// @param row     problem.cache_row_bytes() bytes, 16-byte aligned
MLA_HOST_DEVICE inline void quantise_row(const Problem& problem, ScaleRule rule,
                                         const float* values, uint8_t* row) {
  for (int part = 0; part < kRowParts; ++part) quantise_part(problem, rule, values, part, row);
}

/// What column `column` of a quantised row says. Exact: a product of 7 and 24 bits at most.
/// @param row  problem.cache_row_bytes() bytes, 16-byte aligned
MLA_HOST_DEVICE inline double dequantise_value(const Problem& problem, const uint8_t* row,
                                               int column) {
  float scale = problem.cache_scale;
  if (has_tile_scales(problem.cache_format)) {
    if (column >= kHeadDimV) {
      uint16_t bits = 0;
      memcpy(&bits, row + kTileRotaryByte + 2 * (column - kHeadDimV), sizeof bits);
      return to_float(DType::kBFloat16, bits);
    }
    memcpy(&scale, row + kTileScalesByte + 4 * (column / kTileColumns), sizeof scale);
  }
  const float code = problem.cache_format == CacheFormat::kInt8Tile128
                         ? static_cast<float>(static_cast<int8_t>(row[column]))
                         : e4m3_value(row[column]);
  return double{code} * double{scale};
}

/// What a quantised row says.
/// @param row     as above
/// @param values  [576]
MLA_HOST_DEVICE inline void dequantise_row(const Problem& problem, const uint8_t* row,
                                           double* values) {
  for (int column = 0; column < kHeadDimQK; ++column) {
    values[column] = dequantise_value(problem, row, column);
  }
}

/// Quantises a whole cache of 16 bits on the host: all its rows, those that hold no token too.
/// @param problem    what the result is to be: its cache_format is a quantised one
/// @param cache      [num_pages, page_size, num_heads_kv, 576], contiguous, problem.dtype
/// @param rule       of the tiles' scales
/// @param quantised  [problem.kv_elements()] bytes, contiguous
/// @param num_threads  0: all cores
/// @return kInvalidArgument for a problem that validate() refuses, for one of 16 bits, for a null or
/// misaligned pointer or a negative `num_threads`; kOutOfMemory. On an error `quantised` is untouched.
Status quantise_cache(const Problem& problem, const void* cache, ScaleRule rule,
                      std::vector<uint8_t>* quantised, int num_threads = 0);

/// What a whole quantised cache says.
/// @param problem    describes the cache
/// @param cache      problem.kv_elements() bytes, contiguous
/// @param values     [num_pages, page_size, num_heads_kv, 576]
/// @param num_threads  0: all cores
/// @return as quantise_cache()
Status dequantise_cache(const Problem& problem, const void* cache, std::vector<double>* values,
                        int num_threads = 0);

}  // namespace mla
