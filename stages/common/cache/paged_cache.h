/// @file
/// A paged KV cache on a GPU or the model: memory, sequences, appends, forks, and the tables that a
/// decode reads. docs/paged_cache.md explains it.
///
/// Bookkeeping happens on the host at once (page_table.h); copies and kernels are enqueued on a
/// stream. That is safe as long as all work on one cache, the decodes that read it included, is on
/// one stream, or on streams that the caller orders: a page freed while a kernel enqueued before
/// still reads it is written again only by an append enqueued after.
///
/// Not thread-safe, for that reason: the order of calls is the order of the stream, and only one
/// scheduler can know it. Different caches are independent.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "stages/common/cache/page_table.h"
#include "stages/common/machine/upload_ring.h"

namespace mla {

/// What a cache is made for.
struct CacheShape {
  int num_pages = 0;                 ///< >= 1
  int page_size = kDefaultPageSize;  ///< Tokens per page: 16, 32, 64, 128 or 256.
  int num_heads_kv = 1;              ///< >= 1
  DType dtype = DType::kBFloat16;    ///< Of the rows that are appended, and of a cache of 16 bits.
  /// How the cache keeps them; as Problem::cache_format. bf16 alone goes with the tile128 formats.
  CacheFormat cache_format = CacheFormat::k16Bit;
  /// As Problem::cache_scale: of fp8_tensor, what every code is multiplied by; finite and > 0. Of
  /// other formats: not read.
  float cache_scale = 1;
  ScaleRule scale_rule = ScaleRule::kLargest;  ///< Of the scales that appends to tile128 rows make.
  /// Bytes of one token, all KV heads: num_heads_kv times 1152, 656 or 576.
  int64_t token_bytes() const {
    return int64_t{num_heads_kv} * Problem{.cache_format = cache_format}.cache_row_bytes();
  }
  /// Bytes of one page.
  int64_t page_bytes() const { return page_size * token_bytes(); }
};

/// Pages, and the bytes they come to.
struct CacheStatistics {
  PageStatistics pages;
  int64_t bytes_total = 0;      ///< Of all pages: what the cache takes of the device.
  int64_t bytes_used = 0;       ///< Of used pages.
  int64_t bytes_peak = 0;       ///< The largest bytes_used so far.
  int64_t bytes_per_token = 0;  ///< In the cache's format, all KV heads.
};

/// Consecutive rows that an append writes to one page. Places are counted in tokens.
struct RowRun {
  int64_t source;       ///< The first row's place in `rows`, or in the cache.
  int64_t destination;  ///< Its place in the cache: page_size * page + row.
  int32_t tokens;       ///< 0 ... kMaxRunTokens; 0 writes nothing
  int32_t from_cache;   ///< 1: the source is a page of the cache, copied on write. 0: `rows`.
};
/// Tokens of the longest run, which is what one thread block copies.
inline constexpr int32_t kMaxRunTokens = 8;

/// The rows that a prepared append writes, sequence by sequence: first the rows that are copied, then the new
/// ones. No run reads what another one writes. May throw std::bad_alloc.
void make_runs(const PreparedAppend& prepared, std::vector<RowRun>* runs);

/// Enqueues the one kernel of an append on `stream`: copies rows, or quantises them as quantise.h
/// defines it, to the bit.
/// @param shape  the cache's; num_pages and page_size are not read
/// @param runs   [num_runs], on the machine
/// @param rows   [total_tokens, num_heads_kv, 576], dtype, on the machine, 16-byte aligned
/// @param cache  [num_pages, page_size, num_heads_kv, 576] in the shape's format, on the machine,
///               16-byte aligned
/// @return kInvalidArgument for types, a format or scales outside the contract; the machine's errors.
Status write_runs(const Machine& machine, const CacheShape& shape, const RowRun* runs,
                  int64_t num_runs, const void* rows, void* cache, Stream stream);

/// The cache. Pages are not cleared, neither at first nor when they become free: rows past a
/// sequence's end may hold anything (reference/paging.h).
class PagedCache {
 public:
  /// Allocates memory for all pages.
  /// @return kInvalidArgument for a shape outside the contract, kOutOfMemory; `cache` is then
  /// untouched.
  static Status create(Machine& machine, const CacheShape& shape,
                       std::unique_ptr<PagedCache>* cache);

  /// @name Sequences
  /// As in PageTable.
  /// @{
  Status add(SequenceId* id) { return table_.add(id); }
  Status free(SequenceId id) { return table_.free(id); }
  Status fork(SequenceId parent, SequenceId* child) { return table_.fork(parent, child); }
  /// @}

  /// Appends tokens[i] rows to sequences[i], for all i or for none. Enqueues one copy of a small
  /// table and one kernel on `stream`, however large the batch. The same kernel quantises the rows,
  /// if the cache is quantised, and copies pages that are copied on write.
  /// @param sequences  [batch], all different
  /// @param tokens     [batch], each at least 0
  /// @param rows       [sum of tokens, num_heads_kv, 576], dtype, on the machine, 16-byte aligned:
  ///                   the rows of sequences[0], then of sequences[1], ... Read in the order of the
  ///                   stream. May be null if the sum is 0.
  /// @return the errors of PageTable::append; kInvalidArgument for `rows` that are null or
  /// misaligned, and for a stream that is being captured; the machine's errors. On an error no
  /// sequence has changed.
  Status append(std::span<const SequenceId> sequences, std::span<const int32_t> tokens,
                const void* rows, Stream stream = nullptr);

  /// Writes what a decode of these sequences reads, with two copies on `stream`.
  /// @param sequences          [batch], at least one; the same one may be there twice
  /// @param max_pages_per_seq  columns of the table, at least the pages of the longest sequence
  /// @param block_table        [batch, max_pages_per_seq] on the machine; -1 in unused entries
  /// @param seqlens_k          [batch] on the machine
  /// @return kInvalidArgument; kOutOfRange if the table is too narrow for a sequence. Then nothing
  /// is written. Or the machine's errors.
  Status write_tables(std::span<const SequenceId> sequences, int max_pages_per_seq,
                      int32_t* block_table, int32_t* seqlens_k, Stream stream = nullptr);

  /// [num_pages, page_size, num_heads_kv, 576], or of a quantised cache [..., 656] or [..., 576]
  /// bytes: Tensors::kv_cache
  void* data() const { return memory_.data(); }
  /// What it was made for.
  const CacheShape& shape() const { return shape_; }
  /// Lengths, page lists and counts.
  const PageTable& table() const { return table_; }
  /// The table's statistics, and in bytes. Takes constant time.
  CacheStatistics statistics() const;

 private:
  PagedCache(Machine& machine, const CacheShape& shape)
      : machine_(machine), shape_(shape), uploads_(machine) {}
  Status write_rows(const void* rows, Stream stream);

  Machine& machine_;
  CacheShape shape_;
  DeviceBuffer memory_;
  PageTable table_;
  PreparedAppend prepared_;
  std::vector<RowRun> runs_;
  DeviceBuffer device_runs_;
  std::vector<int32_t> host_tables_;  // [batch, max_pages_per_seq], then [batch]
  UploadRing uploads_;                // first to go: it waits for its copies
};

}  // namespace mla
