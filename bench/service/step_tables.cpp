#include "bench/service/step_tables.h"

#include <algorithm>
#include <bit>

namespace mla::bench {
namespace {

constexpr int64_t kWidth = 16;  // a block table is this many columns wide, or a multiple

int64_t next_power_of_two(int64_t value) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(value)));
}

/// Calls place(rank, its page) for the pages that a sequence's decode reads, in their order.
template <typename Place>
void for_each_page(const SequenceWork& sequence, uint32_t ranks, Place place) {
  const auto used = static_cast<size_t>(pages_for(sequence.decoded, kDefaultPageSize));
  for (const int32_t page : sequence.pages.first(used)) {
    const auto number = static_cast<uint32_t>(page);
    place(number % ranks, static_cast<int32_t>(number / ranks));
  }
}

void make_runs(const SequenceWork& sequence, std::span<StepTables> ranks) {
  const auto count = static_cast<uint32_t>(ranks.size());
  const int64_t end = int64_t{sequence.tokens_before} + sequence.appended;
  for (int64_t token = sequence.tokens_before; token < end;) {
    const int64_t source = row_of(sequence, token);
    const bool in_prefix = sequence.prefix >= 0 && token < sequence.prefix_tokens;
    const int64_t last = in_prefix ? std::min(end, sequence.prefix_tokens) : end;
    const int64_t rows =
        std::min({last - token, int64_t{kMaxRunTokens}, kDefaultPageSize - token % kDefaultPageSize,
                  kPoolRows - source});
    const auto page =
        static_cast<uint32_t>(sequence.pages[static_cast<size_t>(token / kDefaultPageSize)]);
    const uint32_t owner = page % count;
    const int64_t place = int64_t{page / count} * kDefaultPageSize + token % kDefaultPageSize;
    ranks[owner].runs.push_back({source, place, static_cast<int32_t>(rows), 0});
    token += rows;
  }
}

// One rank holds all pages, in the order of the sequence, and is worth a way of its own here and in place_pages(): 256
// sequences of 4096 tokens take 7 us on a core of a Xeon, and 100 us if each page is asked whose it is.

/// The most pages of a sequence that a rank holds, one at least.
int64_t most_columns(const StepWork& work, size_t ranks) {
  int64_t most = 1;
  std::vector<int64_t> held(ranks);
  for (const SequenceWork& sequence : work.sequences) {
    if (ranks == 1) {
      most = std::max(most, pages_for(sequence.decoded, kDefaultPageSize));
      continue;
    }
    std::fill(held.begin(), held.end(), 0);
    for_each_page(sequence, static_cast<uint32_t>(ranks),
                  [&](uint32_t rank, int32_t) { most = std::max(most, ++held[rank]); });
  }
  return most;
}

/// Row `row` of every rank's table, and its lengths.
void place_pages(const SequenceWork& sequence, size_t row, std::span<StepTables> ranks) {
  const size_t first = row * static_cast<size_t>(ranks[0].columns);
  const size_t length = ranks[0].entries() + row;
  if (ranks.size() == 1) {
    const auto used = static_cast<size_t>(pages_for(sequence.decoded, kDefaultPageSize));
    std::copy_n(sequence.pages.begin(), used,
                ranks[0].data.begin() + static_cast<ptrdiff_t>(first));
    ranks[0].data[length] = sequence.decoded;
    return;
  }
  int32_t left = sequence.decoded;
  for_each_page(sequence, static_cast<uint32_t>(ranks.size()), [&](uint32_t rank, int32_t page) {
    int32_t& tokens =
        ranks[rank].data[length];  // whole pages so far: the last alone may not be full
    ranks[rank].data[first + static_cast<size_t>(tokens / kDefaultPageSize)] = page;
    const int32_t here = std::min(left, kDefaultPageSize);
    tokens += here;
    left -= here;
  });
}

}  // namespace

bool brings_no_prompt(const StepWork& work) {
  return std::all_of(work.sequences.begin(), work.sequences.end(),
                     [](const SequenceWork& sequence) { return sequence.appended <= 1; });
}

void make_tables(const StepWork& work, bool pad, std::span<StepTables> ranks) {
  for (StepTables& rank : ranks) rank.runs.clear();
  for (const SequenceWork& sequence : work.sequences) make_runs(sequence, ranks);
  auto batch = static_cast<int64_t>(work.sequences.size());
  int64_t columns = most_columns(work, ranks.size());
  columns = (columns + kWidth - 1) / kWidth * kWidth;
  int64_t most_runs = 0;
  for (const StepTables& rank : ranks) most_runs += static_cast<int64_t>(rank.runs.size());
  if (pad) {
    batch = next_power_of_two(batch);
    columns = next_power_of_two(columns);
    most_runs = batch;
  }
  for (StepTables& rank : ranks) {
    rank.batch = static_cast<int>(batch);
    rank.columns = static_cast<int>(columns);
    rank.padded = pad;
    rank.most_runs = most_runs;
    if (pad) rank.runs.resize(static_cast<size_t>(batch));
    rank.data.assign(rank.entries(), -1);
    rank.data.resize(rank.entries() + static_cast<size_t>(batch));
  }
  for (size_t i = 0; i < work.sequences.size(); ++i) place_pages(work.sequences[i], i, ranks);
}

}  // namespace mla::bench
