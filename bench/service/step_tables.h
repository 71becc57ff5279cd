/// @file
/// What a step's kernels read, made on the host: the rows to append, the block table, the lengths. Of one device, or
/// of each of several ranks that hold the pages of one page table together.
///
/// A page lives on one rank, which its number alone decides: page p of N ranks is rank p % N's own page p / N. So a
/// scheduler gives pages out as if there were one cache of all of them, and every rank has room for as many.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "bench/service/scheduler.h"
#include "stages/common/cache/paged_cache.h"

namespace mla::bench {

/// Rows that tokens are drawn from (real_engine.h).
inline constexpr int64_t kPoolRows = 4096;
/// The row of layer 0 that token `token` of a request has. Add the layer.
constexpr int64_t row_of(int64_t request, int64_t token) {
  return (request * 577 + token) % kPoolRows;
}
/// The same of a sequence, which may begin with a prefix: its rows are those of a request that none has
/// the number of.
constexpr int64_t row_of(const SequenceWork& sequence, int64_t token) {
  constexpr int64_t kFirst = int64_t{1} << 40;
  const bool shared = sequence.prefix >= 0 && token < sequence.prefix_tokens;
  return row_of(shared ? kFirst + sequence.prefix : sequence.request, token);
}

/// One rank's. Batch, columns, padding and most_runs are the same on all ranks of a step, so that all of them grow
/// their buffers, and replay a graph, in the same steps.
struct StepTables {
  int batch = 0;
  int columns = 0;           ///< Of the block table: for the rank with the most pages of a sequence
  bool padded = false;       ///< To a size that a graph is made for
  std::vector<RowRun> runs;  ///< Rows of the rank's own pages
  int64_t most_runs = 0;     ///< That a rank of this step can have
  std::vector<int32_t>
      data;  ///< [batch, columns]: the rank's own pages; then [batch]: tokens in them

  size_t entries() const { return static_cast<size_t>(batch) * static_cast<size_t>(columns); }
};

/// Whether every sequence gets one row at most: what all steps of a batch have alike.
bool brings_no_prompt(const StepWork& work);

/// Makes the tables of a step.
/// @param pad    to the next power of two of sequences and of columns, with sequences of no length and runs of no
///               rows. Of a step that brings no prompt in alone
/// @param ranks  [ranks], one at least; their memory is used again
void make_tables(const StepWork& work, bool pad, std::span<StepTables> ranks);

}  // namespace mla::bench
