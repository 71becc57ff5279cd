/// @file
/// Which pages of every sequence are one rank's, where several share a cache (docs/parallel.md).
#pragma once

#include <cstdint>

#include "reference/paging.h"

namespace mla {

/// One rank's share of a sequence's pages. They are dealt in turns: the first pages_per_turn pages belong
/// to rank 0, the next to rank 1, and after the last rank it is rank 0's turn again. With 1 that is
/// round-robin by page; with as many as no sequence has `ranks` times, every rank holds one run of pages.
/// Who holds a page never depends on the sequence's length: a token that is appended moves none.
///
/// That is of a sequence whose first rank is 0. Of another, begun_by() gives the share.
///
/// A rank keeps its pages of a sequence in the order of their tokens: its own block table names them in
/// columns 0, 1, ...
struct ContextShare {
  int rank = 0;            ///< 0 ... ranks - 1
  int ranks = 1;           ///< >= 1
  int pages_per_turn = 1;  ///< >= 1

  /// This rank's share of a sequence that begins with rank `first`: the ranks are counted from there. Any
  /// number, of which the remainder by `ranks` counts: a sequence's own number spreads sequences evenly. In
  /// the share, ranks have their places in the turn for numbers.
  MLA_HOST_DEVICE ContextShare begun_by(int first) const {
    const auto place = static_cast<int>((int64_t{rank} - first) % ranks);
    return {place < 0 ? place + ranks : place, ranks, pages_per_turn};
  }

  /// Which rank holds page `page` of a sequence.
  MLA_HOST_DEVICE int owner(int64_t page) const {
    return static_cast<int>(page / pages_per_turn % ranks);
  }
  /// How many of the first `count` >= 0 pages of a sequence this rank holds: the column that the next of
  /// its pages has.
  MLA_HOST_DEVICE int64_t pages(int64_t count) const {
    const int64_t round = int64_t{pages_per_turn} * ranks;
    const int64_t in_round = count % round - int64_t{rank} * pages_per_turn;
    const int64_t last = in_round < 0 ? 0 : in_round < pages_per_turn ? in_round : pages_per_turn;
    return count / round * pages_per_turn + last;
  }
  /// Which page of its sequence is in column `column` of this rank's block table.
  MLA_HOST_DEVICE int64_t page_in(int64_t column) const {
    return (column / pages_per_turn * ranks + rank) * pages_per_turn + column % pages_per_turn;
  }
  /// How many of the first `count` >= 0 tokens of a sequence this rank holds.
  MLA_HOST_DEVICE int64_t tokens(int64_t count, int page_size) const {
    const int64_t full = count / page_size;
    return pages(full) * page_size + (owner(full) == rank ? count % page_size : 0);
  }
};

/// One rank's share of each sequence of a batch.
struct SequenceShares {
  ContextShare share;
  /// [batch], in device memory: each sequence's first rank. Null: 0 for all.
  const int32_t* first_ranks = nullptr;

  MLA_HOST_DEVICE ContextShare of(int64_t sequence) const {
    return first_ranks == nullptr ? share : share.begun_by(first_ranks[sequence]);
  }
};

/// The least pages_per_turn with which every rank's pages of a sequence are one run, if none has more
/// than `max_pages` pages. A sequence of half of them is then all on half of the ranks.
inline int contiguous_pages(int max_pages, int ranks) {
  return static_cast<int>(pages_for(max_pages, ranks));
}

/// Columns that a rank's block table has: the same for all ranks, and enough for each.
/// @param max_pages  of a whole sequence
inline int share_columns(int max_pages, int ranks, int pages_per_turn) {
  return static_cast<int>(ContextShare{0, ranks, pages_per_turn}.pages(max_pages));  // it begins
}

}  // namespace mla
