// Requests and schedulers: small cases worked out by hand, and what must be true after every step,
// whatever arrives.
#include "bench/service/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <set>

#include "bench/service/engine.h"
#include "reference/testing/data_generator.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

using Tokens = std::vector<GeneratedToken>;

std::unique_ptr<PagedScheduler> paged(const SchedulerLimits& limits) {
  std::unique_ptr<PagedScheduler> scheduler;
  const Status status = PagedScheduler::create(limits, &scheduler);
  EXPECT_OK(status);
  return scheduler;
}

std::unique_ptr<StaticScheduler> padded(const SchedulerLimits& limits) {
  std::unique_ptr<StaticScheduler> scheduler;
  const Status status = StaticScheduler::create(limits, &scheduler);
  EXPECT_OK(status);
  return scheduler;
}

Request request(int64_t id, int64_t prompt, int64_t output) {
  return {.id = id, .prompt = prompt, .output = output};
}

StepWork begin(Scheduler& scheduler) {
  StepWork work;
  const Status status = scheduler.begin_step(&work);
  EXPECT_OK(status);
  return work;
}

Tokens end(Scheduler& scheduler) {
  Tokens tokens;
  const Status status = scheduler.end_step(&tokens);
  EXPECT_OK(status);
  return tokens;
}

std::vector<int64_t> ids(const StepWork& work) {
  std::vector<int64_t> result;
  for (const SequenceWork& sequence : work.sequences) result.push_back(sequence.request);
  return result;
}

// ---- requests ----

TEST(Requests, AreTheSameEverywhere) {
  RequestStream stream({10, {1000, 500}, {100, 50}}, 1);
  const Request first = stream.take(), second = stream.take();
  EXPECT_EQ(first.id, 0);
  EXPECT_EQ(second.id, 1);
  EXPECT_LT(first.arrival, second.arrival);
  // Golden: a change of these changes every recorded scenario.
  EXPECT_EQ(first.prompt, 808);
  EXPECT_EQ(first.output, 74);
  EXPECT_EQ(second.prompt, 836);
  EXPECT_EQ(second.output, 217);
}

TEST(Requests, HaveTheirRateMeansAndDeviations) {
  constexpr int kCount = 20000;
  RequestStream stream({5, {1000, 500}, {200, 100}}, 3);
  double last = 0, prompts = 0, outputs = 0, squares = 0;
  for (int i = 0; i < kCount; ++i) {
    const Request one = stream.take();
    ASSERT_GT(one.arrival, last);
    last = one.arrival;
    prompts += double(one.prompt);
    squares += double(one.prompt) * double(one.prompt);
    outputs += double(one.output);
  }
  const double mean = prompts / kCount;
  EXPECT_NEAR(last / kCount, 0.2, 0.2 * 0.03);
  EXPECT_NEAR(mean, 1000, 20);
  EXPECT_NEAR(std::sqrt(squares / kCount - mean * mean), 500, 30);
  EXPECT_NEAR(outputs / kCount, 200, 4);
}

TEST(Requests, UnderWayAreLongerOnesAtUniformProgress) {
  // Longer requests are more likely to be under way: the mean is E[n^2] / E[n] = 200 (1 + 0.25).
  const auto requests = requests_under_way({5, {1000, 500}, {200, 100}}, 20000, 3);
  double outputs = 0, progress = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    const Request& one = requests[i];
    ASSERT_EQ(one.id, int64_t(i));
    ASSERT_LT(one.generated, one.output);
    ASSERT_LE(one.arrival, 0);
    outputs += double(one.output) / double(requests.size());
    progress += double(one.generated) / double(one.output) / double(requests.size());
  }
  EXPECT_NEAR(outputs, 250, 6);
  EXPECT_NEAR(progress, 0.5, 0.02);
}

TEST(Requests, PrefixesStandBeforeThePromptAndAreAsLikelyAsEachOther) {
  const Workload plain{5, {100, 50}, {20, 10}};
  Workload shared = plain;
  shared.prefixes = {4, 1000};
  RequestStream a(plain, 3), b(shared, 3);
  std::map<int64_t, int> counts;
  for (int i = 0; i < 4000; ++i) {
    const Request one = a.take(), other = b.take();
    ASSERT_EQ(one.prefix, -1);
    ASSERT_EQ(other.prompt, one.prompt + 1000);  // everything else is drawn as before
    ASSERT_EQ(other.arrival, one.arrival);
    ASSERT_EQ(other.prefix_tokens, 1000);
    ++counts[other.prefix];
  }
  EXPECT_EQ(counts.size(), 4u);
  for (const auto& [prefix, count] : counts) {
    EXPECT_GE(prefix, 0);
    EXPECT_NEAR(count, 1000, 120);
  }
  for (const Request& one : requests_under_way(shared, 50, 3)) {
    EXPECT_GE(one.prompt, 1000);
    EXPECT_LT(one.prefix, 4);
  }
  EXPECT_FALSE(validate(Workload{1, {0, 0}, {1, 0}, {-1, 0}}).ok());
  EXPECT_FALSE(validate(Workload{1, {0, 0}, {1, 0}, {1, -1}}).ok());
}

TEST(Requests, PartsHaveEachRequestOnce) {
  const Workload workload{5, {100, 50}, {20, 10}, {3, 64}};
  RequestStream all(workload, 7);
  RequestStream few(workload, 7, 0, {0, 0.25}), rest(workload, 7, 0, {0.25, 1});
  int of_few = 0;
  for (int i = 0; i < 2000; ++i) {
    const Request one = all.take();
    RequestStream& mine = few.peek().arrival < rest.peek().arrival ? few : rest;
    of_few += &mine == &few;
    const Request same = mine.take();
    ASSERT_EQ(same.id, one.id);
    ASSERT_EQ(same.arrival, one.arrival);
    ASSERT_EQ(same.prompt, one.prompt);
    ASSERT_EQ(same.prefix, one.prefix);
  }
  EXPECT_NEAR(of_few, 500, 70);
}

TEST(Requests, RefuseWhatIsNoWorkload) {
  EXPECT_OK(validate(Workload{1, {0, 0}, {1, 0}}));
  EXPECT_FALSE(validate(Workload{-1, {0, 0}, {1, 0}}).ok());
  EXPECT_FALSE(validate(Workload{0, {0, 0}, {1, 0}}).ok());
  EXPECT_FALSE(validate(Workload{NAN, {0, 0}, {1, 0}}).ok());
  EXPECT_FALSE(validate(Workload{1, {-1, 0}, {1, 0}}).ok());
  EXPECT_FALSE(validate(Workload{1, {0, -1}, {1, 0}}).ok());
  EXPECT_FALSE(validate(Workload{1, {0, 0}, {0, 0}}).ok());
  EXPECT_FALSE(validate(Workload{1, {0, 0}, {1, INFINITY}}).ok());
}

// ---- rejections ----

TEST(Rejections, HaveTheirReasons) {
  const auto scheduler = paged({.num_pages = 4, .max_batch = 2, .max_length = 300, .max_queue = 2});
  const auto arrive = [&](int64_t prompt, int64_t output) {
    return scheduler->arrive(request(0, prompt, output));
  };
  EXPECT_EQ(arrive(10, 0), Rejection::kNoOutput);
  EXPECT_EQ(arrive(10, -1), Rejection::kNoOutput);
  EXPECT_EQ(arrive(-1, 10), Rejection::kNegativePrompt);
  EXPECT_EQ(arrive(300, 1), Rejection::kTooLong);
  EXPECT_EQ(arrive(INT64_MAX, INT64_MAX), Rejection::kTooLong);
  EXPECT_EQ(arrive(256, 1), Rejection::kNeverFits);
  EXPECT_EQ(arrive(255, 1), Rejection::kNone);
  EXPECT_EQ(arrive(0, 1), Rejection::kNone);
  EXPECT_EQ(arrive(0, 1), Rejection::kQueueFull);
  const RequestCounts counts = scheduler->counts();
  EXPECT_EQ(counts.arrived, 9);
  EXPECT_EQ(counts.queued, 2);
  EXPECT_EQ(counts.rejected_total(), 7);
  EXPECT_EQ(counts.rejected[size_t(Rejection::kNoOutput)], 2);
  EXPECT_EQ(counts.rejected[size_t(Rejection::kQueueFull)], 1);
}

TEST(Rejections, KeepTo2To30Tokens) {
  const auto scheduler = paged({.num_pages = (1 << 24) + 1});
  EXPECT_EQ(scheduler->arrive(request(0, 1 << 30, 1)), Rejection::kTooLong);
  EXPECT_EQ(scheduler->arrive(request(0, (1 << 30) - 1, 1)), Rejection::kNone);
}

TEST(Rejections, LimitsAreChecked) {
  std::unique_ptr<PagedScheduler> scheduler;
  EXPECT_FALSE(PagedScheduler::create({.num_pages = 0}, &scheduler).ok());
  EXPECT_FALSE(PagedScheduler::create({.num_pages = 1, .max_batch = 0}, &scheduler).ok());
  EXPECT_FALSE(
      PagedScheduler::create({.num_pages = 1, .max_length = (1 << 30) + 1}, &scheduler).ok());
  EXPECT_FALSE(PagedScheduler::create({.num_pages = 1, .max_queue = 0}, &scheduler).ok());
  std::unique_ptr<StaticScheduler> fixed;
  const Status status = StaticScheduler::create({.num_pages = 3, .max_length = 256}, &fixed);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("do not hold one buffer"), std::string::npos);
}

// ---- the paged way by hand ----

TEST(Paged, AnEmptyPromptIsLegal) {
  const auto scheduler = paged({.num_pages = 1});
  scheduler->arrive(request(7, 0, 2));
  StepWork work = begin(*scheduler);
  ASSERT_EQ(work.sequences.size(), 1u);
  EXPECT_EQ(work.sequences[0].tokens_before, 0);
  EXPECT_EQ(work.sequences[0].appended, 1);
  EXPECT_EQ(work.sequences[0].decoded, 1);
  EXPECT_FALSE(end(*scheduler).at(0).last());
  work = begin(*scheduler);
  EXPECT_EQ(work.sequences.at(0).tokens_before, 1);
  EXPECT_TRUE(end(*scheduler).at(0).last());
  EXPECT_TRUE(begin(*scheduler).empty());
  EXPECT_EQ(scheduler->counts().finished, 1);
}

TEST(Paged, PreemptsTheYoungestWhichGoesOnWhereItWas) {
  // There are three pages, and three sequences of 60 + 10 tokens. The fifth new token of each needs
  // a second page.
  const auto scheduler = paged({.num_pages = 3, .max_batch = 8});
  for (int64_t id = 0; id < 3; ++id) scheduler->arrive(request(id, 60, 10));
  EXPECT_EQ(ids(begin(*scheduler)), (std::vector<int64_t>{0, 1, 2}));
  end(*scheduler);
  for (int i = 1; i < 4; ++i) {
    EXPECT_EQ(begin(*scheduler).longest(), 61 + i);
    end(*scheduler);
  }
  // Each has 64 tokens. 0 needs a page, so 2 is preempted; 1 needs one, too, and is itself the next
  // to be preempted.
  EXPECT_EQ(ids(begin(*scheduler)), (std::vector<int64_t>{0}));
  EXPECT_EQ(scheduler->counts().preemptions, 2);
  EXPECT_EQ(scheduler->counts().queued, 2);
  for (int i = 4; i < 10; ++i) {
    EXPECT_EQ(end(*scheduler).size(), 1u);
    const StepWork work = begin(*scheduler);
    if (i < 9) {
      EXPECT_EQ(ids(work), (std::vector<int64_t>{0}));
      continue;
    }
    EXPECT_EQ(ids(work), (std::vector<int64_t>{1}));  // 2 needs two pages, and one is left
    EXPECT_EQ(work.sequences[0].appended, 65);        // prompt, four generated, one new
    EXPECT_EQ(work.sequences[0].tokens_before, 0);
  }
  Tokens tokens = end(*scheduler);
  EXPECT_EQ(tokens.at(0).request.generated, 5);
}

TEST(Paged, NobodyOvertakes) {
  const auto scheduler = paged({.num_pages = 4, .max_batch = 8});
  scheduler->arrive(request(0, 100, 20));  // 2 pages
  scheduler->arrive(request(1, 150, 20));  // 3 pages: must wait
  scheduler->arrive(request(2, 1, 1));     // would fit
  EXPECT_EQ(ids(begin(*scheduler)), (std::vector<int64_t>{0}));
  EXPECT_EQ(scheduler->counts().queued, 2);
}

TEST(Paged, ARequestThatIsResumedOnlyGetsItsRemainingTokens) {
  const auto scheduler = paged({.num_pages = 4});
  scheduler->arrive({.id = 0, .prompt = 10, .output = 5, .generated = 3});
  EXPECT_EQ(begin(*scheduler).sequences.at(0).appended, 14);
  EXPECT_FALSE(end(*scheduler).at(0).last());
  begin(*scheduler);
  EXPECT_TRUE(end(*scheduler).at(0).last());
}

TEST(Paged, TheQueuesLimitDoesNotApplyToResumedRequests) {
  const auto scheduler = paged({.num_pages = 9, .max_batch = 8, .max_queue = 2});
  for (int64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(scheduler->resume({.id = i, .prompt = 10, .output = 5, .generated = 3}),
              Rejection::kNone);
  }
  EXPECT_EQ(scheduler->resume(request(5, 10, 0)), Rejection::kNoOutput);  // all other limits apply
  EXPECT_EQ(scheduler->arrive(request(6, 1, 1)), Rejection::kQueueFull);
  EXPECT_EQ(begin(*scheduler).sequences.size(), 5u);
}

// ---- shared prefixes ----

Request with_prefix(int64_t id, int64_t prefix, int64_t prefix_tokens, int64_t own,
                    int64_t output) {
  Request one = request(id, prefix_tokens + own, output);
  one.prefix = prefix;
  one.prefix_tokens = prefix_tokens;
  return one;
}

TEST(Prefixes, TheFirstBringsThemInAndOthersShareWholePages) {
  // Of 150 tokens, two whole pages are shared; each request has the rest for itself.
  const auto scheduler = paged({.num_pages = 20, .max_batch = 8});
  for (int64_t id = 0; id < 2; ++id) scheduler->arrive(with_prefix(id, 5, 150, 10, 3));
  scheduler->arrive(with_prefix(2, 6, 60, 10, 3));  // less than a page: nothing to share
  StepWork work = begin(*scheduler);
  ASSERT_EQ(work.sequences.size(), 3u);
  const SequenceWork &first = work.sequences[0], &second = work.sequences[1];
  EXPECT_EQ(first.tokens_before, 0);
  EXPECT_EQ(first.appended, 161);
  EXPECT_EQ(second.tokens_before, 128);
  EXPECT_EQ(second.appended, 33);
  EXPECT_EQ(second.decoded, 161);
  EXPECT_EQ(second.prefix, 5);
  EXPECT_EQ(second.prefix_tokens, 150);
  EXPECT_EQ(first.pages[0], second.pages[0]);
  EXPECT_EQ(first.pages[1], second.pages[1]);
  EXPECT_NE(first.pages[2], second.pages[2]);
  EXPECT_EQ(work.sequences[2].tokens_before, 0);
  EXPECT_EQ(scheduler->holding().pages, 2 + 1 + 1 + 2);
  end(*scheduler);
  work = begin(*scheduler);
  EXPECT_EQ(work.sequences[0].appended, 1);  // brought in once
  EXPECT_EQ(work.sequences[0].tokens_before, 161);
  end(*scheduler);
  begin(*scheduler);
  EXPECT_EQ(end(*scheduler).size(), 3u);
  // All have ended. The prefix stays, and the next one finds it.
  EXPECT_EQ(scheduler->holding().pages, 2);
  scheduler->arrive(with_prefix(3, 5, 150, 0, 1));
  EXPECT_EQ(begin(*scheduler).sequences.at(0).tokens_before, 128);
  end(*scheduler);
  const RequestCounts counts = scheduler->counts();
  EXPECT_EQ(counts.prompts, 4);
  EXPECT_EQ(counts.prompt_tokens, 160 + 160 + 70 + 150);
  EXPECT_EQ(counts.prefix_hits, 2);
  EXPECT_EQ(counts.prefix_hit_tokens, 2 * 128);
}

TEST(Prefixes, GoBeforeARunningRequestDoesAndTheLongestUnusedFirst) {
  const auto scheduler = paged({.num_pages = 6, .max_batch = 8});
  for (int64_t id = 0; id < 2; ++id) {  // two prefixes of two pages, one request each
    scheduler->arrive(with_prefix(id, id, 128, 0, 1));
    begin(*scheduler);
    end(*scheduler);
  }
  EXPECT_EQ(scheduler->holding().pages, 4);
  scheduler->arrive(with_prefix(2, 0, 128, 0, 1));  // 0 is used again
  begin(*scheduler);
  end(*scheduler);
  scheduler->arrive(request(3, 180, 20));  // needs 3 pages, 2 are free: prefix 1 goes, 0 stays
  EXPECT_EQ(begin(*scheduler).sequences.size(), 1u);
  EXPECT_EQ(scheduler->holding().pages, 2 + 3);
  for (int i = 1; i < 9; ++i) {
    end(*scheduler);
    begin(*scheduler);
  }
  end(*scheduler);
  scheduler->arrive(with_prefix(4, 0, 128, 62, 4));  // takes the last page
  EXPECT_EQ(begin(*scheduler).sequences.back().tokens_before, 128);
  end(*scheduler);
  EXPECT_EQ(begin(*scheduler).sequences.size(), 2u);
  EXPECT_EQ(scheduler->counts().preemptions, 0);
  end(*scheduler);
  // Request 4 needs another page. Prefix 0 is in use, so the youngest request must go. That is 4
  // itself, and prefix 0 goes with it.
  EXPECT_EQ(ids(begin(*scheduler)), (std::vector<int64_t>{3}));
  EXPECT_EQ(scheduler->counts().preemptions, 1);
  EXPECT_EQ(scheduler->counts().prefix_hits, 2);
  while (ids(begin(*scheduler)) == std::vector<int64_t>{3}) end(*scheduler);
  EXPECT_EQ(scheduler->counts().prefix_hits, 3)
      << "request 4 brought its prefix in again, which is no hit";
}

TEST(Prefixes, TheOneThatIsWantedStays) {
  const auto scheduler = paged({.num_pages = 5, .max_batch = 8});
  for (int64_t id = 0; id < 2; ++id) {
    scheduler->arrive(with_prefix(id, id, 128, 0, 1));
    begin(*scheduler);
    end(*scheduler);
  }
  scheduler->arrive(with_prefix(2, 0, 128, 70, 1));  // needs two pages, one is free
  EXPECT_EQ(begin(*scheduler).sequences.at(0).tokens_before, 128);
}

TEST(Prefixes, AsManyAreAdmittedAsPagesHold) {
  // Of five pages, two are shared by all, and each request needs one of its own.
  const auto scheduler = paged({.num_pages = 5, .max_batch = 8});
  for (int64_t id = 0; id < 4; ++id) scheduler->arrive(with_prefix(id, 0, 128, 10, 3));
  EXPECT_EQ(begin(*scheduler).sequences.size(), 3u);
}

TEST(Prefixes, OneThatNobodyUsesGoesInPlaceOfARequest) {
  const auto scheduler = paged({.num_pages = 3, .max_batch = 8});
  scheduler->arrive(with_prefix(0, 0, 64, 0, 1));
  begin(*scheduler);
  end(*scheduler);
  EXPECT_EQ(scheduler->holding().pages, 1);
  scheduler->arrive(request(1, 60, 9));  // needs a second page in its fifth step
  scheduler->arrive(request(2, 10, 9));
  for (int i = 0; i < 9; ++i) {
    EXPECT_EQ(begin(*scheduler).sequences.size(), 2u);
    end(*scheduler);
  }
  EXPECT_EQ(scheduler->counts().preemptions, 0);
  scheduler->arrive(with_prefix(3, 0, 64, 0, 1));  // brought in anew
  EXPECT_EQ(begin(*scheduler).sequences.at(0).tokens_before, 0);
  EXPECT_EQ(scheduler->counts().prefix_hits, 0);
}

TEST(Prefixes, OneThatNeedsAllPagesGetsThem) {
  const auto scheduler = paged({.num_pages = 5, .max_batch = 8});
  scheduler->arrive(with_prefix(0, 0, 256, 0, 1));
  begin(*scheduler);
  end(*scheduler);
  scheduler->arrive(with_prefix(1, 1, 256, 60, 4));  // needs all five pages: prefix 0 must go
  EXPECT_EQ(begin(*scheduler).sequences.at(0).appended, 317);
  for (int i = 0; i < 3; ++i) {
    end(*scheduler);
    EXPECT_EQ(begin(*scheduler).sequences.size(), 1u);
  }
  EXPECT_TRUE(end(*scheduler).at(0).last());
}

TEST(Prefixes, AreNotSharedIfNotWanted) {
  std::unique_ptr<PagedScheduler> scheduler;
  ASSERT_OK(PagedScheduler::create({.num_pages = 20, .max_batch = 8}, &scheduler, false));
  for (int64_t id = 0; id < 2; ++id) scheduler->arrive(with_prefix(id, 5, 128, 10, 3));
  const StepWork work = begin(*scheduler);
  for (const SequenceWork& sequence : work.sequences) {
    EXPECT_EQ(sequence.tokens_before, 0);
    EXPECT_EQ(sequence.appended, 139);
  }
  EXPECT_EQ(scheduler->holding().pages, 6);
  EXPECT_EQ(scheduler->counts().prefix_hits, 0);
}

/// Random arrivals with prefixes, in few pages. Every sequence must list its own pages and those of its prefix, whoever
/// brought that in; rows before tokens_before must have been written; and all requests must end.
void share_at_random(uint64_t seed, RequestCounts* sums) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  const auto random = [&](int64_t index, int64_t least, int64_t most) {
    return least + int64_t(generator::draw(counter_random::mix(seed + 1), index) %
                           uint64_t(most - least + 1));
  };
  const SchedulerLimits limits{.num_pages = int(random(1, 8, 40)),
                               .max_batch = int(random(2, 1, 20))};
  const auto scheduler = paged(limits);
  RequestStream stream(
      {double(random(3, 1, 40)), {60, 60}, {30, 20}, {random(4, 1, 4), random(5, 0, 300)}}, seed);
  constexpr int kArrivals = 60;
  int arrived = 0;
  using Key = std::pair<int64_t, int64_t>;    // whose row it is, and of which token
  std::map<int32_t, std::vector<Key>> cache;  // by page: what its rows hold
  for (int step = 0; step < 40000; ++step) {
    while (arrived < kArrivals && stream.peek().arrival < 0.05 * step) {
      scheduler->arrive(stream.take());
      ++arrived;
    }
    const StepWork work = begin(*scheduler);
    const auto key = [](const SequenceWork& sequence, int64_t token) {
      const bool shared = token < sequence.prefix_tokens;
      return Key(shared ? -1 - sequence.prefix : sequence.request, token);
    };
    std::map<int32_t, int> writers;
    for (const SequenceWork& sequence : work.sequences) {
      ASSERT_EQ(sequence.tokens_before + sequence.appended, sequence.decoded);
      for (int64_t token = sequence.tokens_before; token < sequence.decoded; ++token) {
        const int32_t page = sequence.pages[size_t(token / kDefaultPageSize)];
        auto& rows = cache[page];
        rows.resize(kDefaultPageSize, Key(-1, -1));
        rows[size_t(token % kDefaultPageSize)] = key(sequence, token);
        if (token % kDefaultPageSize == 0 || token == sequence.tokens_before) ++writers[page];
      }
    }
    for (const auto& [page, count] : writers) ASSERT_EQ(count, 1) << "two write page " << page;
    for (const SequenceWork& sequence : work.sequences) {
      for (int64_t token = 0; token < sequence.decoded; ++token) {
        const auto& rows = cache[sequence.pages[size_t(token / kDefaultPageSize)]];
        ASSERT_FALSE(rows.empty());
        ASSERT_EQ(rows[size_t(token % kDefaultPageSize)], key(sequence, token));
      }
    }
    ASSERT_LE(scheduler->holding().pages, limits.num_pages);
    if (work.empty() && arrived == kArrivals) break;
    if (!work.empty()) end(*scheduler);
  }
  const RequestCounts counts = scheduler->counts();
  EXPECT_EQ(counts.finished + counts.rejected_total(), kArrivals);
  sums->preemptions += counts.preemptions;
  sums->prefix_hits += counts.prefix_hits;
}

TEST(Prefixes, EverySequenceReadsItsOwnRowsWhateverArrives) {
  RequestCounts sums;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    ASSERT_NO_FATAL_FAILURE(share_at_random(seed, &sums));
  }
  EXPECT_GT(sums.preemptions, 200) << "page budgets were too large to show anything";
  EXPECT_GT(sums.prefix_hits, 3000);
}

// ---- static batches by hand ----

TEST(Static, ABatchEndsAsAWholeAndIsPaddedToItsLongest) {
  const auto scheduler = padded({.num_pages = 9, .max_batch = 8, .max_length = 256});
  EXPECT_EQ(scheduler->slots(), 2);
  scheduler->arrive(request(0, 10, 1));
  scheduler->arrive(request(1, 100, 3));
  scheduler->arrive(request(2, 5, 1));
  StepWork work = begin(*scheduler);
  EXPECT_EQ(ids(work), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(work.sequences[0].decoded, 101);
  EXPECT_EQ(work.sequences[0].appended, 11);
  EXPECT_EQ(work.sequences[1].pages.front(), 4);
  EXPECT_EQ(scheduler->holding().pages, 8);
  EXPECT_EQ(scheduler->holding().tokens, 11 + 101);
  EXPECT_EQ(end(*scheduler).size(), 2u);
  work = begin(*scheduler);
  EXPECT_EQ(ids(work), (std::vector<int64_t>{0, 1}));  // 0 has finished, and is decoded on
  EXPECT_EQ(work.sequences[0].decoded, 102);
  EXPECT_EQ(work.sequences[0].appended, 0);
  EXPECT_EQ(scheduler->holding().tokens, 102);
  EXPECT_EQ(end(*scheduler).size(), 1u);
  EXPECT_EQ(scheduler->counts().queued, 1);
  begin(*scheduler);
  EXPECT_EQ(end(*scheduler).size(), 1u);
  EXPECT_EQ(scheduler->holding().pages, 0);
  EXPECT_EQ(ids(begin(*scheduler)), (std::vector<int64_t>{2}));
}

// ---- what holds at every step ----

/// What arrived and what became of it, as the client sees it.
class Observer {
 public:
  void arrived(const Request& one, Rejection reason) {
    if (reason == Rejection::kNone) waiting_.emplace(one.id, one);
  }

  void began(const Scheduler& scheduler, const StepWork& work, bool first_come) {
    const RequestCounts counts = scheduler.counts();
    ASSERT_EQ(counts.arrived,
              counts.finished + counts.rejected_total() + counts.queued + counts.running);
    const std::vector<int64_t> now = ids(work);
    ASSERT_EQ(work.empty(), waiting_.empty()) << "nothing runs although requests wait";
    ASSERT_LE(int64_t(now.size()), scheduler.limits().max_batch);
    std::set<int32_t> pages;
    size_t listed = 0;
    for (const SequenceWork& sequence : work.sequences) {
      ASSERT_GE(int64_t(sequence.pages.size()), pages_for(sequence.decoded, kDefaultPageSize));
      pages.insert(sequence.pages.begin(), sequence.pages.end());
      listed += sequence.pages.size();
    }
    ASSERT_EQ(pages.size(), listed) << "a page belongs to two sequences";
    if (!pages.empty()) {
      ASSERT_GE(*pages.begin(), 0);
      ASSERT_LT(*pages.rbegin(), scheduler.limits().num_pages);
    }
    if (!first_come) return;
    // The requests that run are those that arrived first.
    auto expected = waiting_.begin();
    for (const int64_t id : now) ASSERT_EQ(id, (expected++)->first);
  }

  void ended(const Tokens& tokens) {
    for (const GeneratedToken& token : tokens) {
      const auto found = waiting_.find(token.request.id);
      ASSERT_NE(found, waiting_.end()) << "a token for nobody";
      Request& mine = found->second;
      ASSERT_EQ(++mine.generated, token.request.generated);
      ASSERT_EQ(token.last(), mine.generated == mine.output);
      if (token.last()) waiting_.erase(found);
    }
  }
  const std::map<int64_t, Request>& waiting() const { return waiting_; }

 private:
  std::map<int64_t, Request> waiting_;  // accepted, not finished
};

/// One run of random arrivals; at first there are more than can be served.
void run_at_random(uint64_t seed, int64_t* preemptions) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  const auto random = [&](int64_t index, int64_t least, int64_t most) {
    return least + int64_t(generator::draw(counter_random::mix(seed + 1), index) %
                           uint64_t(most - least + 1));
  };
  SchedulerLimits limits{.num_pages = int(random(1, 1, 40)),
                         .max_batch = int(random(2, 1, 20)),
                         .max_length = random(3, 50, 600)};
  if (random(4, 0, 1) == 1) limits.max_queue = random(5, 1, 12);
  const bool is_paged = seed % 3 != 0;
  if (!is_paged)
    limits.num_pages =
        int(std::max(pages_for(limits.max_length, kDefaultPageSize), random(1, 1, 90)));
  std::unique_ptr<Scheduler> scheduler;
  if (is_paged) {
    scheduler = paged(limits);
  } else {
    scheduler = padded(limits);
  }
  RequestStream stream(
      {double(random(6, 1, 40)), {double(random(7, 0, 200)), 150}, {double(random(8, 1, 80)), 60}},
      seed);
  Observer observer;
  constexpr int kArrivals = 60;
  int arrived = 0;
  for (int step = 0; step < 40000; ++step) {
    while (arrived < kArrivals && stream.peek().arrival < 0.05 * step) {
      const Request one = stream.take();
      observer.arrived(one, scheduler->arrive(one));
      ++arrived;
    }
    const StepWork work = begin(*scheduler);
    ASSERT_NO_FATAL_FAILURE(observer.began(*scheduler, work, is_paged));
    const Holding holding = scheduler->holding();
    if (is_paged) {
      int64_t pages = 0, tokens = 0;
      for (const SequenceWork& sequence : work.sequences) {
        const Request& mine = observer.waiting().at(sequence.request);
        ASSERT_EQ(sequence.decoded, mine.prompt + mine.generated + 1);
        ASSERT_EQ(sequence.tokens_before + sequence.appended, sequence.decoded);
        pages += pages_for(sequence.decoded, kDefaultPageSize);
        tokens += sequence.decoded;
      }
      ASSERT_EQ(holding.pages, pages);
      ASSERT_EQ(holding.tokens, tokens);
      ASSERT_LE(holding.pages, limits.num_pages);
    }
    if (work.empty()) {
      ASSERT_EQ(holding.pages, 0);
      if (arrived == kArrivals) break;
      continue;
    }
    const Tokens tokens = end(*scheduler);
    ASSERT_FALSE(tokens.empty()) << "a step without progress";
    ASSERT_NO_FATAL_FAILURE(observer.ended(tokens));
  }
  const RequestCounts counts = scheduler->counts();
  EXPECT_EQ(counts.arrived, kArrivals);
  EXPECT_EQ(counts.finished + counts.rejected_total(), kArrivals);
  EXPECT_TRUE(observer.waiting().empty());
  EXPECT_EQ(scheduler->holding().pages, 0);
  *preemptions += counts.preemptions;
}

TEST(Conservation, NothingIsLostWhateverArrives) {
  int64_t preemptions = 0;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    ASSERT_NO_FATAL_FAILURE(run_at_random(seed, &preemptions));
  }
  EXPECT_GT(preemptions, 1000) << "page budgets were too large to show anything";
}

// ---- steps that are not done again ----

class CountingEngine final : public Engine {
 public:
  Status step(const StepWork& work, double* seconds) override {
    ++steps;
    *seconds = double(work.longest());
    return {};
  }
  int steps = 0;
};

TEST(Reusing, TakesTheTimeOfASimilarStep) {
  CountingEngine engine;
  ReusingEngine reusing(engine, 0.05);
  const auto step = [&](size_t batch, int32_t length, int32_t appended) {
    StepWork work;
    work.sequences.assign(batch, SequenceWork{0, length - appended, appended, length, {}});
    double seconds = 0;
    EXPECT_OK(reusing.step(work, &seconds));
    return seconds;
  };
  EXPECT_EQ(step(2, 100, 90), 100);  // brings prompts in: it is done, and its time is not reused
  EXPECT_EQ(step(2, 101, 1), 101);
  EXPECT_EQ(step(2, 105, 1), 101);
  EXPECT_EQ(step(2, 106, 0), 101);  // 5 of 106 is within 5%
  EXPECT_EQ(step(2, 107, 1), 107);
  EXPECT_EQ(step(3, 101, 1), 101);  // another batch
  EXPECT_EQ(engine.steps, 4);
  EXPECT_EQ(reusing.timed(), 4);
  EXPECT_EQ(reusing.reused(), 2);
}

}  // namespace
}  // namespace mla::bench
