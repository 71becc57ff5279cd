#include "reference/problem.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <iterator>
#include <string>
#include <vector>

#include "reference/checks.h"

namespace mla {
namespace {

Status invalid(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}

/// The exponent of the longest stride of the cache, in bytes: a tensor map's are below 2^40.
constexpr int kMaxStrideBits = 39;

struct Factor {
  const char* name;
  int64_t value;
};

/// Refuses a tensor whose size in bytes does not fit in 63 bits.
Status check_size(const char* name, int element_bytes, std::initializer_list<Factor> factors) {
  int64_t bytes = element_bytes;
  bool overflow = false;
  for (const Factor& factor : factors) {
    overflow |= __builtin_mul_overflow(bytes, factor.value, &bytes);
  }
  if (!overflow) return {};
  std::string product;
  for (const Factor& factor : factors) {
    product += (product.empty() ? "" : " x ") + std::string(factor.name) + " = " +
               std::to_string(factor.value);
  }
  return invalid(std::string(name) + " [" + product + "] has more than 2^63 - 1 bytes");
}

Status check_scale(const char* name, float value) {
  if (value > 0 && std::isfinite(value)) return {};
  char text[32];
  std::snprintf(text, sizeof text, "%g", double{value});
  return invalid(std::string(name) + " = " + text + " must be finite and greater than 0");
}

Status check_cache_format(const Problem& problem) {
  const CacheFormat format = problem.cache_format;
  if (std::find(std::begin(kCacheFormats), std::end(kCacheFormats), format) ==
      std::end(kCacheFormats)) {
    std::string message =
        "cache_format = " + std::to_string(static_cast<int>(format)) + " is not one of ";
    for (const CacheFormat known : kCacheFormats) {
      if (known != kCacheFormats[0]) message += ", ";
      message +=
          std::string(to_string(known)) + " (" + std::to_string(static_cast<int>(known)) + ")";
    }
    return invalid(std::move(message));
  }
  if (has_tile_scales(format) && problem.dtype != DType::kBFloat16) {
    return invalid("dtype = " + std::string(to_string(problem.dtype)) + " must be bf16, because " +
                   "the rotary columns of cache_format = " + to_string(format) + " are bf16");
  }
  if (format == CacheFormat::kFp8Tensor) return check_scale("cache_scale", problem.cache_scale);
  return {};
}

}  // namespace

Status validate(const Problem& problem) {
  if (problem.dtype != DType::kBFloat16 && problem.dtype != DType::kFloat16) {
    return invalid("dtype = " + std::to_string(static_cast<int>(problem.dtype)) +
                   " is neither bf16 (0) nor fp16 (1)");
  }
  MLA_RETURN_IF_ERROR(check_cache_format(problem));
  if (problem.batch < 0) {
    return invalid("batch = " + std::to_string(problem.batch) + " must be at least 0");
  }
  MLA_RETURN_IF_ERROR(check_at_least_one("seqlen_q", problem.seqlen_q));
  MLA_RETURN_IF_ERROR(check_at_least_one("num_heads_q", problem.num_heads_q));
  MLA_RETURN_IF_ERROR(check_at_least_one("num_heads_kv", problem.num_heads_kv));
  MLA_RETURN_IF_ERROR(check_page_size(problem.page_size));
  MLA_RETURN_IF_ERROR(check_at_least_one("num_pages", problem.num_pages));
  MLA_RETURN_IF_ERROR(check_at_least_one("max_pages_per_seq", problem.max_pages_per_seq));
  if (problem.max_seqlen_k() > kMaxTokensPerSeq) {
    return invalid("max_pages_per_seq = " + std::to_string(problem.max_pages_per_seq) +
                   " must be at most " + std::to_string(kMaxTokensPerSeq / problem.page_size) +
                   " (2^30 tokens)");
  }
  if (problem.num_heads_q % problem.num_heads_kv != 0) {
    return invalid("num_heads_q = " + std::to_string(problem.num_heads_q) +
                   " is not a multiple of num_heads_kv = " + std::to_string(problem.num_heads_kv));
  }
  if (int64_t{problem.seqlen_q} * problem.num_heads_q > kMaxRowsPerSeq) {
    return invalid("seqlen_q = " + std::to_string(problem.seqlen_q) + " times num_heads_q = " +
                   std::to_string(problem.num_heads_q) + " must be at most 2^30");
  }
  MLA_RETURN_IF_ERROR(check_scale("softmax_scale", problem.softmax_scale));
  if (problem.fixed_split_tokens < 0 || problem.fixed_split_tokens % kGrainTokens != 0) {
    return invalid("fixed_split_tokens = " + std::to_string(problem.fixed_split_tokens) +
                   " must be 0 or a positive multiple of " + std::to_string(kGrainTokens));
  }
  // out, lse and the block table are no larger than these two, or products of two ints.
  MLA_RETURN_IF_ERROR(check_size("q", 2,
                                 {{"batch", problem.batch},
                                  {"seqlen_q", problem.seqlen_q},
                                  {"num_heads_q", problem.num_heads_q},
                                  {"head_dim", kHeadDimQK}}));
  return check_size("kv_cache", problem.cache_element_bytes(),
                    {{"num_pages", problem.num_pages},
                     {"page_size", problem.page_size},
                     {"num_heads_kv", problem.num_heads_kv},
                     {is_quantised(problem.cache_format) ? "row_bytes" : "head_dim",
                      problem.cache_row_elements()}});
}

namespace {

struct Dimension {
  const char* name;
  int64_t size;
  int64_t stride;
};

/// A tensor, and what is asked of it.
struct TensorCheck {
  const char* name;
  const void* pointer;
  int alignment;        ///< Of the pointer, in bytes.
  int64_t multiple;     ///< That strides are of, in elements.
  bool is_written;      ///< Then no two rows may overlap.
  int max_stride_bits;  ///< A stride is at most 2 to this, in elements; 0: no such limit.
  int64_t row;          ///< Elements of a row: of the last dimension, which is contiguous.
  std::vector<Dimension> dimensions;  ///< All others.
};

std::string stride_name(const TensorCheck& tensor, const Dimension& dimension) {
  return std::string(tensor.name) + " stride of " + dimension.name + " = " +
         std::to_string(dimension.stride);
}

Status check_tensor(TensorCheck tensor) {
  MLA_RETURN_IF_ERROR(check_pointer(tensor.name, tensor.pointer, tensor.alignment));
  auto& dimensions = tensor.dimensions;
  int64_t last = tensor.row - 1;  // the last element's place
  for (const Dimension& dimension : dimensions) {
    if (dimension.size == 1) continue;
    if (dimension.stride < 0 || dimension.stride % tensor.multiple != 0) {
      return invalid(stride_name(tensor, dimension) + " must be " +
                     (tensor.multiple == 1
                          ? std::string("at least 0")
                          : "a multiple of " + std::to_string(tensor.multiple) +
                                ", at least 0: rows begin at multiples of 16 bytes"));
    }
    if (tensor.max_stride_bits > 0 && dimension.stride > int64_t{1} << tensor.max_stride_bits) {
      return invalid(stride_name(tensor, dimension) + " must be at most 2^" +
                     std::to_string(tensor.max_stride_bits));
    }
    int64_t extent = 0;
    if (__builtin_mul_overflow(dimension.size - 1, dimension.stride, &extent) ||
        __builtin_add_overflow(last, extent, &last) || last > INT64_MAX / 4 - 1) {
      return invalid(stride_name(tensor, dimension) +
                     " makes the tensor larger than 2^63 - 1 bytes");
    }
  }
  if (!tensor.is_written) return {};
  // By rising stride, each dimension must step over all that the ones before it span.
  std::sort(dimensions.begin(), dimensions.end(),
            [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  int64_t span = tensor.row;
  for (const Dimension& dimension : dimensions) {
    if (dimension.size == 1) continue;
    if (dimension.stride < span) {
      return invalid(stride_name(tensor, dimension) + " must be at least " + std::to_string(span) +
                     ", else rows overlap");
    }
    span += (dimension.size - 1) * dimension.stride;
  }
  return {};
}

/// `stride`, or what a contiguous tensor has.
void fill_in(int64_t& stride, int64_t size, int64_t contiguous) {
  if (stride == kContiguous || size == 1) stride = contiguous;
}

}  // namespace

Tensors with_strides(const Problem& problem, Tensors tensors) {
  const int64_t heads = problem.num_heads_q, queries = problem.seqlen_q, batch = problem.batch;
  const auto rows = [&](RowStrides& strides, int64_t width) {
    fill_in(strides.head, heads, width);
    fill_in(strides.token, queries, heads * width);
    fill_in(strides.batch, batch, queries * heads * width);
  };
  rows(tensors.q_strides, kHeadDimQK);
  rows(tensors.out_strides, kHeadDimV);
  fill_in(tensors.lse_strides.token, queries, 1);
  fill_in(tensors.lse_strides.head, heads, queries);
  fill_in(tensors.lse_strides.batch, batch, heads * queries);
  const int64_t kv_heads = problem.num_heads_kv;
  const int64_t cache_row = problem.cache_row_elements();
  fill_in(tensors.kv_strides.head, kv_heads, cache_row);
  fill_in(tensors.kv_strides.token, problem.page_size, kv_heads * cache_row);
  fill_in(tensors.kv_strides.page, problem.num_pages, problem.page_size * kv_heads * cache_row);
  fill_in(tensors.block_table_stride, batch, problem.max_pages_per_seq);
  return tensors;
}

Status validate(const Problem& problem, const Tensors& given) {
  MLA_RETURN_IF_ERROR(validate(problem));
  if (problem.batch == 0) return {};
  const Tensors tensors = with_strides(problem, given);
  const auto rows = [&](const RowStrides& strides) -> std::vector<Dimension> {
    return {{"batch", problem.batch, strides.batch},
            {"seqlen_q", problem.seqlen_q, strides.token},
            {"num_heads_q", problem.num_heads_q, strides.head}};
  };
  MLA_RETURN_IF_ERROR(
      check_tensor({"q", tensors.q, 16, 8, false, 0, kHeadDimQK, rows(tensors.q_strides)}));
  const int element_bytes = problem.cache_element_bytes();
  MLA_RETURN_IF_ERROR(
      check_tensor({"kv_cache",
                    tensors.kv_cache,
                    16,
                    16 / element_bytes,
                    false,
                    kMaxStrideBits + 1 - element_bytes,
                    problem.cache_row_elements(),
                    {{"num_pages", problem.num_pages, tensors.kv_strides.page},
                     {"page_size", problem.page_size, tensors.kv_strides.token},
                     {"num_heads_kv", problem.num_heads_kv, tensors.kv_strides.head}}}));
  MLA_RETURN_IF_ERROR(check_tensor({"block_table",
                                    tensors.block_table,
                                    4,
                                    1,
                                    false,
                                    0,
                                    problem.max_pages_per_seq,
                                    {{"batch", problem.batch, tensors.block_table_stride}}}));
  MLA_RETURN_IF_ERROR(check_pointer("seqlens_k", tensors.seqlens_k, 4));
  MLA_RETURN_IF_ERROR(
      check_tensor({"out", tensors.out, 16, 8, true, 0, kHeadDimV, rows(tensors.out_strides)}));
  return check_tensor({"lse", tensors.lse, 4, 1, true, 0, 1, rows(tensors.lse_strides)});
}

Status validate_paging(const Problem& problem, const int32_t* block_table, const int32_t* seqlens_k,
                       int64_t block_table_stride) {
  MLA_RETURN_IF_ERROR(validate(problem));
  if (problem.batch == 0) return {};
  if (block_table == nullptr) return invalid("block_table is null");
  if (seqlens_k == nullptr) return invalid("seqlens_k is null");
  Tensors tensors;
  tensors.block_table = block_table;
  tensors.block_table_stride = block_table_stride;
  tensors = with_strides(problem, tensors);
  for (int b = 0; b < problem.batch; ++b) {
    const int64_t length = seqlens_k[b];
    if (length < 0 || length > problem.max_seqlen_k()) {
      return {StatusCode::kOutOfRange,
              "seqlens_k[" + std::to_string(b) + "] = " + std::to_string(length) +
                  " must be in [0, " + std::to_string(problem.max_seqlen_k()) +
                  "], because the block table has max_pages_per_seq = " +
                  std::to_string(problem.max_pages_per_seq) + " pages of " +
                  std::to_string(problem.page_size) + " tokens"};
    }
    const int32_t* const table_row = tensors.table_row(b);
    for (int64_t entry = 0; entry < pages_for(length, problem.page_size); ++entry) {
      const int32_t page = table_row[entry];
      if (page >= 0 && page < problem.num_pages) continue;
      return {StatusCode::kOutOfRange,
              "block_table[" + std::to_string(b) + ", " + std::to_string(entry) +
                  "] = " + std::to_string(page) + " must be in [0, " +
                  std::to_string(problem.num_pages) + "): sequence " + std::to_string(b) + " has " +
                  std::to_string(length) + " tokens, so it uses entry " + std::to_string(entry)};
    }
  }
  return {};
}

}  // namespace mla
