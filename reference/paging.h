/// @file
/// The paged KV cache: which page holds a token, and at which of its rows.
///
/// `kv_cache` is [num_pages, page_size, num_heads_kv, 576]; `block_table` is [batch,
/// max_pages_per_seq] and names the page that holds tokens page_size * p ... page_size * (p + 1) - 1
/// of a sequence. Entries of the table past a sequence's last page, and rows of a page past its last
/// token, may hold anything.
#pragma once

#include <bit>
#include <cstdint>

#include "reference/dtype.h"

namespace mla {

/// Tokens per page, if a caller says nothing else.
inline constexpr int kDefaultPageSize = 64;
/// Least and most tokens per page; a page size is a power of two.
inline constexpr int kMinPageSize = 16, kMaxPageSize = 256;

/// Whether a page may hold so many tokens: 16, 32, 64, 128 or 256.
constexpr bool is_page_size(int page_size) {
  return page_size >= kMinPageSize && page_size <= kMaxPageSize &&
         std::has_single_bit(static_cast<unsigned>(page_size));
}

/// Which group of `size`, a power of two, holds token `token` >= 0: a shift on a GPU, where division is
/// slow.
MLA_HOST_DEVICE inline int page_of(int token, int size) {
#ifdef __CUDA_ARCH__
  return token >> (__ffs(size) - 1);
#else
  return token / size;
#endif
}

/// How many groups of `size` hold `tokens` >= 0 tokens: pages, for a page size.
MLA_HOST_DEVICE constexpr int64_t pages_for(int64_t tokens, int size) {
  return (tokens + size - 1) / size;
}

}  // namespace mla
