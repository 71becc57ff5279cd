/// @file
/// The bookkeeping of a paged cache: which pages hold which tokens of which sequence. Host memory
/// only; paged_cache.h adds the cache itself.
///
/// A page holds page_size tokens, a number that its table is made with, and a count of the sequences that list it. Forks share pages; a sequence
/// that appends to a last page it shares gets a copy of that page first (copy on write), so all
/// sequences that share a page agree on how many rows of it are in use. Taking and returning a page
/// are constant time: the free pages are a stack.
///
/// Not thread-safe, on purpose: one scheduler decides what is admitted, appended and freed, and a
/// prepared append is valid only until the next change. Callers with several threads hold one lock around
/// both halves together.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "reference/problem.h"
#include "reference/status.h"

namespace mla {

/// Names a sequence of a PageTable. No two sequences of a table ever have the same id, so the id of
/// a freed one is recognised for good. A default id names none.
struct SequenceId {
  uint32_t slot = 0;        ///< Its place in the table.
  uint32_t generation = 0;  ///< Odd in every id that was given out.
  friend bool operator==(const SequenceId&, const SequenceId&) = default;
  friend auto operator<=>(const SequenceId&, const SequenceId&) = default;
};

/// "slot.generation": "7.3"
std::string to_string(SequenceId id);

/// One sequence's tokens and where they are.
struct Sequence {
  std::vector<int32_t>
      pages;           ///< [pages_for(tokens, page_size)] Page ids: its row of the block table.
  int32_t tokens = 0;  ///< 0 ... 2^30
};

/// What the pages are used for. A shared page is one page, and its rows are counted once.
struct PageStatistics {
  int64_t pages_total = 0;    ///< All pages.
  int64_t pages_used = 0;     ///< Listed by at least one sequence.
  int64_t pages_shared = 0;   ///< Listed by at least two.
  int64_t pages_peak = 0;     ///< The largest pages_used so far (high-water mark).
  int64_t sequences = 0;      ///< Empty ones included.
  int64_t tokens = 0;         ///< Sum of all sequences' lengths: a shared token counts for each.
  int64_t tokens_stored = 0;  ///< Rows of used pages that hold a token, each once.
  int page_size = kDefaultPageSize;  ///< Rows of a page.

  /// Share of the rows of used pages that hold a token; 1 if no page is used.
  double utilization() const {
    return pages_used == 0 ? 1.0
                           : static_cast<double>(tokens_stored) /
                                 static_cast<double>(pages_used * int64_t{page_size});
  }
  /// Internal fragmentation: the share of those rows that are empty.
  double fragmentation() const { return 1.0 - utilization(); }
  friend bool operator==(const PageStatistics&, const PageStatistics&) = default;
};

/// What an append will do, in the order of its batch. Made by PageTable::prepare_append.
struct PreparedAppend {
  /// One sequence of the batch.
  struct Item {
    uint32_t slot;      ///< SequenceId::slot
    int32_t length;     ///< Tokens before the append
    int32_t tokens;     ///< To be appended
    int32_t last_page;  ///< Page id; -1 for an empty sequence
    /// The last page is shared and partly filled: the first of new_pages takes a copy of its
    /// length % page_size rows.
    bool copies_last_page;
    int32_t new_pages;  ///< How many of `pages` are this sequence's
  };
  std::vector<Item> items;           ///< [batch]
  std::vector<int32_t> pages;        ///< The new pages, one sequence's after the other's
  int64_t tokens = 0;                ///< Sum over the batch
  int page_size = kDefaultPageSize;  ///< Of the table it was made for
  uint64_t version = 0;              ///< Of that table
};

/// Sequences, their pages and the free pages.
class PageTable {
 public:
  /// A table without pages, until create().
  PageTable() = default;

  /// @param num_pages  at least 1
  /// @param page_size  tokens per page: 16, 32, 64, 128 or 256
  /// @return kInvalidArgument or kOutOfMemory; `table` is then untouched
  static Status create(int num_pages, int page_size, PageTable* table);

  /// A new, empty sequence. It has no page.
  /// @return kOutOfMemory if the host has no memory for it
  Status add(SequenceId* id);

  /// Forgets a sequence. A page that no other sequence lists becomes free; its contents stay.
  /// @return kInvalidArgument for an id that names no sequence
  Status free(SequenceId id);

  /// A new sequence with the tokens of `parent`, whose pages, the last one included, it shares.
  /// Takes no page.
  /// @return kInvalidArgument for an id that names no sequence; kOutOfMemory as add()
  Status fork(SequenceId parent, SequenceId* child);

  /// Appends tokens[i] tokens to sequences[i], for all i or for none.
  /// @param sequences  [batch], all different
  /// @param tokens     [batch], each at least 0
  /// @return kInvalidArgument if sizes differ, an id names no sequence or is there twice, or a
  /// count is negative; kOutOfRange if a sequence would have more than 2^30 tokens; kOutOfMemory,
  /// with both numbers, if too few pages are free. On an error nothing has changed.
  Status append(std::span<const SequenceId> sequences, std::span<const int32_t> tokens);

  /// The first half of append: all its checks, and which pages it will take. Changes nothing that a
  /// caller can see. Reuses the memory of `prepared`.
  /// @return append()'s errors.
  Status prepare_append(std::span<const SequenceId> sequences, std::span<const int32_t> tokens,
                        PreparedAppend* prepared);
  /// The second half: carries out what was prepared.
  /// @return kInvalidArgument if the table has changed since the append was prepared
  Status commit(const PreparedAppend& prepared);

  /// The sequence of this id, or null. Valid until the next change of the table.
  const Sequence* find(SequenceId id) const;
  /// How many sequences list `page`; 0 for a free page, and for an id that is not in
  /// [0, num_pages).
  int32_t references(int32_t page) const;
  /// Tokens per page.
  int page_size() const { return statistics_.page_size; }
  /// How many pages are free.
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  /// Takes constant time.
  PageStatistics statistics() const { return statistics_; }

 private:
  struct Slot {
    Sequence sequence;
    uint32_t generation = 0;  // odd: in use
    uint32_t next_free = 0;
    uint64_t batch = 0;  // the last append that named it, to find duplicates
  };

  uint32_t free_slot();         // makes one if there is none; may throw std::bad_alloc
  SequenceId take_free_slot();  // the one that free_slot() named
  Status prepare_one(size_t index, SequenceId id, int32_t tokens, PreparedAppend* prepared);
  void add_reference(int32_t page);
  void drop_reference(int32_t page);

  static constexpr uint32_t kNoSlot = 0xffffffff;

  std::vector<int32_t> references_;  // [num_pages]
  std::vector<int32_t> free_;  // a stack; its memory is for all pages, so that free() cannot fail
  std::vector<Slot> slots_;
  uint32_t first_free_slot_ = kNoSlot;  // a list through Slot::next_free
  uint64_t batch_ = 0;
  uint64_t version_ = 1;
  PreparedAppend prepared_;  // append()'s
  PageStatistics statistics_;
};

}  // namespace mla
