/// @file
/// The paged KV cache: a token's place in memory.
///
/// `kv_cache` is [num_pages, 64, num_heads_kv, 576]; `block_table` is [batch, max_pages_per_seq]
/// and names the page that holds tokens 64 p ... 64 p + 63 of a sequence. Entries of the table past
/// a sequence's last page, and rows of a page past its last token, may hold anything.
#pragma once

#include <cstdint>

#include "reference/float16.h"

namespace mla {

/// Tokens per page.
inline constexpr int kPageSize = 64;

/// How many pages hold `tokens` >= 0 tokens.
MLA_HOST_DEVICE constexpr int64_t pages_for(int64_t tokens) {
  return (tokens + kPageSize - 1) / kPageSize;
}

/// The row of the cache, counted in [576]-vectors, that holds token `token` for KV head `head_kv`,
/// in the sequence whose row of the block table is `block_table_row`. Multiply by 576 for the
/// element offset.
MLA_HOST_DEVICE inline int64_t cache_row(const int32_t* block_table_row, int32_t token,
                                         int num_heads_kv, int head_kv) {
  const int64_t page = block_table_row[token / kPageSize];
  return (page * kPageSize + token % kPageSize) * num_heads_kv + head_kv;
}

}  // namespace mla
