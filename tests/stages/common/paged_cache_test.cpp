// The paged cache: its bookkeeping is compared with a naive model of shared pages, its memory with the
// tokens that went in, and decodes that read it with the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>

#ifdef MLA_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

#include "reference/gpu_model/gpu_model.h"
#include "reference/quantise.h"
#include "reference/testing/compare.h"
#include "reference/testing/data_generator.h"
#include "stages/common/cache/paged_cache.h"
#include "stages/common/stage.h"
#include "tests/machine_test.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitizer = true;
#else
constexpr bool kSanitizer = false;
#endif

using Batch = std::vector<SequenceId>;
using Counts = std::vector<int32_t>;

void expect_error(const Status& status, StatusCode code, const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status.to_string();
  for (const std::string& part : parts) {
    EXPECT_NE(status.message().find(part), std::string::npos)
        << "no '" << part << "' in: " << status.to_string();
  }
}

SequenceId add(auto& cache) {
  SequenceId id;
  const Status status = cache.add(&id);
  EXPECT_OK(status);
  return id;
}

SequenceId fork(auto& cache, SequenceId parent) {
  SequenceId id;
  const Status status = cache.fork(parent, &id);
  EXPECT_OK(status);
  return id;
}

// The pages of the longest sequence.
constexpr int kMostPages = kMaxTokensPerSeq / kDefaultPageSize;

PageTable make_table(int num_pages, int page_size = kDefaultPageSize) {
  PageTable table;
  EXPECT_OK(PageTable::create(num_pages, page_size, &table));
  return table;
}

// ---- bookkeeping ----

// A page table, beside the simplest model of it: sequences are lists of pages, pages are lists of
// tokens, and shared pages are shared pointers. A token is a number. The runs of each append are carried
// out on a memory of one number per token.
class ModelledTable {
 public:
  ModelledTable(int num_pages, int page_size, uint64_t seed)
      : num_pages_(num_pages),
        page_size_(page_size),
        table_(make_table(num_pages, page_size)),
        memory_(static_cast<size_t>(num_pages) * static_cast<size_t>(page_size), 0),
        random_(seed) {}

  // One random operation. Returns false if it disagreed with the model.
  void step() {
    const uint64_t choice = draw(100);
    if (choice < 8) {
      add_one();
    } else if (choice < 62) {
      append_some();
    } else if (choice < 74) {
      fork_one();
    } else if (choice < 90) {
      free_one();
    } else {
      call_badly();
    }
    const PageStatistics now = table_.statistics();
    ASSERT_EQ(now.sequences, static_cast<int64_t>(sequences_.size()));
    ASSERT_EQ(now.tokens, tokens_);
    ASSERT_EQ(now.pages_used + table_.free_pages(), num_pages_);
  }

  // Everything there is to know, compared.
  void check_all() {
    struct Use {
      int32_t count = 0;
      int32_t page = -1;
    };
    std::map<const Page*, Use> uses;
    std::map<int32_t, const Page*> owner;
    for (const auto& [id, pages] : sequences_) {
      const Sequence* sequence = table_.find(id);
      ASSERT_NE(sequence, nullptr) << to_string(id);
      ASSERT_EQ(sequence->tokens, length(pages));
      ASSERT_EQ(sequence->pages.size(), pages.size());
      for (size_t i = 0; i < pages.size(); ++i) {
        const int32_t page = sequence->pages[i];
        Use& use = uses[pages[i].get()];
        // A page is shared if and only if the model shares it: checked in both directions.
        if (use.count++ == 0) use.page = page;
        ASSERT_EQ(use.page, page) << to_string(id) << " page " << i;
        const auto [found, fresh] = owner.emplace(page, pages[i].get());
        ASSERT_EQ(found->second, pages[i].get()) << "page " << page << " is in two places";
        if (!fresh) continue;
        ASSERT_TRUE(std::equal(pages[i]->begin(), pages[i]->end(),
                               memory_.begin() + int64_t{page} * page_size_))
            << to_string(id) << " page " << i;
      }
    }
    PageStatistics expected;
    expected.pages_total = num_pages_;
    expected.page_size = page_size_;
    expected.pages_used = static_cast<int64_t>(uses.size());
    expected.sequences = static_cast<int64_t>(sequences_.size());
    for (const auto& [page, use] : uses) {
      ASSERT_EQ(table_.references(use.page), use.count);
      expected.pages_shared += use.count > 1;
      expected.tokens += use.count * static_cast<int64_t>(page->size());
      expected.tokens_stored += static_cast<int64_t>(page->size());
    }
    for (int32_t page = 0; page < num_pages_; ++page) {
      ASSERT_EQ(table_.references(page) > 0, owner.contains(page)) << page;
    }
    peak_ = std::max(peak_, expected.pages_used);
    expected.pages_peak = peak_;
    ASSERT_EQ(table_.statistics(), expected);
    const double slots = static_cast<double>(expected.pages_used * page_size_);
    const double share = slots == 0 ? 1 : static_cast<double>(expected.tokens_stored) / slots;
    ASSERT_DOUBLE_EQ(table_.statistics().utilization(), share);
    ASSERT_DOUBLE_EQ(table_.statistics().fragmentation(), 1 - share);
  }

  int64_t refused_for_pages = 0, copies = 0, bad_calls = 0;

 private:
  using Page = std::vector<uint32_t>;
  using Pages = std::vector<std::shared_ptr<Page>>;

  uint64_t draw(uint64_t limit) { return random_() % limit; }
  int32_t length(const Pages& pages) const {
    return pages.empty()
               ? 0
               : static_cast<int32_t>((pages.size() - 1) * static_cast<size_t>(page_size_) +
                                      pages.back()->size());
  }
  std::map<SequenceId, Pages>::iterator any_sequence() {
    return sequences_.lower_bound({static_cast<uint32_t>(draw(most_slots_ + 1)), 0});
  }
  SequenceId stale_id() {
    if (freed_.empty() || draw(8) == 0) return {static_cast<uint32_t>(draw(1000)), 2};
    return freed_[draw(freed_.size())];
  }

  void add_one() {
    if (sequences_.size() >= 40) return free_one();
    const SequenceId id = add(table_);
    most_slots_ = std::max(most_slots_, id.slot);
    ASSERT_TRUE(sequences_.emplace(id, Pages{}).second);
    ASSERT_TRUE(ever_.insert(id).second) << to_string(id) << " was given out before";
  }

  void fork_one() {
    const auto parent = any_sequence();
    if (parent == sequences_.end()) return;
    if (sequences_.size() >= 40) return free_one();
    const SequenceId id = fork(table_, parent->first);
    most_slots_ = std::max(most_slots_, id.slot);
    tokens_ += length(parent->second);
    ASSERT_TRUE(sequences_.emplace(id, parent->second).second);
    ASSERT_TRUE(ever_.insert(id).second) << to_string(id) << " was given out before";
  }

  void free_one() {
    const auto found = any_sequence();
    if (found == sequences_.end()) return;
    ASSERT_OK(table_.free(found->first));
    freed_.push_back(found->first);
    if (freed_.size() > 100) freed_.pop_front();
    tokens_ -= length(found->second);
    sequences_.erase(found);
  }

  void append_some() {
    Batch batch;
    Counts counts;
    for (uint64_t i = 0, size = 1 + draw(4); i < size; ++i) {
      const auto found = any_sequence();
      if (found == sequences_.end()) continue;
      if (std::find(batch.begin(), batch.end(), found->first) != batch.end()) continue;
      batch.push_back(found->first);
      // Mostly a token or so, as in decoding; now and then a prompt, or nothing.
      counts.push_back(static_cast<int32_t>(draw(4) == 0 ? draw(201) : draw(4)));
    }
    const int64_t needed = pages_needed(batch, counts);
    if (needed > table_.free_pages()) {
      const PageStatistics before = table_.statistics();
      const Status status = table_.append(batch, counts);
      ASSERT_EQ(status.code(), StatusCode::kOutOfMemory);
      ASSERT_NE(status.message().find("needs " + std::to_string(needed) + " pages, but only " +
                                      std::to_string(table_.free_pages())),
                std::string::npos)
          << status.to_string();
      ASSERT_EQ(table_.statistics(), before);
      ++refused_for_pages;
      return;
    }
    const Status planned = table_.prepare_append(batch, counts, &prepared_);
    ASSERT_OK(planned);
    ASSERT_EQ(static_cast<int64_t>(prepared_.pages.size()), needed);
    std::vector<uint32_t> rows;
    for (size_t i = 0; i < batch.size(); ++i) append_to_model(batch[i], counts[i], &rows);
    make_runs(prepared_, &runs_);
    for (const RowRun& run : runs_) {
      const uint32_t* source = (run.from_cache ? memory_ : rows).data() + run.source;
      std::copy(source, source + run.tokens, memory_.begin() + run.destination);
    }
    ASSERT_OK(table_.commit(prepared_));
    peak_ = std::max(peak_, num_pages_ - table_.free_pages());
    for (const SequenceId id : batch) check_one(id);
  }

  // If u sequences share a partly filled last page, and k of these are in the batch, k copy it. If k is
  // u, one keeps the page, and k - 1 copy it.
  int64_t pages_needed(const Batch& batch, const Counts& counts) {
    int64_t needed = 0;
    std::map<const Page*, int64_t> writers;
    for (size_t i = 0; i < batch.size(); ++i) {
      const Pages& pages = sequences_.at(batch[i]);
      const int32_t before = length(pages);
      needed += (before + counts[i] + page_size_ - 1) / page_size_ -
                (before + page_size_ - 1) / page_size_;
      if (counts[i] > 0 && before % page_size_ != 0) ++writers[pages.back().get()];
    }
    for (const auto& [page, count] : writers) {
      int64_t users = 0;
      for (const auto& [id, pages] : sequences_)
        users += !pages.empty() && pages.back().get() == page;
      needed += std::min(count, users - 1);
      copies += std::min(count, users - 1);
    }
    return needed;
  }

  void append_to_model(SequenceId id, int32_t count, std::vector<uint32_t>* rows) {
    Pages& pages = sequences_.at(id);
    for (int32_t i = 0; i < count; ++i) {
      if (pages.empty() || pages.back()->size() == static_cast<size_t>(page_size_)) {
        pages.push_back(std::make_shared<Page>());
      } else if (pages.back().use_count() > 1) {
        pages.back() = std::make_shared<Page>(*pages.back());
      }
      pages.back()->push_back(++last_token_);
      rows->push_back(last_token_);
    }
    tokens_ += count;
  }

  void check_one(SequenceId id) {
    const Pages& pages = sequences_.at(id);
    const Sequence* sequence = table_.find(id);
    ASSERT_EQ(sequence->tokens, length(pages));
    ASSERT_EQ(sequence->pages.size(), pages.size());
    for (size_t i = pages.size() < 4 ? 0 : pages.size() - 4; i < pages.size(); ++i) {
      ASSERT_EQ(std::memcmp(pages[i]->data(),
                            memory_.data() + static_cast<size_t>(page_size_) *
                                                 static_cast<size_t>(sequence->pages[i]),
                            pages[i]->size() * 4),
                0);
      ASSERT_EQ(table_.references(sequence->pages[i]), pages[i].use_count());
    }
  }

  void call_badly() {
    const PageStatistics before = table_.statistics();
    const auto found = any_sequence();
    const SequenceId stale = stale_id();
    SequenceId unused{7, 7};
    Status status;
    switch (draw(6)) {
      case 0:
        status = table_.free(stale);
        break;
      case 1:
        status = table_.fork(stale, &unused);
        break;
      case 2:
        status = table_.append(Batch{stale}, Counts{1});
        break;
      case 3:
        if (found == sequences_.end()) return;
        status = table_.append(Batch{found->first, found->first}, Counts{1, 1});
        break;
      case 4:
        if (found == sequences_.end()) return;
        status = table_.append(Batch{found->first, stale}, Counts{1, 1});
        break;
      default:
        if (found == sequences_.end()) return;
        status = table_.append(Batch{found->first}, Counts{-1 - static_cast<int32_t>(draw(9))});
    }
    ASSERT_EQ(status.code(), StatusCode::kInvalidArgument);
    ASSERT_EQ(unused, (SequenceId{7, 7}));
    ASSERT_EQ(table_.statistics(), before);
    if (found != sequences_.end()) check_one(found->first);
    ++bad_calls;
  }

  const int num_pages_, page_size_;
  PageTable table_;
  std::vector<uint32_t> memory_;  // [num_pages, page_size]
  std::mt19937_64 random_;
  std::map<SequenceId, Pages> sequences_;
  std::set<SequenceId> ever_;
  std::deque<SequenceId> freed_;
  uint32_t most_slots_ = 0;
  int64_t tokens_ = 0, peak_ = 0;
  uint32_t last_token_ = 0;
  PreparedAppend prepared_;
  std::vector<RowRun> runs_;
};

TEST(PageTable, AMillionRandomOperationsAgreeWithTheModel) {
  constexpr int kOperations = kSanitizer ? 100'000 : 1'000'000;
  ModelledTable table(200, 64, 1);
  for (int i = 0; i < kOperations; ++i) {
    table.step();
    if (i % 100 == 0) table.check_all();
    if (HasFatalFailure()) FAIL() << "operation " << i;
  }
  table.check_all();
  for (const int page_size : {16, 256}) {
    ModelledTable other(page_size == 16 ? 800 : 50, page_size, 2);
    for (int i = 0; i < kOperations / 20; ++i) {
      other.step();
      if (i % 100 == 0) other.check_all();
      if (HasFatalFailure()) FAIL() << "pages of " << page_size << ", operation " << i;
    }
  }
  // Each kind of operation occurred often enough.
  EXPECT_GT(table.refused_for_pages, kOperations / 100);
  EXPECT_GT(table.copies, kOperations / 100);
  EXPECT_GT(table.bad_calls, kOperations / 100);
}

TEST(PageTable, IdsOfFreedSequencesNameNothing) {
  PageTable table = make_table(4);
  const SequenceId first = add(table);
  ASSERT_OK(table.free(first));
  expect_error(table.free(first), StatusCode::kInvalidArgument,
               {"sequence = " + to_string(first), "freed, or never added"});
  const SequenceId second = add(table);
  EXPECT_EQ(second.slot, first.slot);
  EXPECT_NE(second, first);
  EXPECT_EQ(table.find(first), nullptr);
  EXPECT_NE(table.find(second), nullptr);
  SequenceId child{5, 5};
  expect_error(table.fork(first, &child), StatusCode::kInvalidArgument,
               {"parent = " + to_string(first)});
  EXPECT_EQ(child, (SequenceId{5, 5}));
  EXPECT_EQ(table.find({}), nullptr);
  EXPECT_EQ(table.find({99, 1}), nullptr);
  EXPECT_EQ(table.references(-1), 0);
  EXPECT_EQ(table.references(4), 0);
}

TEST(PageTable, BadAppendsChangeNothing) {
  PageTable table = make_table(4);
  const SequenceId a = add(table), b = add(table), gone = add(table);
  ASSERT_OK(table.free(gone));
  ASSERT_OK(table.append(Batch{a}, Counts{70}));
  const SequenceId c = fork(table, a);
  const PageStatistics before = table.statistics();
  constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
  expect_error(table.append(Batch{a, b}, Counts{1}), kInvalid, {"tokens has 1", "sequences has 2"});
  expect_error(table.append(Batch{a, gone}, Counts{1, 1}), kInvalid,
               {"sequences[1] = " + to_string(gone)});
  expect_error(table.append(Batch{a, b, a}, Counts{1, 1, 1}), kInvalid,
               {"sequences[2] = " + to_string(a), "twice"});
  expect_error(table.append(Batch{a, c, b}, Counts{1, 1, -2}), kInvalid,
               {"tokens[2] = -2", "at least 0"});
  expect_error(table.append(Batch{b, a}, Counts{1, 1 << 30}), StatusCode::kOutOfRange,
               {"tokens[1] = 1073741824", "at most 1073741754", "sequences[1] has 70 tokens",
                "may have 1073741824"});
  // b needs 2 pages. a needs a copy and one more page. c keeps the page that a left.
  expect_error(
      table.append(Batch{b, a, c}, Counts{65, 64, 1}), StatusCode::kOutOfMemory,
      {"tokens = 130", "3 sequences", "needs 4 pages", "but only 2 of num_pages = 4 are free"});
  EXPECT_EQ(table.statistics(), before);
  EXPECT_EQ(table.find(a)->pages, table.find(c)->pages);
  EXPECT_EQ(table.references(table.find(a)->pages[1]), 2);
  ASSERT_OK(table.append(Batch{b, a, c}, Counts{60, 50, 1}));  // 1 + 1 + 0 pages
  EXPECT_EQ(table.free_pages(), 0);
}

TEST(PageTable, BadSizesAreRefused) {
  PageTable table = make_table(3);
  for (const int num_pages : {0, -5}) {
    expect_error(PageTable::create(num_pages, 64, &table), StatusCode::kInvalidArgument,
                 {"num_pages = " + std::to_string(num_pages), "at least 1"});
  }
  for (const int page_size : {0, -64, 1, 8, 24, 63, 512}) {
    expect_error(PageTable::create(3, page_size, &table), StatusCode::kInvalidArgument,
                 {"page_size = " + std::to_string(page_size), "16, 32, 64, 128 or 256"});
  }
  EXPECT_EQ(table.free_pages(), 3);
}

TEST(PageTable, APlanIsValidUntilTheNextChange) {
  PageTable table = make_table(4);
  const SequenceId a = add(table);
  PreparedAppend plan;
  ASSERT_OK(table.prepare_append(Batch{a}, Counts{65}, &plan));
  EXPECT_EQ(table.statistics().tokens, 0);
  EXPECT_EQ(table.free_pages(), 4);
  ASSERT_OK(table.append(Batch{a}, Counts{1}));
  const PageStatistics before = table.statistics();
  expect_error(table.commit(plan), StatusCode::kInvalidArgument, {"version"});
  EXPECT_EQ(table.statistics(), before);
}

TEST(PageTable, NothingIsAppendedToEmptyBatchesAndByZeroTokens) {
  PageTable table = make_table(2);
  EXPECT_OK(table.append(Batch{}, Counts{}));
  const SequenceId a = add(table);
  EXPECT_OK(table.append(Batch{a}, Counts{0}));
  EXPECT_TRUE(table.find(a)->pages.empty());
  EXPECT_EQ(table.statistics().utilization(), 1);
  EXPECT_EQ(table.statistics().fragmentation(), 0);
  ASSERT_OK(table.append(Batch{a}, Counts{1}));
  const SequenceId b = fork(table, a);
  EXPECT_OK(table.append(Batch{a, b}, Counts{0, 0}));  // no copy either
  EXPECT_EQ(table.statistics().pages_shared, 1);
  EXPECT_EQ(table.statistics().tokens, 2);
  EXPECT_EQ(table.statistics().tokens_stored, 1);
  EXPECT_DOUBLE_EQ(table.statistics().fragmentation(), 63.0 / 64);
}

TEST(PageTable, TheLongestSequenceHasTwoToTheThirtyTokens) {
  if (kSanitizer) GTEST_SKIP() << "2^24 pages take too long";
  PageTable table = make_table(kMostPages + 1);
  const SequenceId a = add(table);
  ASSERT_OK(table.append(Batch{a}, Counts{1 << 30}));
  EXPECT_EQ(table.find(a)->pages.size(), size_t{kMostPages});
  expect_error(table.append(Batch{a}, Counts{1}), StatusCode::kOutOfRange,
               {"tokens[0] = 1", "1073741824"});
  EXPECT_OK(table.append(Batch{a}, Counts{0}));
  ASSERT_OK(table.free(a));
  EXPECT_EQ(table.free_pages(), kMostPages + 1);
}

// ---- memory ----

constexpr CacheFormat kQuantised[] = {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor,
                                      CacheFormat::kInt8Tile128};

int64_t row_bytes(CacheFormat format) {
  return format == CacheFormat::k16Bit ? 1152 : format == CacheFormat::kFp8Tensor ? 576 : 656;
}

class PagedCacheTest : public MachineTest {
 protected:
  void make_cache(const CacheShape& shape) {
    const Status status = PagedCache::create(*machine_, shape, &cache_);
    ASSERT_OK(status);
    tokens_.clear();
  }
  void make_cache(int num_pages, int num_heads_kv = 1, DType dtype = DType::kBFloat16,
                  int page_size = kDefaultPageSize) {
    make_cache({num_pages, page_size, num_heads_kv, dtype});
  }

  // The row of a token, of which every element depends on its number, head and column. Values as
  // of test data, so that they can also be decoded, or hard ones.
  void push_row(uint32_t token, std::vector<uint16_t>* rows) const {
    const DType dtype = cache_->shape().dtype;
    for (int head = 0; head < cache_->shape().num_heads_kv; ++head) {
      for (int column = 0; column < kHeadDimQK; ++column) {
        rows->push_back(hard_rows_ ? hard_bits(dtype, token, head, column)
                                   : kv_bits(3, dtype, DataKind::kFlat, 0, token, head, column));
      }
    }
  }

  // Values on which quantising must not fail, of another kind in each 128 columns.
  static uint16_t hard_bits(DType dtype, uint32_t token, int head, int column) {
    const uint64_t key = counter_random::row_key(4, 0, column / kTileColumns, token, head);
    const uint64_t random = counter_random::draw(key, column);
    const auto any_bits = static_cast<uint16_t>(random);
    const auto sign = static_cast<uint16_t>(any_bits & 0x8000);
    const uint16_t ordinary = kv_bits(3, dtype, DataKind::kFlat, 0, token, head, column);
    const uint16_t infinity = dtype == DType::kBFloat16 ? 0x7F80 : 0x7C00;
    const bool is_chosen = column % kTileColumns == static_cast<int>(key >> 32) % kTileColumns;
    switch (key % 10) {
      case 0:  // zeros, of both signs
        return sign;
      case 1:  // one NaN, of any bits, among ordinary values
        return is_chosen ? static_cast<uint16_t>(sign | infinity | (1 + any_bits % 127)) : ordinary;
      case 2:  // one infinity
        return is_chosen ? static_cast<uint16_t>(sign | infinity) : ordinary;
      case 3:  // both
        return static_cast<uint16_t>(random >> 16) % 16 == 0
                   ? static_cast<uint16_t>(sign | infinity | (any_bits & 1))
                   : ordinary;
      case 4:  // the largest numbers
        return static_cast<uint16_t>(sign | (infinity - 1 - any_bits % 4));
      case 5:  // subnormal ones
        return static_cast<uint16_t>(sign | any_bits % 128);
      case 6:  // one value that is much larger than the others
        return is_chosen ? static_cast<uint16_t>(ordinary + 0x800) : ordinary;
      case 7:  // any bits: all exponents, infinities and NaN
      case 8:
        return any_bits;
      default:
        return ordinary;
    }
  }

  // A problem that has only the cache's shape, on which quantising and places depend.
  Problem problem_of_cache() const {
    const CacheShape& shape = cache_->shape();
    Problem problem;
    problem.dtype = shape.dtype;
    problem.cache_format = shape.cache_format;
    problem.cache_scale = shape.cache_scale;
    problem.num_pages = shape.num_pages;
    problem.page_size = shape.page_size;
    problem.num_heads_q = problem.num_heads_kv = shape.num_heads_kv;
    return problem;
  }

  // The token's bytes in the cache, as the host makes them.
  std::vector<uint8_t> bytes_of(uint32_t token) const {
    std::vector<uint16_t> row;
    push_row(token, &row);
    const Problem problem = problem_of_cache();
    const auto row_bytes = static_cast<size_t>(problem.cache_row_bytes());
    std::vector<uint8_t> bytes(row_bytes * static_cast<size_t>(problem.num_heads_kv));
    if (!is_quantised(problem.cache_format)) {
      std::memcpy(bytes.data(), row.data(), bytes.size());
      return bytes;
    }
    for (size_t head = 0; head < static_cast<size_t>(problem.num_heads_kv); ++head) {
      std::vector<float> values;
      for (int column = 0; column < kHeadDimQK; ++column) {
        values.push_back(to_float(problem.dtype, row[head * kHeadDimQK + size_t(column)]));
      }
      quantise_row(problem, cache_->shape().scale_rule, values.data(),
                   bytes.data() + head * row_bytes);
    }
    return bytes;
  }

  // All bytes of the cache.
  std::vector<uint8_t> memory(Stream stream = nullptr) const {
    const CacheShape& shape = cache_->shape();
    std::vector<uint8_t> bytes(static_cast<size_t>(shape.num_pages * shape.page_bytes()));
    EXPECT_OK(machine_->copy_to_host(bytes.data(), cache_->data(), bytes.size(), stream));
    return bytes;
  }

  // Appends new tokens to cache and model. The rows live on the machine until the next call.
  Status append(const Batch& batch, const Counts& counts, Stream stream = nullptr) {
    std::vector<uint16_t> rows;
    std::map<SequenceId, std::vector<uint32_t>> after = tokens_;
    for (size_t i = 0; i < batch.size(); ++i) {
      for (int32_t t = 0; t < counts[i]; ++t) {
        after[batch[i]].push_back(++last_token_);
        push_row(last_token_, &rows);
      }
    }
    rows_.emplace_back();
    if (!rows.empty()) {
      EXPECT_OK(rows_.back().assign(*machine_, rows.data(), rows.size() * 2));
    }
    if (rows_.size() > 64) rows_.pop_front();
    const Status status = cache_->append(batch, counts, rows_.back().data(), stream);
    if (status.ok()) tokens_ = std::move(after);
    return status;
  }

  SequenceId add_sequence() {
    const SequenceId id = add(*cache_);
    tokens_[id] = {};
    return id;
  }
  SequenceId fork_sequence(SequenceId parent) {
    const SequenceId id = fork(*cache_, parent);
    tokens_[id] = tokens_.at(parent);
    return id;
  }
  void free_sequence(SequenceId id) {
    EXPECT_OK(cache_->free(id));
    tokens_.erase(id);
  }

  // Appends, and compares every byte of the cache with what it must be then: new rows at their
  // places, the rows of pages that were copied on write, and all others as they were.
  void append_and_compare(const Batch& batch, const Counts& counts) {
    const std::vector<uint8_t> before = memory();
    std::vector<Sequence> old;
    for (const SequenceId id : batch) old.push_back(*cache_->table().find(id));
    ASSERT_OK(append(batch, counts));
    const CacheShape& shape = cache_->shape();
    std::vector<uint8_t> expected = before;
    const auto place = [&](const std::vector<int32_t>& pages, int32_t token) {
      const int32_t page = pages[static_cast<size_t>(token / shape.page_size)];
      return page * shape.page_bytes() + token % shape.page_size * shape.token_bytes();
    };
    for (size_t i = 0; i < batch.size(); ++i) {
      const Sequence& now = *cache_->table().find(batch[i]);
      ASSERT_EQ(now.tokens, old[i].tokens + counts[i]);
      for (int32_t t = 0; t < now.tokens; ++t) {
        if (t < old[i].tokens) {
          std::copy_n(before.begin() + place(old[i].pages, t), shape.token_bytes(),
                      expected.begin() + place(now.pages, t));
        } else {
          const std::vector<uint8_t> bytes = bytes_of(tokens_.at(batch[i])[static_cast<size_t>(t)]);
          std::copy(bytes.begin(), bytes.end(), expected.begin() + place(now.pages, t));
        }
      }
    }
    const std::vector<uint8_t> after = memory();
    const auto wrong = std::mismatch(after.begin(), after.end(), expected.begin()).first;
    if (wrong == after.end()) return;
    const int64_t byte = wrong - after.begin();
    FAIL() << "byte " << byte % (shape.token_bytes() / shape.num_heads_kv) << " of a row of token "
           << byte % shape.page_bytes() / shape.token_bytes() << " of page "
           << byte / shape.page_bytes();
  }

  // All sequences, read back by tables that the cache wrote.
  void expect_contents(Stream stream = nullptr) {
    Batch batch;
    int max_pages = 1;
    for (const auto& [id, tokens] : tokens_) {
      batch.push_back(id);
      max_pages =
          std::max(max_pages, static_cast<int>(pages_for(static_cast<int64_t>(tokens.size()),
                                                         cache_->shape().page_size)));
    }
    if (batch.empty()) return;
    const size_t slots = batch.size() * static_cast<size_t>(max_pages);
    DeviceBuffer device_table, device_lengths;
    ASSERT_OK(device_table.allocate(*machine_, slots * 4));
    ASSERT_OK(device_lengths.allocate(*machine_, batch.size() * 4));
    const Status status = cache_->write_tables(batch, max_pages, device_table.as<int32_t>(),
                                               device_lengths.as<int32_t>(), stream);
    ASSERT_OK(status);
    std::vector<int32_t> table(slots), lengths(batch.size());
    const CacheShape& shape = cache_->shape();
    const auto download = [&](auto& host, const void* device) {
      ASSERT_OK(machine_->copy_to_host(host.data(), device, host.size() * sizeof host[0], stream));
    };
    download(table, device_table.data());
    download(lengths, device_lengths.data());
    const std::vector<uint8_t> there = memory(stream);
    const Problem problem = problem_of_cache();
    const Tensors contiguous = with_strides(problem, {});
    for (size_t i = 0; i < batch.size(); ++i) {
      const std::vector<uint32_t>& tokens = tokens_.at(batch[i]);
      const int32_t* table_row = table.data() + i * static_cast<size_t>(max_pages);
      ASSERT_EQ(lengths[i], static_cast<int32_t>(tokens.size()));
      for (int32_t t = 0; t < lengths[i]; ++t) {
        const std::vector<uint8_t> expected = bytes_of(tokens[static_cast<size_t>(t)]);
        const int64_t place =
            cache_place(problem, contiguous, table_row, t, 0) * problem.cache_element_bytes();
        ASSERT_EQ(std::memcmp(expected.data(), there.data() + place, expected.size()), 0)
            << to_string(batch[i]) << " token " << t;
      }
      for (int64_t p = pages_for(lengths[i], shape.page_size); p < max_pages; ++p)
        ASSERT_EQ(table_row[p], -1);
    }
  }

  void operate_at_random(int operations) {
    std::mt19937_64 random(5);
    const auto any = [&] {
      return std::next(tokens_.begin(), static_cast<ptrdiff_t>(random() % tokens_.size()))->first;
    };
    int64_t out_of_pages = 0, shared = 0;
    for (int i = 0; i < operations; ++i) {
      gpu_model::schedule().seed = static_cast<uint64_t>(i % 11);
      const uint64_t choice = random() % 10;
      if (tokens_.empty() || (choice == 0 && tokens_.size() < 10)) {
        add_sequence();
      } else if (choice < 6) {
        Batch batch{any()};
        if (const SequenceId other = any(); other != batch[0]) batch.push_back(other);
        Counts counts;
        for (size_t j = 0; j < batch.size(); ++j) {
          counts.push_back(static_cast<int32_t>(random() % (random() % 4 == 0 ? 100 : 3)));
        }
        const Status status = append(batch, counts);
        if (status.code() == StatusCode::kOutOfMemory) {
          ++out_of_pages;
        } else {
          ASSERT_OK(status);
        }
      } else if (choice < 8 && tokens_.size() < 10) {
        fork_sequence(any());
      } else {
        free_sequence(any());
      }
      shared += cache_->statistics().pages.pages_shared > 0;
      if (i % 50 == 0) expect_contents();
      if (HasFatalFailure()) FAIL() << "operation " << i;
    }
    expect_contents();
    EXPECT_GT(out_of_pages, operations / 100);
    EXPECT_GT(shared, operations / 10);
  }

  std::unique_ptr<PagedCache> cache_;
  std::map<SequenceId, std::vector<uint32_t>> tokens_;
  uint32_t last_token_ = 0;
  bool hard_rows_ = false;
  std::deque<DeviceBuffer> rows_;  // some appends may not have run yet
};

TEST_P(PagedCacheTest, RandomOperationsKeepEveryRow) {
  make_cache(12);
  operate_at_random(kSanitizer ? 1000 : 5000);
}

TEST_P(PagedCacheTest, RandomOperationsKeepEveryQuantisedRow) {
  hard_rows_ = true;
  for (const CacheFormat format : kQuantised) {
    SCOPED_TRACE(to_string(format));
    make_cache({.num_pages = 12, .cache_format = format, .cache_scale = 0.01f});
    operate_at_random(kSanitizer ? 200 : 500);
  }
}

// Rows cross pages, and there are several sequences and heads. Nothing else is touched.
TEST_P(PagedCacheTest, AppendsQuantiseAsTheHostDoes) {
  hard_rows_ = true;
  int heads = 1;
  for (const CacheFormat format : kQuantised) {
    for (const int page_size : {16, 32, 64, 128, 256}) {
      for (const bool other : {false, true}) {  // the other type, or the other rule
        CacheShape shape{8, page_size, heads};
        heads = heads % 3 + 1;
        shape.cache_format = format;
        shape.cache_scale = other ? 1e-30f : 0.013f;
        if (has_tile_scales(format)) {
          if (other) shape.scale_rule = ScaleRule::kPowerOfTwo;
        } else if (other) {
          shape.dtype = DType::kFloat16;
        }
        SCOPED_TRACE(std::string(to_string(format)) + ", pages of " + std::to_string(page_size) +
                     (other ? ", the other way" : ""));
        make_cache(shape);
        ASSERT_OK(machine_->fill(cache_->data(), 0xA5,
                                 static_cast<size_t>(shape.num_pages * shape.page_bytes())));
        const SequenceId a = add_sequence(), b = add_sequence(), c = add_sequence();
        append_and_compare({a, b, c}, {page_size + 3, 1, page_size - 1});
        append_and_compare({b, a}, {page_size - 1, 2});
        append_and_compare({c, a, b}, {1, 1, 1});
        EXPECT_EQ(cache_->statistics().pages.pages_used, 2 + 2 + 1);
        // Three sequences share a page of six rows. One goes on in a copy, then another does, and the
        // last keeps the page.
        const SequenceId d = fork_sequence(a), e = fork_sequence(d);
        append_and_compare({d}, {1});
        EXPECT_EQ(cache_->statistics().pages.pages_used, 5 + 1);
        append_and_compare({a, d, e}, {2, 0, page_size});
        EXPECT_EQ(cache_->statistics().pages.pages_used, 6 + 1 + 1);
        expect_contents();
        // A page that belonged to another sequence is used again.
        free_sequence(c);
        append_and_compare({b}, {page_size});
        expect_contents();
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(PagedCacheTest, AppendsCopyOnWriteUnderEverySchedule) {
  for (uint64_t round = 0; round < 30; ++round) {
    // 12 schedules with 16 bits, 6 with each of the others.
    const uint64_t seed = round < 12 ? round : round % 6;
    CacheShape shape{16, 64, 2, DType::kFloat16};
    if (round >= 12) shape.cache_format = kQuantised[round / 6 - 2];
    if (has_tile_scales(shape.cache_format)) shape.dtype = DType::kBFloat16;
    SCOPED_TRACE(to_string(shape.cache_format));
    gpu_model::schedule().seed = seed;
    // A grid smaller than the number of runs: blocks loop.
    gpu_model::device().max_grid_x = seed % 2 == 0 ? 2147483647 : 3;
    make_cache(shape);
    const SequenceId a = add_sequence(), empty = add_sequence();
    ASSERT_OK(append({a}, {64 + 63}));
    const SequenceId b = fork_sequence(a), c = fork_sequence(a), d = fork_sequence(empty);
    // a and b copy; c is the last to share the page, and writes its row 63 while they read the
    // others. a goes on into two more pages.
    ASSERT_OK(append({a, b, c, d}, {70, 1, 1, 5}));
    const PageStatistics pages = cache_->statistics().pages;
    EXPECT_EQ(pages.pages_shared, 1);
    EXPECT_EQ(pages.pages_used, 1 + 3 + 2 + 1);
    EXPECT_EQ(pages.tokens_stored, 64 + (64 + 69) + 64 + 64 + 5);
    expect_contents();
    // Full pages are shared without a copy.
    const SequenceId e = fork_sequence(c);
    ASSERT_OK(append({c, e}, {1, 2}));
    EXPECT_EQ(cache_->statistics().pages.pages_used, 7 + 2);
    expect_contents();
    free_sequence(a);
    free_sequence(c);
    expect_contents();
    for (const SequenceId id : {empty, b, d, e}) free_sequence(id);
    EXPECT_EQ(cache_->statistics().pages.pages_used, 0);
    EXPECT_EQ(cache_->statistics().bytes_used, 0);
    EXPECT_EQ(cache_->statistics().bytes_peak, 9 * cache_->shape().page_bytes());
    EXPECT_EQ(cache_->statistics().bytes_total, 16 * 64 * 2 * row_bytes(shape.cache_format));
  }
}

TEST_P(PagedCacheTest, StatisticsCountTheBytesOfTheFormat) {
  for (const CacheFormat format : kCacheFormats) {
    SCOPED_TRACE(to_string(format));
    make_cache({.num_pages = 9, .page_size = 32, .num_heads_kv = 3, .cache_format = format});
    const int64_t token = 3 * row_bytes(format), page = 32 * token;
    EXPECT_EQ(cache_->shape().token_bytes(), token);
    EXPECT_EQ(cache_->shape().page_bytes(), page);
    const auto expect_bytes = [&](int64_t used, int64_t peak) {
      const CacheStatistics statistics = cache_->statistics();
      EXPECT_EQ(statistics.bytes_per_token, token);
      EXPECT_EQ(statistics.bytes_total, 9 * page);
      EXPECT_EQ(statistics.bytes_used, used * page);
      EXPECT_EQ(statistics.bytes_peak, peak * page);
    };
    expect_bytes(0, 0);
    const SequenceId a = add_sequence();
    ASSERT_OK(append({a}, {33}));
    const SequenceId b = fork_sequence(a);
    expect_bytes(2, 2);
    ASSERT_OK(append({b}, {1}));
    expect_bytes(3, 3);
    free_sequence(a);
    expect_bytes(2, 3);
  }
}

TEST_P(PagedCacheTest, ErrorsNameTheArgumentAndChangeNothing) {
  make_cache(3);
  const SequenceId a = add_sequence(), b = add_sequence(), gone = add_sequence();
  ASSERT_OK(append({a, b}, {100, 10}));
  free_sequence(gone);
  const PageStatistics before = cache_->statistics().pages;
  constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
  DeviceBuffer buffer;
  ASSERT_OK(buffer.allocate(*machine_, 4096));
  auto* rows = buffer.as<std::byte>();

  expect_error(cache_->append(Batch{a}, Counts{1}, nullptr), kInvalid, {"rows is null"});
  expect_error(cache_->append(Batch{a}, Counts{1}, rows + 2), kInvalid, {"rows = ", "16 bytes"});
  expect_error(append({a, b}, {30, 60}), StatusCode::kOutOfMemory,
               {"needs 2 pages", "0 of num_pages = 3"});
  expect_error(append({a, a}, {1, 1}), kInvalid, {"sequences[1]", "twice"});
  expect_error(append({gone}, {1}), kInvalid, {"sequences[0] = " + to_string(gone)});
  expect_error(append({a}, {-1}), kInvalid, {"tokens[0] = -1"});
  expect_error(cache_->append(Batch{a, b}, Counts{1}, rows), kInvalid, {"tokens has 1"});
  expect_error(cache_->free(gone), kInvalid, {"sequence = " + to_string(gone)});
  SequenceId child;
  expect_error(cache_->fork(gone, &child), kInvalid, {"parent = " + to_string(gone)});

  // Tables: nothing is written.
  ASSERT_OK(machine_->fill(buffer.data(), 0xab, 4096));
  auto* table = buffer.as<int32_t>();
  int32_t* lengths = table + 512;
  expect_error(cache_->write_tables(Batch{b, a}, 1, table, lengths), StatusCode::kOutOfRange,
               {"max_pages_per_seq = 1", "at least 2", "sequences[1] = " + to_string(a)});
  expect_error(cache_->write_tables(Batch{a, gone}, 2, table, lengths), kInvalid,
               {"sequences[1] = " + to_string(gone)});
  expect_error(cache_->write_tables(Batch{}, 2, table, lengths), kInvalid, {"sequences is empty"});
  expect_error(cache_->write_tables(Batch{a}, 0, table, lengths), kInvalid,
               {"max_pages_per_seq = 0", "at least 1"});
  expect_error(cache_->write_tables(Batch{a}, kMostPages + 1, table, lengths), kInvalid,
               {"max_pages_per_seq = 16777217", "at most 16777216"});
  expect_error(cache_->write_tables(Batch{a}, 2, nullptr, lengths), kInvalid,
               {"block_table is null"});
  expect_error(cache_->write_tables(Batch{a}, 2, table, nullptr), kInvalid, {"seqlens_k is null"});
  const auto odd = [](int32_t* pointer) {
    return reinterpret_cast<int32_t*>(reinterpret_cast<char*>(pointer) + 2);
  };
  expect_error(cache_->write_tables(Batch{a}, 2, odd(table), lengths), kInvalid,
               {"block_table", "4 bytes"});
  expect_error(cache_->write_tables(Batch{a}, 2, table, odd(lengths)), kInvalid,
               {"seqlens_k", "4 bytes"});
  std::vector<unsigned char> bytes(4096);
  ASSERT_OK(machine_->copy_to_host(bytes.data(), buffer.data(), 4096));
  EXPECT_EQ(std::count(bytes.begin(), bytes.end(), 0xab), 4096);

  EXPECT_EQ(cache_->statistics().pages, before);
  expect_contents();
  EXPECT_OK(cache_->append(Batch{a}, Counts{0}, nullptr));
  EXPECT_OK(append({a, b}, {28, 54}));  // to the last row
  expect_contents();
}

TEST_P(PagedCacheTest, RefusedAppendsChangeNoByteOfAQuantisedCache) {
  hard_rows_ = true;
  for (const CacheFormat format : kQuantised) {
    SCOPED_TRACE(to_string(format));
    make_cache({.num_pages = 3, .cache_format = format, .cache_scale = 0.01f});
    const SequenceId a = add_sequence(), b = add_sequence();
    ASSERT_OK(append({a}, {70}));
    const std::vector<uint8_t> before = memory();
    DeviceBuffer buffer;
    ASSERT_OK(buffer.allocate(*machine_, 4096));
    constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
    expect_error(cache_->append(Batch{a}, Counts{1}, nullptr), kInvalid, {"rows is null"});
    expect_error(cache_->append(Batch{a}, Counts{1}, buffer.as<std::byte>() + 8), kInvalid,
                 {"rows = ", "16 bytes"});
    expect_error(append({a, b}, {1, 65}), StatusCode::kOutOfMemory,
                 {"needs 2 pages", "1 of num_pages = 3"});
    expect_error(append({b, b}, {1, 1}), kInvalid, {"sequences[1]", "twice"});
    EXPECT_EQ(memory(), before);
    expect_contents();
    ASSERT_OK(append({a, b}, {58, 64}));  // to the last row
    expect_contents();
  }
}

TEST_P(PagedCacheTest, ShapesOutsideTheContractAreRefused) {
  std::unique_ptr<PagedCache> cache;
  const auto create = [&](CacheShape shape) {
    return PagedCache::create(*machine_, shape, &cache);
  };
  constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
  expect_error(create({0, 64, 1}), kInvalid, {"num_pages = 0", "at least 1"});
  expect_error(create({-1, 64, 1}), kInvalid, {"num_pages = -1"});
  expect_error(create({1, 65, 1}), kInvalid, {"page_size = 65", "16, 32, 64, 128 or 256"});
  expect_error(create({1, 64, 0}), kInvalid, {"num_heads_kv = 0", "at least 1"});
  expect_error(create({1, 64, 1, static_cast<DType>(5)}), kInvalid, {"dtype = 5"});
  expect_error(create({2147483647, 64, 2147483647}), kInvalid,
               {"num_pages = 2147483647", "2^63 - 1"});
  expect_error(create({2147483647, 64, 1}), StatusCode::kOutOfMemory, {"158329674326016 bytes"});

  // Formats that do not exist or do not fit, and sizes by each format's bytes.
  constexpr DType kBf16 = DType::kBFloat16, kFp16 = DType::kFloat16;
  constexpr CacheFormat kTensor = CacheFormat::kFp8Tensor, kTile = CacheFormat::kFp8Tile128;
  const float kNaN = std::nanf(""), kInfinity = std::numeric_limits<float>::infinity();
  std::vector<std::pair<CacheShape, std::vector<std::string>>> wrong{
      {{1, 64, 1, kFp16, kTile}, {"dtype = fp16", "must be bf16", "cache_format = fp8_tile128"}},
      {{1, 64, 1, kFp16, CacheFormat::kInt8Tile128}, {"dtype = fp16", "int8_tile128"}},
      {{1, 64, 1, kBf16, static_cast<CacheFormat>(9)}, {"cache_format = 9", "int8_tile128 (3)"}},
      {{1, 64, 0, kBf16, kTile}, {"num_heads_kv = 0", "at least 1"}},
      {{1, 64, 1, kBf16, kTile, 1, static_cast<ScaleRule>(2)}, {"scale_rule = 2", "neither"}}};
  for (const float scale : {0.0f, -1.0f, kNaN, kInfinity}) {
    wrong.push_back({{1, 64, 1, kBf16, kTensor, scale}, {"cache_scale = ", "greater than 0"}});
  }
  DeviceBuffer run, rows;
  ASSERT_OK(run.allocate(*machine_, sizeof(RowRun)));
  ASSERT_OK(machine_->fill(run.data(), 0, sizeof(RowRun)));
  ASSERT_OK(rows.allocate(*machine_, 1152));
  for (const auto& [shape, parts] : wrong) {
    expect_error(create(shape), kInvalid, parts);
    expect_error(
        write_runs(*machine_, shape, run.as<RowRun>(), 1, rows.data(), rows.data(), nullptr),
        kInvalid, parts);
  }
  expect_error(create({2147483647, 64, 2147483647, kBf16, kTile}), kInvalid,
               {"row_bytes = 656", "2^63 - 1"});
  expect_error(create({2147483647, 64, 1, kBf16, kTile}), StatusCode::kOutOfMemory,
               {"90159953435648 bytes"});
  expect_error(create({2147483647, 64, 1, kFp16, kTensor}), StatusCode::kOutOfMemory,
               {"79164837163008 bytes"});
  EXPECT_EQ(cache, nullptr);
  EXPECT_OK(create({1, 64, 1, kFp16, kTensor}));
  EXPECT_OK(create({1, 64, 1, kBf16, kTile, kNaN}));  // not read
  cache.reset();
  EXPECT_EQ(cache, nullptr);
}

TEST(PagedCacheOnTheModel, ARejectedKernelChangesNoSequence) {
  for (const CacheFormat format : kCacheFormats) {
    SCOPED_TRACE(to_string(format));
    std::unique_ptr<PagedCache> cache;
    ASSERT_OK(
        PagedCache::create(model_machine(), {.num_pages = 4, .cache_format = format}, &cache));
    const SequenceId a = add(*cache);
    DeviceBuffer rows;
    ASSERT_OK(rows.allocate(model_machine(), 3 * 1152));
    // Ten rows are appended from memory that has three, so the kernel reads past its end.
    expect_error(cache->append(Batch{a}, Counts{10}, rows.data()), StatusCode::kKernelRejected,
                 {"out-of-bounds global memory read"});
    EXPECT_EQ(cache->table().find(a)->tokens, 0);
    EXPECT_EQ(cache->statistics().pages.pages_used, 0);
    EXPECT_OK(cache->append(Batch{a}, Counts{3}, rows.data()));
  }
}

// ---- decoding ----

TEST_P(PagedCacheTest, StagesDecodeFromTheCache) {
  for (const char* slug : {"02", "03"}) {
    const Stage* stage = find_stage(GetParam(), slug);
    ASSERT_NE(stage, nullptr);
    for (const auto& [num_heads_kv, page_size] : {std::pair{1, 64}, {2, 64}, {1, 16}, {2, 256}}) {
      const DType dtype = num_heads_kv == 1 ? DType::kBFloat16 : DType::kFloat16;
      SCOPED_TRACE(std::string(slug) + " " + to_string(dtype) + ", pages of " +
                   std::to_string(page_size));
      const int num_pages = 20 * std::max(1, 64 / page_size);
      make_cache(num_pages, num_heads_kv, dtype, page_size);
      ASSERT_OK(machine_->fill(cache_->data(), 0xff,
                               static_cast<size_t>(num_pages * cache_->shape().page_bytes())));
      // A prompt with three continuations, of which one is freed; a sequence on freed pages; an empty
      // sequence. Then five steps of decoding for all.
      const SequenceId prompt = add_sequence(), freed = add_sequence();
      ASSERT_OK(append({prompt, freed}, {100, 130}));
      const SequenceId left = fork_sequence(prompt), right = fork_sequence(prompt);
      ASSERT_OK(append({left, right}, {1, 30}));
      free_sequence(freed);
      free_sequence(right);
      const SequenceId other = add_sequence(), empty = add_sequence();
      ASSERT_OK(append({other}, {190}));
      for (int step = 0; step < 5; ++step) {
        ASSERT_OK(append({left, prompt, other}, {1, 1, 1}));
      }
      const Batch batch{left, other, empty, prompt, left};
      Problem problem;
      problem.dtype = dtype;
      problem.batch = static_cast<int>(batch.size());
      problem.seqlen_q = 2;
      problem.causal = true;
      problem.num_heads_q = 4;
      problem.num_heads_kv = num_heads_kv;
      problem.num_pages = cache_->shape().num_pages;
      problem.page_size = page_size;
      problem.max_pages_per_seq = 5 * std::max(1, 64 / page_size);
      problem.softmax_scale = 1.0f / 24;
      std::vector<uint16_t> q;
      for (int sequence = 0; sequence < problem.batch; ++sequence) {
        for (int row = 0; row < 8; ++row) {
          for (int column = 0; column < kHeadDimQK; ++column) {
            q.push_back(q_bits(2, dtype, DataKind::kFlat, sequence, row / 4, row % 4, column));
          }
        }
      }
      DeviceBuffer device_q, table, lengths, out, lse, workspace;
      const auto out_elements = static_cast<size_t>(problem.out_elements());
      const auto lse_elements = static_cast<size_t>(problem.lse_elements());
      ASSERT_OK(device_q.assign(*machine_, q.data(), q.size() * 2));
      ASSERT_OK(table.allocate(*machine_, static_cast<size_t>(problem.block_table_elements()) * 4));
      ASSERT_OK(lengths.allocate(*machine_, batch.size() * 4));
      ASSERT_OK(out.allocate(*machine_, out_elements * 2));
      ASSERT_OK(lse.allocate(*machine_, lse_elements * 4));
      ASSERT_OK(allocate_workspace(*stage, problem, &workspace));
      ASSERT_OK(cache_->write_tables(batch, problem.max_pages_per_seq, table.as<int32_t>(),
                                     lengths.as<int32_t>()));
      const Status status = decode(*stage, problem,
                                   {.q = device_q.data(),
                                    .kv_cache = cache_->data(),
                                    .block_table = table.as<int32_t>(),
                                    .seqlens_k = lengths.as<int32_t>(),
                                    .out = out.data(),
                                    .lse = lse.as<float>()},
                                   workspace);
      ASSERT_OK(status);
      ASSERT_OK(machine_->synchronize());
      std::vector<uint16_t> host_out(out_elements);
      std::vector<float> host_lse(lse_elements);
      ASSERT_OK(machine_->copy_to_host(host_out.data(), out.data(), out_elements * 2));
      ASSERT_OK(machine_->copy_to_host(host_lse.data(), lse.data(), lse_elements * 4));

      // The same tokens in a cache that the test lays out itself: sequence i on pages 5 i, 5 i + 1
      // ...
      Problem plain = problem;
      plain.num_pages = problem.batch * problem.max_pages_per_seq;
      std::vector<uint16_t> plain_cache(static_cast<size_t>(plain.kv_elements()), 0);
      std::vector<int32_t> plain_table(static_cast<size_t>(plain.num_pages)), plain_lengths;
      for (size_t i = 0; i < plain_table.size(); ++i) plain_table[i] = static_cast<int32_t>(i);
      for (size_t i = 0; i < batch.size(); ++i) {
        std::vector<uint16_t> rows;
        for (const uint32_t token : tokens_.at(batch[i])) push_row(token, &rows);
        const size_t width = plain_cache.size() / batch.size();
        std::copy(rows.begin(), rows.end(),
                  plain_cache.begin() + static_cast<ptrdiff_t>(i * width));
        plain_lengths.push_back(static_cast<int32_t>(tokens_.at(batch[i]).size()));
      }
      ReferenceResult truth;
      const Status reference = reference_attention(plain,
                                                   {.q = q.data(),
                                                    .kv_cache = plain_cache.data(),
                                                    .block_table = plain_table.data(),
                                                    .seqlens_k = plain_lengths.data()},
                                                   &truth);
      ASSERT_OK(reference);
      const DecodeComparison comparison = compare_decode(problem, host_out, host_lse, truth);
      EXPECT_OK(comparison);
    }
  }
}

#ifdef MLA_HAVE_CUDA
// The stream does not wait for the default one, and appends queue up behind a long fill. The tables of
// all appends, and those of write_tables, must live until they are copied.
TEST_P(PagedCacheTest, AppendsQueueUpOnAStream) {
  if (GetParam() != MachineKind::kGpu) GTEST_SKIP() << "the model has no streams";
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  make_cache(64);
  DeviceBuffer ballast;
  ASSERT_OK(ballast.allocate(*machine_, size_t{1} << 30));
  const SequenceId a = add_sequence(), b = add_sequence();
  ASSERT_OK(append({a, b}, {200, 30}, stream));
  const SequenceId c = fork_sequence(a);
  for (int i = 0; i < 60; ++i) {
    ASSERT_OK(machine_->fill(ballast.data(), 0, ballast.bytes(), stream));
    ASSERT_OK(append({a, b, c}, {1 + i % 3, 1, 2}, stream));
  }
  expect_contents(stream);

  std::unique_ptr<PagedCache> fresh;
  SequenceId first;
  ASSERT_OK(PagedCache::create(*machine_, {4, 64, 1, DType::kBFloat16}, &fresh));
  ASSERT_OK(fresh->add(&first));

  // A graph would repeat the copies from memory that has changed since. A cache that has appended
  // nothing yet must not break the capture by allocating.
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  expect_error(cache_->append(Batch{a}, Counts{1}, rows_.back().data(), stream),
               StatusCode::kInvalidArgument, {"stream is being captured"});
  expect_error(fresh->append(Batch{first}, Counts{1}, rows_.back().data(), stream),
               StatusCode::kInvalidArgument, {"stream is being captured"});
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  expect_contents(stream);
  cache_.reset();
  cudaStreamDestroy(stream);
}
#endif

INSTANTIATE_TEST_SUITE_P(Machines, PagedCacheTest,
                         testing::Values(MachineKind::kModel, MachineKind::kGpu),
                         [](const auto& test) {
                           return std::string(test.param == MachineKind::kModel ? "Model" : "Gpu");
                         });

}  // namespace
}  // namespace mla
