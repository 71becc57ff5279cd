#include "bench/service/scheduler.h"

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <utility>

#include "bench/service/checks.h"

namespace mla::bench {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 30;

Status no_host_memory() {
  return {StatusCode::kOutOfMemory, "no host memory for the scheduler"};
}

}  // namespace

const char* to_string(Rejection reason) {
  switch (reason) {
    case Rejection::kNone:
      return "none";
    case Rejection::kNoOutput:
      return "no_output";
    case Rejection::kNegativePrompt:
      return "negative_prompt";
    case Rejection::kTooLong:
      return "too_long";
    case Rejection::kNeverFits:
      return "never_fits";
    case Rejection::kQueueFull:
      return "queue_full";
  }
  return "unknown";
}

Status validate(const SchedulerLimits& limits) {
  constexpr int64_t kInt = (int64_t{1} << 31) - 1;
  MLA_RETURN_IF_ERROR(check_in("pages", limits.num_pages, 1, kInt));
  MLA_RETURN_IF_ERROR(check_in("max batch", limits.max_batch, 1, kInt));
  MLA_RETURN_IF_ERROR(check_in("max length", limits.max_length, 1, kMaxTokens));
  return check_in("max queue", limits.max_queue.value_or(1), 1, INT64_MAX);
}

int64_t RequestCounts::rejected_total() const {
  return std::accumulate(rejected.begin(), rejected.end(), int64_t{0});
}

int64_t StepWork::appended() const {
  int64_t sum = 0;
  for (const SequenceWork& sequence : sequences) sum += sequence.appended;
  return sum;
}

int64_t StepWork::decoded() const {
  int64_t sum = 0;
  for (const SequenceWork& sequence : sequences) sum += sequence.decoded;
  return sum;
}

int64_t StepWork::longest() const {
  int64_t most = 0;
  for (const SequenceWork& sequence : sequences) {
    most = std::max<int64_t>(most, sequence.decoded);
  }
  return most;
}

Rejection Scheduler::take(const Request& request, const std::optional<int64_t>& max_queue) {
  const auto reason = [&] {
    if (request.generated < 0 || request.output <= request.generated) return Rejection::kNoOutput;
    if (request.prompt < 0) return Rejection::kNegativePrompt;
    if (request.prompt > limits_.max_length ||
        request.output > limits_.max_length - request.prompt) {
      return Rejection::kTooLong;
    }
    if (pages_for(request.length(), kDefaultPageSize) > limits_.num_pages)
      return Rejection::kNeverFits;
    if (max_queue && static_cast<int64_t>(queue_.size()) >= *max_queue) {
      return Rejection::kQueueFull;
    }
    return Rejection::kNone;
  }();
  ++counts_.arrived;
  if (reason == Rejection::kNone) {
    queue_.push_back(request);
  } else {
    ++counts_.rejected[static_cast<size_t>(reason)];
  }
  return reason;
}

RequestCounts Scheduler::counts() const {
  RequestCounts counts = counts_;
  counts.queued = static_cast<int64_t>(queue_.size());
  counts.running = running();
  return counts;
}

Status Scheduler::nothing_runs() const {
  if (queue_.empty()) return {};
  return {StatusCode::kUnavailable,
          "request " + std::to_string(queue_.front().id) +
              " waits while nothing runs, which is a fault of the scheduler"};
}

// ---- paged ----

Status PagedScheduler::create(const SchedulerLimits& limits,
                              std::unique_ptr<PagedScheduler>* scheduler, bool share) {
  MLA_RETURN_IF_ERROR(validate(limits));
  std::unique_ptr<PagedScheduler> result(new (std::nothrow) PagedScheduler(limits));
  if (result == nullptr) return no_host_memory();
  result->share_ = share;
  MLA_RETURN_IF_ERROR(PageTable::create(limits.num_pages, kDefaultPageSize, &result->table_));
  *scheduler = std::move(result);
  return {};
}

/// @param needed  the pages that the running sequences' next tokens take
Status PagedScheduler::make_room(int64_t* needed) {
  const auto takes_page = [&](const Running& running) {
    return table_.find(running.sequence)->tokens % kDefaultPageSize == 0;
  };
  *needed = std::count_if(running_.begin(), running_.end(), takes_page);
  while (*needed > table_.free_pages()) {
    bool dropped = false;
    MLA_RETURN_IF_ERROR(drop_unused_prefix(-1, &dropped));
    if (dropped) continue;
    const Running& youngest = running_.back();
    if (takes_page(youngest)) --*needed;
    queue_.push_front(youngest.request);
    MLA_RETURN_IF_ERROR(table_.free(youngest.sequence));
    running_.pop_back();
    ++counts_.preemptions;
  }
  return {};
}

/// Whole pages of the prefix; a page that the request's own tokens end is not shared.
int64_t PagedScheduler::shared_pages(const Request& request) const {
  return share_ && request.prefix >= 0 ? request.prefix_tokens / kDefaultPageSize : 0;
}

/// Frees the kept prefix that was longest not used, of those that only the books list.
/// @param but  not this one
Status PagedScheduler::drop_unused_prefix(int64_t but, bool* dropped) {
  auto oldest = prefixes_.end();
  for (auto one = prefixes_.begin(); one != prefixes_.end(); ++one) {
    const bool used = table_.references(table_.find(one->second.sequence)->pages.front()) > 1;
    if (used || one->first == but) continue;
    if (oldest == prefixes_.end() || one->second.last_use < oldest->second.last_use) oldest = one;
  }
  *dropped = oldest != prefixes_.end();
  if (!*dropped) return {};
  MLA_RETURN_IF_ERROR(table_.free(oldest->second.sequence));
  prefixes_.erase(oldest);
  return {};
}

/// An empty sequence, or one that has its prefix's pages; pages that are missing for those are taken.
Status PagedScheduler::begin_sequence(Running* running) {
  const Request& request = running->request;
  const int64_t pages = shared_pages(request);
  ++counts_.prompts;
  counts_.prompt_tokens += request.prompt;
  if (pages == 0) return table_.add(&running->sequence);
  const auto tokens = static_cast<int32_t>(pages * kDefaultPageSize);
  auto [prefix, is_new] = prefixes_.try_emplace(request.prefix);
  prefix->second.last_use = ++admissions_;
  running->brings_prefix = is_new;
  if (is_new) {
    MLA_RETURN_IF_ERROR(table_.add(&prefix->second.sequence));
    MLA_RETURN_IF_ERROR(table_.append({&prefix->second.sequence, 1}, {&tokens, 1}));
  } else {
    ++counts_.prefix_hits;
    counts_.prefix_hit_tokens += tokens;
  }
  return table_.fork(prefix->second.sequence, &running->sequence);
}

/// @param needed  pages that are spoken for
Status PagedScheduler::admit(int64_t needed) {
  while (!queue_.empty() && running() < limits_.max_batch) {
    const Request& next = queue_.front();
    const int64_t shared = shared_pages(next);
    const int64_t all = pages_for(next.prompt + next.generated + 1, kDefaultPageSize);
    const int64_t there = prefixes_.contains(next.prefix) ? shared : 0;
    if (needed + all - there > table_.free_pages()) {
      bool dropped = false;
      MLA_RETURN_IF_ERROR(drop_unused_prefix(next.prefix, &dropped));
      if (dropped) continue;
      break;
    }
    needed += all - shared;  // the prefix's pages are there, or taken at once
    Running admitted{next, {}};
    MLA_RETURN_IF_ERROR(begin_sequence(&admitted));
    running_.push_back(admitted);
    queue_.pop_front();
  }
  return {};
}

Status PagedScheduler::begin_step(StepWork* work) {
  work->sequences.clear();
  int64_t needed = 0;
  MLA_RETURN_IF_ERROR(make_room(&needed));
  MLA_RETURN_IF_ERROR(admit(needed));
  if (running_.empty()) return nothing_runs();
  ids_.clear();
  tokens_.clear();
  for (const Running& running : running_) {
    const Request& request = running.request;
    const int32_t before = table_.find(running.sequence)->tokens;
    ids_.push_back(running.sequence);
    tokens_.push_back(static_cast<int32_t>(request.prompt + request.generated + 1) - before);
  }
  MLA_RETURN_IF_ERROR(table_.append(ids_, tokens_));
  for (size_t i = 0; i < running_.size(); ++i) {
    const Sequence& sequence = *table_.find(ids_[i]);
    const Request& request = running_[i].request;
    const bool brings_all = std::exchange(running_[i].brings_prefix, false);
    const int32_t appended = brings_all ? sequence.tokens : tokens_[i];
    work->sequences.push_back({request.id, sequence.tokens - appended, appended, sequence.tokens,
                               sequence.pages, request.prefix, request.prefix_tokens});
  }
  return {};
}

Status PagedScheduler::end_step(std::vector<GeneratedToken>* tokens) {
  tokens->clear();
  size_t kept = 0;
  for (Running& running : running_) {
    ++running.request.generated;
    tokens->push_back({running.request});
    if (tokens->back().last()) {
      MLA_RETURN_IF_ERROR(table_.free(running.sequence));
      ++counts_.finished;
    } else {
      running_[kept++] = running;
    }
  }
  running_.resize(kept);
  return {};
}

Holding PagedScheduler::holding() const {
  const PageStatistics statistics = table_.statistics();
  return {statistics.pages_used, statistics.tokens_stored};
}

// ---- static ----

Status StaticScheduler::create(const SchedulerLimits& limits,
                               std::unique_ptr<StaticScheduler>* scheduler) {
  MLA_RETURN_IF_ERROR(validate(limits));
  const int64_t pages_a_slot = pages_for(limits.max_length, kDefaultPageSize);
  const int64_t slots = std::min<int64_t>(limits.max_batch, limits.num_pages / pages_a_slot);
  if (slots == 0) {
    return {StatusCode::kInvalidArgument,
            fmt::format("pages = {} do not hold one buffer of {} tokens, the largest length",
                        limits.num_pages, limits.max_length)};
  }
  try {
    std::unique_ptr<StaticScheduler> result(new StaticScheduler(limits));
    result->slots_ = slots;
    result->pages_.resize(static_cast<size_t>(slots * pages_a_slot));
    std::iota(result->pages_.begin(), result->pages_.end(), 0);
    *scheduler = std::move(result);
  } catch (const std::bad_alloc&) {
    return no_host_memory();
  }
  return {};
}

int64_t StaticScheduler::running() const {
  return std::count_if(batch_.begin(), batch_.end(),
                       [](const Slot& slot) { return !slot.finished(); });
}

Status StaticScheduler::begin_step(StepWork* work) {
  work->sequences.clear();
  const bool new_batch = batch_.empty();
  if (new_batch) {
    while (!queue_.empty() && static_cast<int64_t>(batch_.size()) < slots_) {
      batch_.push_back({queue_.front(), 0});
      queue_.pop_front();
    }
  }
  if (batch_.empty()) return {};
  if (new_batch) ++batches_;
  const auto pages_a_slot = static_cast<size_t>(pages_for(limits_.max_length, kDefaultPageSize));
  int32_t longest = 0;
  for (size_t i = 0; i < batch_.size(); ++i) {
    auto& [request, tokens] = batch_[i];
    const int32_t before = tokens;
    if (!batch_[i].finished()) {
      tokens = static_cast<int32_t>(request.prompt + request.generated + 1);
    }
    longest = std::max(longest, tokens);
    work->sequences.push_back({request.id, before, tokens - before, 0,
                               std::span(pages_).subspan(i * pages_a_slot, pages_a_slot),
                               request.prefix, request.prefix_tokens});
  }
  longest_ = std::max<int64_t>(longest_, longest);
  for (SequenceWork& sequence : work->sequences) sequence.decoded = longest;
  return {};
}

Status StaticScheduler::end_step(std::vector<GeneratedToken>* tokens) {
  tokens->clear();
  for (Slot& slot : batch_) {
    if (slot.finished()) continue;
    ++slot.request.generated;
    tokens->push_back({slot.request});
    if (slot.finished()) ++counts_.finished;
  }
  if (running() == 0) batch_.clear();
  return {};
}

Holding StaticScheduler::holding() const {
  Holding holding;
  for (const Slot& slot : batch_) {
    holding.pages += pages_for(limits_.max_length, kDefaultPageSize);
    if (!slot.finished()) holding.tokens += slot.tokens;
  }
  return holding;
}

}  // namespace mla::bench
