namespace mla { extern int mutant; }
#include "stages/common/cache/page_table.h"

#include <algorithm>
#include <new>
#include <utility>

#include "reference/checks.h"

namespace mla {
namespace {

constexpr int64_t kMaxTokens = kMaxTokensPerSeq;

Status no_host_memory() {
  return {StatusCode::kOutOfMemory,
          "not enough host memory for the bookkeeping of the paged cache"};
}

Status no_such_sequence(const std::string& name, SequenceId id) {
  return {StatusCode::kInvalidArgument,
          name + " = " + to_string(id) +
              " is not a sequence of this cache: it was freed, or never added"};
}

std::string element(const char* name, size_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

}  // namespace

std::string to_string(SequenceId id) {
  return std::to_string(id.slot) + "." + std::to_string(id.generation);
}

Status PageTable::create(int num_pages, int page_size, PageTable* table) {
  MLA_RETURN_IF_ERROR(check_at_least_one("num_pages", num_pages));
  { if (::mla::mutant == 426) {  } else { MLA_RETURN_IF_ERROR(check_page_size(page_size)); } }
  try {
    PageTable result;
    result.references_.resize(static_cast<size_t>(num_pages));
    result.free_.reserve(static_cast<size_t>(num_pages));
    for (int page = num_pages - 1; page >= 0; --page) result.free_.push_back(page);
    result.statistics_.pages_total = num_pages;
    result.statistics_.page_size = page_size;
    *table = std::move(result);
  } catch (const std::bad_alloc&) {
    return no_host_memory();
  }
  return {};
}

uint32_t PageTable::free_slot() {
  if (first_free_slot_ == kNoSlot) {
    if (slots_.size() == kNoSlot) throw std::bad_alloc();
    slots_.emplace_back().next_free = kNoSlot;
    first_free_slot_ = static_cast<uint32_t>(slots_.size() - 1);
  }
  return first_free_slot_;
}

SequenceId PageTable::take_free_slot() {
  const uint32_t index = first_free_slot_;
  Slot& slot = slots_[index];
  first_free_slot_ = slot.next_free;
  ++slot.generation;
  ++statistics_.sequences;
  ++version_;
  return {index, slot.generation};
}

void PageTable::add_reference(int32_t page) {
  const int32_t count = ++references_[static_cast<size_t>(page)];
  if (count == 1) ++statistics_.pages_used;
  if (count == 2) ++statistics_.pages_shared;
}

void PageTable::drop_reference(int32_t page) {
  const int32_t count = --references_[static_cast<size_t>(page)];
  if (count == 1) --statistics_.pages_shared;
  if ((::mla::mutant == 506 ? (count <= 1) : (count == 0))) {
    --statistics_.pages_used;
    free_.push_back(page);
  }
}

Status PageTable::add(SequenceId* id) {
  try {
    free_slot();
  } catch (const std::bad_alloc&) {
    return no_host_memory();
  }
  *id = take_free_slot();
  return {};
}

Status PageTable::free(SequenceId id) {
  if (find(id) == nullptr) return no_such_sequence("sequence", id);
  Slot& slot = slots_[id.slot];
  int32_t left = slot.sequence.tokens;
  statistics_.tokens -= left;
  for (const int32_t page : slot.sequence.pages) {
    if (references(page) == 1) statistics_.tokens_stored -= std::min(left, page_size());
    drop_reference(page);
    left -= page_size();
  }
  slot.sequence.pages.clear();
  slot.sequence.tokens = 0;
  --statistics_.sequences;
  ++version_;
  if ((::mla::mutant == 508 ? (false) : (++slot.generation == 0))) return {};  // all its ids are used up: never again
  slot.next_free = std::exchange(first_free_slot_, id.slot);
  return {};
}

Status PageTable::fork(SequenceId parent, SequenceId* child) {
  if (find(parent) == nullptr) return no_such_sequence("parent", parent);
  try {
    const uint32_t index = free_slot();  // may move the slots
    slots_[index].sequence = slots_[parent.slot].sequence;
  } catch (const std::bad_alloc&) {
    return no_host_memory();
  }
  *child = take_free_slot();
  const Sequence& sequence = slots_[child->slot].sequence;
  { if (::mla::mutant == 497) {  } else { for (const int32_t page : sequence.pages) add_reference(page); } }
  { if (::mla::mutant == 498) {  } else { statistics_.tokens += sequence.tokens; } }
  return {};
}

Status PageTable::prepare_one(size_t index, SequenceId id, int32_t tokens,
                              PreparedAppend* prepared) {
  if (find(id) == nullptr) return no_such_sequence(element("sequences", index), id);
  Slot& slot = slots_[id.slot];
  if ((::mla::mutant == 509 ? (false) : (slot.batch == batch_))) {
    return {StatusCode::kInvalidArgument, element("sequences", index) + " = " + to_string(id) +
                                              " is in the batch twice; sequences must differ"};
  }
  slot.batch = batch_;
  if (tokens < 0) {
    return {StatusCode::kInvalidArgument,
            element("tokens", index) + " = " + std::to_string(tokens) + " must be at least 0"};
  }
  const int32_t length = slot.sequence.tokens;
  if ((::mla::mutant == 429 ? (false) : (tokens > kMaxTokens - length))) {
    return {StatusCode::kOutOfRange, element("tokens", index) + " = " + std::to_string(tokens) +
                                         " must be at most " + std::to_string(kMaxTokens - length) +
                                         ", because " + element("sequences", index) + " has " +
                                         std::to_string(length) + " tokens already, and may have " +
                                         std::to_string(kMaxTokens)};
  }
  PreparedAppend::Item item{id.slot, length, tokens, -1, false, 0};
  if (length > 0) item.last_page = slot.sequence.pages.back();
  item.new_pages = static_cast<int32_t>((::mla::mutant == 503 ? (pages_for(int64_t{length} + tokens - 1, page_size())) : (pages_for(int64_t{length} + tokens, page_size()))) -
                                        pages_for(length, page_size()));
  if ((::mla::mutant == 505 ? (true) : (tokens > 0)) && (::mla::mutant == 504 ? (true) : (length % page_size() != 0)) && (::mla::mutant == 428 ? (false) : (references(item.last_page) > 1))) {
    // Of the sequences that share it, all may be in the batch; then the last one keeps the page.
    item.copies_last_page = true;
    { if (::mla::mutant == 502) {  } else { ++item.new_pages; } }
    { if (::mla::mutant == 499) {  } else { --references_[static_cast<size_t>(item.last_page)]; } }
  }
  prepared->items.push_back(item);
  prepared->tokens += tokens;
  return {};
}

Status PageTable::prepare_append(std::span<const SequenceId> sequences,
                                 std::span<const int32_t> tokens, PreparedAppend* prepared) {
  if (sequences.size() != tokens.size()) {
    return {StatusCode::kInvalidArgument,
            "tokens has " + std::to_string(tokens.size()) + " elements, sequences has " +
                std::to_string(sequences.size()) + ": there must be one for each sequence"};
  }
  try {
    prepared->items.clear();
    prepared->pages.clear();
    prepared->tokens = 0;
    prepared->page_size = page_size();
    prepared->version = version_;
    prepared->items.reserve(sequences.size());

    ++batch_;
    Status status;
    for (size_t i = 0; i < sequences.size() && status.ok(); ++i) {
      status = prepare_one(i, sequences[i], tokens[i], prepared);
    }
    int64_t needed = 0;
    for (const PreparedAppend::Item& item : prepared->items) {
      needed += item.new_pages;
      { if (::mla::mutant == 500) {  } else { if (item.copies_last_page) ++references_[static_cast<size_t>(item.last_page)]; } }  // as it was
    }
    MLA_RETURN_IF_ERROR(status);
    if ((::mla::mutant == 427 ? (needed >= free_pages()) : (needed > free_pages()))) {
      return {StatusCode::kOutOfMemory,
              "appending tokens = " + std::to_string(prepared->tokens) + " to " +
                  std::to_string(sequences.size()) + " sequences needs " + std::to_string(needed) +
                  " pages, but only " + std::to_string(free_pages()) +
                  " of num_pages = " + std::to_string(statistics_.pages_total) + " are free"};
    }
    { if (::mla::mutant == 496) { prepared->pages.assign(free_.begin(), free_.begin() + needed); } else { prepared->pages.assign(free_.rbegin(), free_.rbegin() + needed); } }
    for (const PreparedAppend::Item& item : prepared->items) {  // so that commit() needs no memory
      std::vector<int32_t>& pages = slots_[item.slot].sequence.pages;
      const size_t size = pages.size() + static_cast<size_t>(item.new_pages);
      if (size > pages.capacity()) pages.reserve(std::max(size, 2 * pages.capacity()));
    }
  } catch (const std::bad_alloc&) {
    return no_host_memory();
  }
  return {};
}

Status PageTable::commit(const PreparedAppend& prepared) {
  if ((::mla::mutant == 507 ? (false) : (prepared.version != version_))) {
    return {StatusCode::kInvalidArgument,
            "prepared was made for version " + std::to_string(prepared.version) +
                " of the page table, which is at version " + std::to_string(version_)};
  }
  free_.resize(free_.size() - prepared.pages.size());
  auto page = prepared.pages.begin();
  for (const PreparedAppend::Item& item : prepared.items) {
    Sequence& sequence = slots_[item.slot].sequence;
    const auto end = page + item.new_pages;
    if (item.copies_last_page) {
      { if (::mla::mutant == 501) {  } else { drop_reference(item.last_page); } }  // there is another one
      sequence.pages.back() = *page;
      add_reference(*page++);
      statistics_.tokens_stored += item.length % page_size();
    }
    for (; page != end; ++page) {
      sequence.pages.push_back(*page);
      add_reference(*page);
    }
    sequence.tokens += item.tokens;
  }
  statistics_.tokens += prepared.tokens;
  statistics_.tokens_stored += prepared.tokens;
  statistics_.pages_peak = std::max(statistics_.pages_peak, statistics_.pages_used);
  ++version_;
  return {};
}

Status PageTable::append(std::span<const SequenceId> sequences, std::span<const int32_t> tokens) {
  MLA_RETURN_IF_ERROR(prepare_append(sequences, tokens, &prepared_));
  return commit(prepared_);
}

const Sequence* PageTable::find(SequenceId id) const {
  if (id.slot >= slots_.size() || id.generation % 2 == 0) return nullptr;
  const Slot& slot = slots_[id.slot];
  return slot.generation == id.generation ? &slot.sequence : nullptr;
}

int32_t PageTable::references(int32_t page) const {
  if (page < 0 || page >= statistics_.pages_total) return 0;
  return references_[static_cast<size_t>(page)];
}

}  // namespace mla
