/// @file
/// What keeping the cache in few bits does to results: by the float64 reference's arithmetic, on the host.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "reference/quantise.h"
#include "reference/status.h"

namespace mla::bench {

/// Data: one sequence, one query token, one KV head; q and the cache are N(0,1)/10, q rounded to bf16.
struct ErrorCase {
  int tokens = 4096;
  int heads = 16;  ///< Query heads.
  /// This many of the 512 latent columns, evenly apart, are kOutlierFactor times as large in every token.
  int outliers = 0;
  double rotary = 1;  ///< The 64 rotary columns are this many times as large in every token.
  uint64_t seed = 0;
};
/// How much larger outlier columns are.
inline constexpr float kOutlierFactor = 20;

/// How far results are from others.
struct Distance {
  double out = 0;           ///< Relative L2, over all heads.
  double out_ordinary = 0;  ///< The same over the columns that are no outliers.
  double out_max = 0;       ///< Largest difference of an element, over the root mean square of all.
  double lse = 0;           ///< Largest difference.
};

/// What a cache format does to the results of a case.
struct CacheError {
  std::string format;       ///< Its name.
  int row_bytes = 0;        ///< Of a token.
  float cache_scale = 0;    ///< Of fp8_tensor; else 0.
  Distance from_exact{};    ///< From those of the values before they were rounded to bf16.
  Distance from_16_bits{};  ///< From those of the cache in bf16; of that itself 0.
};

/// What all of them do.
struct CacheErrors {
  double deviation = 0;      ///< Of the logits: how peaked the softmax is.
  double softmax_scale = 0;  ///< That gives logits their deviation.
  /// Of bf16, of every quantised format, and of kRotaryInE4M3.
  std::vector<CacheError> all;
};

/// A format that is in this study alone: fp8_tile128 with rotary columns of e4m3, too, and a fifth scale, theirs.
inline constexpr const char* kRotaryInE4M3 = "fp8_tile128_rotary_e4m3";

/// Decodes a case in double from the values as they are, from a cache in bf16, and from that cache quantised
/// in every format; fp8_tensor has the scale of the largest value. Rows are made when they are read, so memory
/// does not grow with tokens.
/// @param deviations  of the logits, by the softmax's scale
/// @param errors  one for each deviation
/// @param num_threads  0: all cores
/// @return kInvalidArgument for a case that is none; kOutOfMemory
Status cache_errors(const ErrorCase& spec, std::span<const double> deviations, ScaleRule rule,
                    std::vector<CacheErrors>* errors, int num_threads = 0);

}  // namespace mla::bench
