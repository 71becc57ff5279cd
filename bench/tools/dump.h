/// @file
/// A decode problem from .npy files that a user dumped from a model.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bench/tools/npy.h"
#include "reference/problem.h"
#include "reference/testing/data_generator.h"

namespace mla::bench {

enum class CacheLayout { kPaged, kContiguous };

/// Where the tensors lie, and what no file says. 16-bit patterns (<u2, <i2) are values of `dtype`;
/// <f2 and <f4 are rounded to it, to nearest even.
struct DumpFiles {
  std::string q;  ///< [b, s_q, h_q, 576]
  std::string
      cache;  ///< Paged: [pages, page_size, h_kv, 576]; contiguous: [b, s, h_kv, 576]; for h_kv =
              ///< 1 also without that axis.
  std::string
      block_table;  ///< [b, max_pages], whole numbers; empty: none, and then the cache is contiguous.
  std::string seqlens;                ///< [b], whole numbers
  std::optional<CacheLayout> layout;  ///< By default paged if there is a block table.
  std::optional<DType> dtype;         ///< Needed unless q and cache are both <f2.
  /// Of a quantised one the cache is paged bytes, |u1 [pages, page_size, h_kv, 656 or 576].
  CacheFormat cache_format = CacheFormat::k16Bit;
  std::optional<float> cache_scale;  ///< Of fp8_tensor, which needs it.
  float softmax_scale = 0;
  bool causal = false;
  int fixed_split_tokens = 0;  ///< As in Problem: batch-invariant if not 0.
};

/// 16-bit patterns, as read or as converted.
struct Patterns {
  npy::Array read;
  std::vector<uint16_t> converted;
  std::span<const uint16_t> values() const {
    return converted.empty() ? read.values<uint16_t>() : std::span<const uint16_t>(converted);
  }
};

/// A problem that may be decoded: validate() and validate_paging() accept it.
struct Dump {
  Problem problem;
  Patterns q;
  Patterns kv_cache;                 ///< Of a quantised cache `read` alone, which has its bytes,
  std::vector<uint8_t> kv_codes;     ///< or, if it was generated, this.
  std::vector<int32_t> block_table;  ///< [batch, max_pages_per_seq]
  std::vector<int32_t> seqlens_k;    ///< [batch]
  /// Generated tensors with strides of their own: see Layout, and these are its buffers. Tensors from
  /// files are contiguous.
  bool strided = false;
  std::vector<int32_t> table_buffer, length_buffer;
  std::vector<std::string> notes;  ///< What the user should know: values that became infinite.

  int64_t total_tokens() const;
  Layout layout() const { return layout_of(problem, strided); }
  /// Inputs only.
  Tensors tensors() const;
};

/// Reads the headers of all files, checks that types and shapes agree, reads the data, pages a
/// contiguous cache (pages in order, NaN past its rows), and checks lengths and page ids, in this
/// order.
/// @return kFileError, or what the checks found, with the file's name.
Status load(const DumpFiles& files, Dump* dump);

/// Checks type and shape of a user's own out [b, s_q, h_q, 512] or lse [b, h_q, s_q], and reads it
/// as float. 16-bit patterns are of the problem's dtype.
Status load_out(const std::string& path, const Problem& problem, std::vector<float>* out);
Status load_lse(const std::string& path, const Problem& problem, std::vector<float>* lse);

/// `patterns` of `dtype` as float.
std::vector<float> to_floats(DType dtype, std::span<const uint16_t> patterns);

/// `values` rounded to `dtype`.
std::vector<uint16_t> to_patterns(DType dtype, std::span<const float> values);

}  // namespace mla::bench
