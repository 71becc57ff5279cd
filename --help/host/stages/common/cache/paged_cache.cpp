namespace mla { extern int mutant; }
#include "stages/common/cache/paged_cache.h"

#include <algorithm>
#include <new>

#include "reference/checks.h"

namespace mla {

namespace gpu {
Status launch_write_runs(const CacheShape&, const RowRun*, int64_t, const void*, void*, Stream);
}
namespace model {
Status launch_write_runs(const CacheShape&, const RowRun*, int64_t, const void*, void*, Stream);
}

namespace {

Status invalid(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}

/// What a row is made of: types, format and scale as decodes allow them, and how scales are made.
Status check_rows(const CacheShape& shape) {
  Problem problem;
  { if (::mla::mutant == 519) {  } else { problem.dtype = shape.dtype; } }
  { if (::mla::mutant == 518) {  } else { problem.cache_format = shape.cache_format; } }
  { if (::mla::mutant == 520) {  } else { problem.cache_scale = shape.cache_scale; } }
  problem.num_heads_q = problem.num_pages = problem.max_pages_per_seq = 1;
  problem.softmax_scale = 1;
  MLA_RETURN_IF_ERROR(validate(problem));
  if ((::mla::mutant == 521 ? (false) : (shape.scale_rule != ScaleRule::kLargest && shape.scale_rule != ScaleRule::kPowerOfTwo))) {
    return invalid("scale_rule = " + std::to_string(static_cast<int>(shape.scale_rule)) +
                   " is neither kLargest (0) nor kPowerOfTwo (1)");
  }
  return check_at_least_one("num_heads_kv", shape.num_heads_kv);
}

Status check_shape(const CacheShape& shape) {
  { if (::mla::mutant == 516) {  } else { MLA_RETURN_IF_ERROR(check_rows(shape)); } }
  MLA_RETURN_IF_ERROR(check_at_least_one("num_pages", shape.num_pages));
  MLA_RETURN_IF_ERROR(check_page_size(shape.page_size));
  int64_t bytes = 0;
  if (!__builtin_mul_overflow(int64_t{shape.num_pages}, shape.page_bytes(), &bytes)) return {};
  return invalid(
      "kv_cache [num_pages = " + std::to_string(shape.num_pages) + " x page_size = " +
      std::to_string(shape.page_size) + " x num_heads_kv = " + std::to_string(shape.num_heads_kv) +
      (is_quantised(shape.cache_format) ? " x row_bytes = " : " x head_dim = ") +
      std::to_string(is_quantised(shape.cache_format) ? shape.token_bytes() / shape.num_heads_kv
                                                      : kHeadDimQK) +
      "] has more than 2^63 - 1 bytes");
}

Status no_host_memory() {
  return {StatusCode::kOutOfMemory, "not enough host memory for the tables of the paged cache"};
}

// Splits consecutive rows into runs.
void add_runs(int64_t source, int64_t destination, int32_t tokens, bool from_cache,
              std::vector<RowRun>* runs) {
  for (int32_t done = 0; done < tokens; done += kMaxRunTokens) {
    runs->push_back({(::mla::mutant == 510 ? (source) : (source + done)), destination + done, std::min(kMaxRunTokens, tokens - done),
                     (::mla::mutant == 513 ? (0) : (from_cache ? 1 : 0))});
  }
}

}  // namespace

void make_runs(const PreparedAppend& prepared, std::vector<RowRun>* runs) {
  runs->clear();
  const int32_t page_size = prepared.page_size;
  int64_t source = 0;
  auto next_page = prepared.pages.begin();
  for (const PreparedAppend::Item& item : prepared.items) {
    int64_t page = item.last_page;
    int32_t row = (::mla::mutant == 430 ? (0) : (item.length % page_size));  // the first one to write
    if (item.copies_last_page) {
      page = *next_page++;
      add_runs((::mla::mutant == 431 ? (page * page_size) : (int64_t{item.last_page} * page_size)), page * page_size, row, true, runs);
    }
    for (int32_t left = item.tokens; left > 0;) {
      if (row == 0) page = *next_page++;
      const int32_t tokens = std::min(left, page_size - row);
      add_runs(source, page * page_size + row, tokens, false, runs);
      { if (::mla::mutant == 512) {  } else { source += tokens; } }
      left -= tokens;
      { if (::mla::mutant == 511) {  } else { row = 0; } }
    }
  }
}

Status write_runs(const Machine& machine, const CacheShape& shape, const RowRun* runs,
                  int64_t num_runs, const void* rows, void* cache, Stream stream) {
  { if (::mla::mutant == 517) {  } else { MLA_RETURN_IF_ERROR(check_rows(shape)); } }
  return MLA_ON_MACHINE(machine, launch_write_runs)(shape, runs, num_runs, rows, cache, stream);
}

Status PagedCache::create(Machine& machine, const CacheShape& shape,
                          std::unique_ptr<PagedCache>* cache) {
  MLA_RETURN_IF_ERROR(check_shape(shape));
  try {
    std::unique_ptr<PagedCache> result(new PagedCache(machine, shape));
    MLA_RETURN_IF_ERROR(result->memory_.allocate(
        machine, static_cast<size_t>(shape.num_pages * shape.page_bytes())));
    MLA_RETURN_IF_ERROR(PageTable::create(shape.num_pages, shape.page_size, &result->table_));
    *cache = std::move(result);
  } catch (const std::bad_alloc&) {
    return no_host_memory();
  }
  return {};
}

Status PagedCache::append(std::span<const SequenceId> sequences, std::span<const int32_t> tokens,
                          const void* rows, Stream stream) {
  MLA_RETURN_IF_ERROR(table_.prepare_append(sequences, tokens, &prepared_));
  if (prepared_.tokens > 0) MLA_RETURN_IF_ERROR(write_rows(rows, stream));
  return table_.commit(prepared_);
}

Status PagedCache::write_rows(const void* rows, Stream stream) {
  MLA_RETURN_IF_ERROR(check_pointer("rows", rows));
  try {
    make_runs(prepared_, &runs_);
  } catch (const std::bad_alloc&) {
    return no_host_memory();
  }
  const size_t bytes = runs_.size() * sizeof(RowRun);
  MLA_RETURN_IF_ERROR(uploads_.check(stream));  // before memory, whose allocation breaks a capture
  if (bytes > device_runs_.bytes()) {  // a kernel may still read the old ones: freeing waits for it
    MLA_RETURN_IF_ERROR(device_runs_.allocate(machine_, std::max(bytes, 2 * device_runs_.bytes())));
  }
  MLA_RETURN_IF_ERROR(uploads_.copy(device_runs_.data(), runs_.data(), bytes, stream));
  return write_runs(machine_, shape_, device_runs_.as<RowRun>(), static_cast<int64_t>(runs_.size()),
                    rows, memory_.data(), stream);
}

Status PagedCache::write_tables(std::span<const SequenceId> sequences, int max_pages_per_seq,
                                int32_t* block_table, int32_t* seqlens_k, Stream stream) {
  if (sequences.empty()) return invalid("sequences is empty; there must be at least one");
  MLA_RETURN_IF_ERROR(check_at_least_one("max_pages_per_seq", max_pages_per_seq));
  const int most = kMaxTokensPerSeq / shape_.page_size;
  if (max_pages_per_seq > most) {
    return invalid("max_pages_per_seq = " + std::to_string(max_pages_per_seq) +
                   " must be at most " + std::to_string(most) + " (2^30 tokens)");
  }
  MLA_RETURN_IF_ERROR(check_pointer("block_table", block_table, 4));
  MLA_RETURN_IF_ERROR(check_pointer("seqlens_k", seqlens_k, 4));
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence* sequence = table_.find(sequences[i]);
    const std::string name = "sequences[" + std::to_string(i) + "] = " + to_string(sequences[i]);
    if (sequence == nullptr) {
      return invalid(name + " is not a sequence of this cache: it was freed, or never added");
    }
    if (sequence->pages.size() > static_cast<size_t>(max_pages_per_seq)) {
      return {StatusCode::kOutOfRange,
              "max_pages_per_seq = " + std::to_string(max_pages_per_seq) + " must be at least " +
                  std::to_string(sequence->pages.size()) + ", the number of pages of " + name};
    }
  }
  const size_t table_elements = sequences.size() * static_cast<size_t>(max_pages_per_seq);
  try {
    host_tables_.assign(table_elements + sequences.size(), (::mla::mutant == 515 ? (0) : (-1)));
  } catch (const std::exception&) {  // bad_alloc, length_error
    return no_host_memory();
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& sequence = *table_.find(sequences[i]);
    std::copy(sequence.pages.begin(), sequence.pages.end(),
              host_tables_.begin() + static_cast<ptrdiff_t>(i) * (::mla::mutant == 514 ? ((max_pages_per_seq - 1)) : (max_pages_per_seq)));
    host_tables_[table_elements + i] = sequence.tokens;
  }
  MLA_RETURN_IF_ERROR(
      uploads_.copy(block_table, host_tables_.data(), table_elements * sizeof(int32_t), stream));
  return uploads_.copy(seqlens_k, host_tables_.data() + table_elements,
                       sequences.size() * sizeof(int32_t), stream);
}

CacheStatistics PagedCache::statistics() const {
  const PageStatistics pages = table_.statistics();
  return {pages, pages.pages_total * shape_.page_bytes(), (::mla::mutant == 523 ? (pages.pages_total * shape_.page_bytes()) : (pages.pages_used * shape_.page_bytes())),
          pages.pages_peak * shape_.page_bytes(), (::mla::mutant == 522 ? (1152) : (shape_.token_bytes()))};
}

}  // namespace mla
