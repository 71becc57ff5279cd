/// @file
/// Who decodes in the next step. Pure logic: no device, no clock; time comes in only as the order
/// of the calls.
///
/// Two schedulers behind one interface: PagedScheduler, continuous batching over a paged cache, and
/// StaticScheduler, the traditional way, whole batches in contiguous buffers of the largest length.
///
/// At any moment: arrived = finished + rejected + queued + running.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "bench/service/requests.h"
#include "stages/common/cache/page_table.h"

namespace mla::bench {

/// Why a request is not taken.
enum class Rejection {
  kNone,
  kNoOutput,        ///< Nothing (left) to generate.
  kNegativePrompt,  ///< Less than no tokens.
  kTooLong,         ///< Prompt and output are over the largest length.
  kNeverFits,       ///< They need more pages than there are.
  kQueueFull,
};
inline constexpr size_t kRejections = 6;
/// "no_output", "too_long", ...
const char* to_string(Rejection reason);

/// What both schedulers keep to.
struct SchedulerLimits {
  int num_pages = 0;             ///< Of 64 tokens, >= 1
  int max_batch = 1;             ///< Sequences in a step, >= 1
  int64_t max_length = 1 << 30;  ///< Tokens of a sequence, 1 ... 2^30
  std::optional<int64_t>
      max_queue{};  ///< >= 1; none: unbounded. Who is preempted returns regardless.
};

/// @return kInvalidArgument, naming the limit, its value and what is allowed
Status validate(const SchedulerLimits& limits);

/// Where every request is.
struct RequestCounts {
  int64_t arrived = 0;
  int64_t finished = 0;
  std::array<int64_t, kRejections> rejected{};  ///< By reason
  int64_t queued = 0;
  int64_t running = 0;
  int64_t preemptions = 0;  ///< A request may be preempted more than once.
  /// @name Shared prefixes, of the paged way
  /// Prompts that came in (again after a preemption), and their tokens; those that found their prefix in
  /// the cache, and the tokens that were found.
  /// @{
  int64_t prompts = 0, prompt_tokens = 0;
  int64_t prefix_hits = 0, prefix_hit_tokens = 0;
  /// @}
  int64_t rejected_total() const;
};

/// One sequence of a step.
struct SequenceWork {
  int64_t request = 0;             ///< Its id
  int32_t tokens_before = 0;       ///< In the cache before the step
  int32_t appended = 0;            ///< Rows to be appended: 1, or more where a prompt comes in
  int32_t decoded = 0;             ///< Length that is decoded: its own, or padded
  std::span<const int32_t> pages;  ///< Valid until the step ends
  int64_t prefix = -1;             ///< As Request has them
  int64_t prefix_tokens = 0;
};

/// One step: rows to append, then a decode of one token for each sequence.
struct StepWork {
  std::vector<SequenceWork> sequences;
  bool empty() const { return sequences.empty(); }
  int64_t appended() const;  ///< Rows, all sequences
  int64_t decoded() const;   ///< Tokens that are attended to, padding included
  int64_t longest() const;   ///< Of the decoded lengths
};

/// A token that a step has made.
struct GeneratedToken {
  Request request;  ///< As of after the token: `generated` counts it.
  bool last() const { return request.generated == request.output; }
};

/// What is held of the memory right now.
struct Holding {
  int64_t pages = 0;   ///< That nobody else can use
  int64_t tokens = 0;  ///< Rows of those that hold a token of an unfinished request
};

/// Takes requests, says what a step decodes, gives out the tokens. Calls: arrive()*, begin_step(),
/// arrive()*, end_step(), ...
class Scheduler {
 public:
  virtual ~Scheduler() = default;
  /// Queues a request, or counts it as rejected.
  Rejection arrive(const Request& request) { return take(request, limits_.max_queue); }
  /// The same for a request that was admitted before time began, to which the queue's limit does not apply.
  Rejection resume(const Request& request) { return take(request, std::nullopt); }
  /// Fills the batch and enters the new tokens in the books. Empty work: nothing is queued or
  /// running, and there is no step to end.
  /// @return kUnavailable if requests wait and none of them can run, which is a fault of the
  /// scheduler
  virtual Status begin_step(StepWork* work) = 0;
  /// Every unfinished sequence of the step has one token more; those with all of theirs leave.
  virtual Status end_step(std::vector<GeneratedToken>* tokens) = 0;
  virtual Holding holding() const = 0;
  RequestCounts counts() const;
  const SchedulerLimits& limits() const { return limits_; }

 protected:
  explicit Scheduler(const SchedulerLimits& limits) : limits_(limits) {}
  virtual int64_t running() const = 0;
  Status nothing_runs() const;  // kUnavailable unless the queue is empty
  Rejection take(const Request& request, const std::optional<int64_t>& max_queue);

  SchedulerLimits limits_;
  std::deque<Request> queue_;
  RequestCounts counts_;  // but queued and running
};

/// Continuous batching. Before each step every running sequence gets room for one token. Where a
/// page is missing, the request that was admitted last gives way: its pages are freed and it
/// returns to the head of the queue with what it has generated. Then requests are admitted in
/// order, as long as pages and places last; prompt and what was generated before are appended
/// (anew). So all that run have arrived before all that wait, and the oldest one always gets on.
///
/// A prompt's prefix is shared in whole pages: the first request that has it brings its rows in, a
/// sequence of the prefix alone keeps them, and later requests are forks of it. Where pages are missing,
/// kept prefixes that no running request uses go first, the one that was longest not used before others.
class PagedScheduler final : public Scheduler {
 public:
  /// @param share  false: every prompt is appended whole
  /// @return kInvalidArgument of the limits; kOutOfMemory
  static Status create(const SchedulerLimits& limits, std::unique_ptr<PagedScheduler>* scheduler,
                       bool share = true);
  Status begin_step(StepWork* work) override;
  Status end_step(std::vector<GeneratedToken>* tokens) override;
  Holding holding() const override;
  const PageTable& table() const { return table_; }

 private:
  struct Running {
    Request request;
    SequenceId sequence;
    bool brings_prefix = false;  // its rows of the prefix are not in the cache yet
  };
  struct Prefix {
    SequenceId sequence;   // of its whole pages, nothing else
    int64_t last_use = 0;  // counted in admissions
  };
  using Scheduler::Scheduler;
  int64_t running() const override { return static_cast<int64_t>(running_.size()); }
  Status make_room(int64_t* needed);
  Status admit(int64_t needed);
  Status begin_sequence(Running* running);
  int64_t shared_pages(const Request& request) const;
  Status drop_unused_prefix(int64_t but, bool* dropped);

  PageTable table_;
  bool share_ = true;
  std::map<int64_t, Prefix> prefixes_;
  int64_t admissions_ = 0;
  std::vector<Running> running_;  // by admission
  std::vector<SequenceId> ids_;
  std::vector<int32_t> tokens_;
};

/// Static batches. Memory is cut into buffers of max_length tokens; a batch takes what waits when
/// the one before has finished to the last request, and every step decodes all its slots, finished
/// ones too, padded to the longest.
class StaticScheduler final : public Scheduler {
 public:
  /// @return kInvalidArgument of the limits, or if the pages do not hold one buffer
  static Status create(const SchedulerLimits& limits, std::unique_ptr<StaticScheduler>* scheduler);
  Status begin_step(StepWork* work) override;
  Status end_step(std::vector<GeneratedToken>* tokens) override;
  Holding holding() const override;
  /// Sequences of a batch, at most.
  int64_t slots() const { return slots_; }
  int64_t batches() const { return batches_; }  ///< Begun so far
  int64_t longest() const { return longest_; }  ///< Tokens that a sequence has been padded to

 private:
  struct Slot {
    Request request;
    int32_t tokens = 0;
    bool finished() const { return request.generated == request.output; }
  };
  using Scheduler::Scheduler;
  int64_t running() const override;

  int64_t slots_ = 0, batches_ = 0, longest_ = 0;
  std::vector<int32_t> pages_;  // 0, 1, 2, ...: a contiguous buffer is an identity block table
  std::vector<Slot> batch_;
};

}  // namespace mla::bench
