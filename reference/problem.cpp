#include "reference/problem.h"

#include <climits>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <string>

#include "reference/checks.h"

namespace mla {
namespace {

Status invalid(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}

struct Factor {
  const char* name;
  int64_t value;
};

/// Refuses a tensor whose size in bytes does not fit in 63 bits.
Status check_size(const char* name, std::initializer_list<Factor> factors) {
  int64_t bytes = 2;
  bool overflow = false;
  std::string product;
  for (const Factor& factor : factors) {
    overflow |= __builtin_mul_overflow(bytes, factor.value, &bytes);
    product += (product.empty() ? "" : " x ") + std::string(factor.name) + " = " +
               std::to_string(factor.value);
  }
  if (!overflow) return {};
  return invalid(std::string(name) + " [" + product + "] has more than 2^63 - 1 bytes");
}

}  // namespace

Status validate(const Problem& problem) {
  if (problem.dtype != DType::kBFloat16 && problem.dtype != DType::kFloat16) {
    return invalid("dtype = " + std::to_string(static_cast<int>(problem.dtype)) +
                   " is neither bf16 (0) nor fp16 (1)");
  }
  MLA_RETURN_IF_ERROR(check_at_least_one("batch", problem.batch));
  MLA_RETURN_IF_ERROR(check_at_least_one("seqlen_q", problem.seqlen_q));
  MLA_RETURN_IF_ERROR(check_at_least_one("num_heads_q", problem.num_heads_q));
  MLA_RETURN_IF_ERROR(check_at_least_one("num_heads_kv", problem.num_heads_kv));
  MLA_RETURN_IF_ERROR(check_at_least_one("num_pages", problem.num_pages));
  MLA_RETURN_IF_ERROR(check_at_least_one("max_pages_per_seq", problem.max_pages_per_seq));
  if (problem.max_pages_per_seq > kMaxPagesPerSeq) {
    return invalid("max_pages_per_seq = " + std::to_string(problem.max_pages_per_seq) +
                   " must be at most " + std::to_string(kMaxPagesPerSeq) + " (2^30 tokens)");
  }
  if (problem.num_heads_q % problem.num_heads_kv != 0) {
    return invalid("num_heads_q = " + std::to_string(problem.num_heads_q) +
                   " is not a multiple of num_heads_kv = " + std::to_string(problem.num_heads_kv));
  }
  if (int64_t{problem.seqlen_q} * problem.num_heads_q > kMaxRowsPerSeq) {
    return invalid("seqlen_q = " + std::to_string(problem.seqlen_q) + " times num_heads_q = " +
                   std::to_string(problem.num_heads_q) + " must be at most 2^30");
  }
  if (!(problem.softmax_scale > 0) || !std::isfinite(problem.softmax_scale)) {
    char scale[32];
    std::snprintf(scale, sizeof scale, "%g", double{problem.softmax_scale});
    return invalid("softmax_scale = " + std::string(scale) + " must be finite and greater than 0");
  }
  if (problem.fixed_split_tokens < 0 || problem.fixed_split_tokens % kPageSize != 0) {
    return invalid("fixed_split_tokens = " + std::to_string(problem.fixed_split_tokens) +
                   " must be 0 or a positive multiple of " + std::to_string(kPageSize));
  }
  // out, lse and the block table are no larger than these two, or products of two ints.
  MLA_RETURN_IF_ERROR(check_size("q", {{"batch", problem.batch},
                                       {"seqlen_q", problem.seqlen_q},
                                       {"num_heads_q", problem.num_heads_q},
                                       {"head_dim", kHeadDimQK}}));
  return check_size("kv_cache", {{"num_pages", problem.num_pages},
                                 {"page_size", kPageSize},
                                 {"num_heads_kv", problem.num_heads_kv},
                                 {"head_dim", kHeadDimQK}});
}

Status validate(const Problem& problem, const Tensors& tensors) {
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(check_pointer("q", tensors.q));
  MLA_RETURN_IF_ERROR(check_pointer("kv_cache", tensors.kv_cache));
  MLA_RETURN_IF_ERROR(check_pointer("block_table", tensors.block_table));
  MLA_RETURN_IF_ERROR(check_pointer("seqlens_k", tensors.seqlens_k));
  MLA_RETURN_IF_ERROR(check_pointer("out", tensors.out));
  return check_pointer("lse", tensors.lse);
}

Status validate_paging(const Problem& problem, const int32_t* block_table,
                       const int32_t* seqlens_k) {
  MLA_RETURN_IF_ERROR(validate(problem));
  if (block_table == nullptr) return invalid("block_table is null");
  if (seqlens_k == nullptr) return invalid("seqlens_k is null");
  for (int b = 0; b < problem.batch; ++b) {
    const int64_t length = seqlens_k[b];
    if (length < 0 || length > problem.max_seqlen_k()) {
      return {StatusCode::kOutOfRange, "seqlens_k[" + std::to_string(b) +
                                           "] = " + std::to_string(length) + " must be in [0, " +
                                           std::to_string(problem.max_seqlen_k()) +
                                           "], because the block table has max_pages_per_seq = " +
                                           std::to_string(problem.max_pages_per_seq) +
                                           " pages of " + std::to_string(kPageSize) + " tokens"};
    }
    const int32_t* const table_row = block_table + int64_t{b} * problem.max_pages_per_seq;
    for (int64_t entry = 0; entry < pages_for(length); ++entry) {
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
