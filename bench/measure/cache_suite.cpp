#include "bench/measure/cache_suite.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <numeric>

#include "bench/measure/sampler.h"
#include "bench/measure/shapes.h"
#include "bench/measure/table.h"
#include "stages/common/cache/paged_cache.h"

namespace mla::bench {
namespace {

using Batch = std::vector<SequenceId>;
using Counts = std::vector<int32_t>;
using Entries = std::vector<GoogleEntry>;

double nanoseconds_since(WallClock::time_point begin) {
  return 1e9 * seconds_since(begin);
}

/// `count` new, empty sequences.
Status add_sequences(auto& cache, size_t count, Batch* batch) {
  batch->resize(count);
  for (SequenceId& id : *batch) MLA_RETURN_IF_ERROR(cache.add(&id));
  return {};
}

Status free_sequences(auto& cache, const Batch& batch) {
  for (const SequenceId id : batch) MLA_RETURN_IF_ERROR(cache.free(id));
  return {};
}

// ---- host: bookkeeping alone ----

/// Samples of one operation, in ns.
struct HostOperation {
  std::string name;
  std::string what;
  std::vector<double> samples;
};

constexpr int kPromptTokens = 4096;
constexpr size_t kPromptPages = kPromptTokens / kPageSize;

/// Prompts of 64 pages are appended, forked and freed.
Status time_pages(int rounds, std::vector<HostOperation>* results) {
  constexpr size_t kSequences = 256;
  HostOperation allocate{"allocate", "a page, by appends of 64 pages to a sequence", {}};
  HostOperation fork{"fork", "a sequence of 64 pages", {}};
  HostOperation free_fork{"free_of_fork", "a sequence of 64 pages that another one shares", {}};
  HostOperation free{"free", "a page, by sequences of 64 pages", {}};
  PageTable table;
  MLA_RETURN_IF_ERROR(PageTable::create(static_cast<int>(kSequences * kPromptPages), &table));
  Batch batch, forks(kSequences);
  const Counts prompt{kPromptTokens};
  for (int round = 0; round < rounds; ++round) {
    MLA_RETURN_IF_ERROR(add_sequences(table, kSequences, &batch));
    auto begin = WallClock::now();
    for (const SequenceId id : batch) MLA_RETURN_IF_ERROR(table.append({&id, 1}, prompt));
    allocate.samples.push_back(nanoseconds_since(begin) / (kSequences * kPromptPages));
    begin = WallClock::now();
    for (size_t i = 0; i < kSequences; ++i) MLA_RETURN_IF_ERROR(table.fork(batch[i], &forks[i]));
    fork.samples.push_back(nanoseconds_since(begin) / kSequences);
    begin = WallClock::now();
    MLA_RETURN_IF_ERROR(free_sequences(table, forks));
    free_fork.samples.push_back(nanoseconds_since(begin) / kSequences);
    begin = WallClock::now();
    MLA_RETURN_IF_ERROR(free_sequences(table, batch));
    free.samples.push_back(nanoseconds_since(begin) / (kSequences * kPromptPages));
  }
  for (HostOperation* operation : {&allocate, &free, &fork, &free_fork}) {
    results->push_back(std::move(*operation));
  }
  return {};
}

/// One token to each of a batch, again and again: every 64th append of a sequence takes a page.
Status time_appends(size_t batch_size, int rounds, std::vector<HostOperation>* results) {
  constexpr int kSteps = 128;
  HostOperation append{"append_b" + std::to_string(batch_size),
                       "one token to each of " + std::to_string(batch_size),
                       {}};
  PageTable table;
  MLA_RETURN_IF_ERROR(PageTable::create(static_cast<int>(batch_size) * 8, &table));
  const Counts one(batch_size, 1);
  for (int round = 0; round < rounds; ++round) {
    Batch batch;
    MLA_RETURN_IF_ERROR(add_sequences(table, batch_size, &batch));
    // Sequences at every place of their last page.
    Counts prompts(batch_size);
    std::iota(prompts.begin(), prompts.end(), 100);
    for (int32_t& tokens : prompts) tokens = 100 + tokens % kPageSize;
    MLA_RETURN_IF_ERROR(table.append(batch, prompts));
    const auto begin = WallClock::now();
    for (int step = 0; step < kSteps; ++step) MLA_RETURN_IF_ERROR(table.append(batch, one));
    append.samples.push_back(nanoseconds_since(begin) / kSteps);
    MLA_RETURN_IF_ERROR(free_sequences(table, batch));
  }
  results->push_back(std::move(append));
  return {};
}

Status measure_host(bool quick, Entries* entries) {
  const int rounds = quick ? 3 : 51;
  std::vector<HostOperation> operations;
  MLA_RETURN_IF_ERROR(time_pages(rounds, &operations));
  for (const size_t batch : {1, 128, 1024}) {
    MLA_RETURN_IF_ERROR(time_appends(batch, rounds, &operations));
  }
  Table table({"bookkeeping", "ns (p10–p90)", "million/s", "of"});
  for (const HostOperation& operation : operations) {
    const Summary ns = summarize(operation.samples);
    table.add({operation.name, spread(ns), number(1e3 / ns.median), operation.what});
    entries->push_back({"cache/host_" + operation.name + "/wall",
                        ns.median / 1e3,
                        {{"ns", ns.median},
                         {"p10_ns", ns.p10},
                         {"p90_ns", ns.p90},
                         {"n", ns.n},
                         {"per_second", 1e9 / ns.median}},
                        operation.what,
                        ""});
  }
  std::cout << "\nHost: wall time, one thread, no device\n" << table.to_string() << std::flush;
  return {};
}

// ---- device: an append ----

/// New tokens for a batch of sequences that have `context` tokens each.
struct AppendCase {
  int batch;
  int tokens;   ///< A sequence
  int context;  ///< A sequence, before
  std::string name() const {
    return "append_b" + std::to_string(batch) + "_t" + std::to_string(tokens);
  }
  int64_t total_tokens() const { return int64_t{batch} * tokens; }
  int pages(int steps) const {
    return batch * static_cast<int>(pages_for(context + int64_t{steps} * tokens) + 1);
  }
};

constexpr AppendCase kAppendCases[] = {{1, 1, 100}, {128, 1, 100}, {1024, 1, 100}, {1, 4096, 0}};
constexpr int64_t kRowBytes = kHeadDimQK * 2;

/// The kernel alone: runs and rows lie on the device.
class KernelCase {
 public:
  Status create(Machine& machine, const AppendCase& spec) {
    const CacheShape shape{.num_pages = spec.pages(1)};
    PageTable table;
    Batch batch;
    PreparedAppend plan;
    const auto size = static_cast<size_t>(spec.batch);
    MLA_RETURN_IF_ERROR(PageTable::create(shape.num_pages, &table));
    MLA_RETURN_IF_ERROR(add_sequences(table, size, &batch));
    MLA_RETURN_IF_ERROR(table.append(batch, Counts(size, spec.context)));
    MLA_RETURN_IF_ERROR(table.prepare_append(batch, Counts(size, spec.tokens), &plan));
    make_runs(plan, &host_runs_);
    host_rows_.resize(static_cast<size_t>(spec.total_tokens() * kRowBytes / 8));
    for (size_t i = 0; i < host_rows_.size(); ++i) host_rows_[i] = counter_random::mix(i + 1);
    MLA_RETURN_IF_ERROR(
        runs_.assign(machine, host_runs_.data(), host_runs_.size() * sizeof(RowRun)));
    MLA_RETURN_IF_ERROR(rows_.assign(machine, host_rows_.data(), host_rows_.size() * 8));
    return cache_.allocate(machine, static_cast<size_t>(shape.num_pages * shape.page_bytes()));
  }

  Status enqueue(const Machine& machine, Stream stream) const {
    return copy_runs(machine, runs_.as<RowRun>(), static_cast<int64_t>(host_runs_.size()),
                     rows_.data(), cache_.data(), 1, stream);
  }

  /// Every row is where its run says.
  Status check(Machine& machine) const {
    MLA_RETURN_IF_ERROR(machine.synchronize());
    for (const RowRun& run : host_runs_) {
      std::vector<uint64_t> there(static_cast<size_t>(run.tokens * kRowBytes / 8));
      MLA_RETURN_IF_ERROR(machine.copy_to_host(
          there.data(), cache_.as<std::byte>() + run.destination * kRowBytes, there.size() * 8));
      if (!std::equal(there.begin(), there.end(),
                      host_rows_.begin() + run.source * kRowBytes / 8)) {
        return {StatusCode::kKernelRejected, "wrong rows at " + std::to_string(run.destination)};
      }
    }
    return {};
  }

 private:
  std::vector<RowRun> host_runs_;
  std::vector<uint64_t> host_rows_;
  DeviceBuffer runs_, rows_, cache_;
};

/// PagedCache::append as a server calls it: bookkeeping, the copy of the runs, the kernel. One call
/// after the other, without waiting; then once for all of them.
/// @param returned_us  until the call has returned
/// @param all_us       the device's work included
Status time_calls(Machine& machine, const AppendCase& spec, int rounds,
                  std::vector<double>* returned_us, std::vector<double>* all_us) {
  const int steps = spec.tokens > 1 ? 1 : machine.kind() == MachineKind::kGpu ? 64 : 2;
  std::unique_ptr<PagedCache> cache;
  MLA_RETURN_IF_ERROR(PagedCache::create(machine, {.num_pages = spec.pages(steps)}, &cache));
  const auto size = static_cast<size_t>(spec.batch);
  DeviceBuffer rows;  // whatever they hold
  MLA_RETURN_IF_ERROR(rows.allocate(
      machine,
      static_cast<size_t>(int64_t{spec.batch} * std::max(spec.tokens, spec.context) * kRowBytes)));
  const Counts tokens(size, spec.tokens), context(size, spec.context);
  for (int round = -1; round < rounds; ++round) {  // the first one is a warm-up
    Batch batch;
    MLA_RETURN_IF_ERROR(add_sequences(*cache, size, &batch));
    MLA_RETURN_IF_ERROR(cache->append(batch, context, rows.data()));
    MLA_RETURN_IF_ERROR(machine.synchronize());
    const auto begin = WallClock::now();
    for (int step = 0; step < steps; ++step) {
      MLA_RETURN_IF_ERROR(cache->append(batch, tokens, rows.data()));
    }
    const double returned = nanoseconds_since(begin) / 1e3 / steps;
    MLA_RETURN_IF_ERROR(machine.synchronize());
    const double all = nanoseconds_since(begin) / 1e3 / steps;
    MLA_RETURN_IF_ERROR(free_sequences(*cache, batch));
    if (round < 0) continue;
    returned_us->push_back(returned);
    all_us->push_back(all);
  }
  return {};
}

Status measure_append(Machine& machine, Runner& runner, Progress& progress, bool quick,
                      const AppendCase& spec, Table* table, Entries* entries) {
  const bool gpu = machine.kind() == MachineKind::kGpu;
  KernelCase kernel;
  progress.step(spec.name());
  MLA_RETURN_IF_ERROR(kernel.create(machine, spec));
  Contender contender;
  contender.name = spec.name();
  MLA_RETURN_IF_ERROR(runner.prepare([&](Stream stream) { return kernel.enqueue(machine, stream); },
                                     &contender.handle));
  std::vector<double> first;
  MLA_RETURN_IF_ERROR(runner.run_cold(contender.handle, 1, &first));
  MLA_RETURN_IF_ERROR(kernel.check(machine));
  contender.expected_us = first.front();
  sample(runner, {&contender, 1}, [&](const std::string& text) { progress.step(text); });
  MLA_RETURN_IF_ERROR(contender.status);
  runner.clear();

  std::vector<double> returned_us, all_us;
  MLA_RETURN_IF_ERROR(time_calls(machine, spec, quick ? 2 : gpu ? 25 : 5, &returned_us, &all_us));
  progress.clear();

  const double bytes = 2.0 * static_cast<double>(spec.total_tokens() * kRowBytes);
  const auto add = [&](const std::string& what, const std::vector<double>& samples) {
    const Summary us = summarize(samples);
    if (us.n == 0) return us;
    GoogleEntry& entry = entries->emplace_back();
    entry.name = "cache/" + spec.name() + "/" + what;
    entry.us = us.median;
    entry.counters = {{"p10_us", us.p10}, {"p90_us", us.p90}, {"n", us.n}, {"bytes", bytes}};
    if (gpu) entry.counters["GBps"] = bytes / us.median / 1e3;
    entry.label = gpu ? "" : "wall time on the GPU model, not a GPU's";
    return us;
  };
  const Summary cold = add("cold", contender.cold);
  const Summary sustained = add("sustained", contender.sustained);
  const Summary returned = add("returned", returned_us);
  const Summary all = add("all", all_us);
  std::vector<std::string> cells{std::to_string(spec.batch) + " × " + std::to_string(spec.tokens),
                                 number(bytes / 1e3), spread(cold)};
  if (gpu) {
    cells.insert(cells.end(), {number(bytes / cold.median / 1e3), spread(sustained),
                               number(bytes / sustained.median / 1e3), spread(returned)});
  }
  cells.push_back(spread(all));
  table->add(std::move(cells));
  return {};
}

Status measure_appends(Machine& machine, Runner& runner, Progress& progress, bool quick,
                       Entries* entries) {
  const bool gpu = machine.kind() == MachineKind::kGpu;
  Table table =
      gpu ? Table({"append", "kB moved", "kernel, cold µs (p10–p90)", "GB/s",
                   "sustained µs (p10–p90)", "GB/s", "call returns µs (p10–p90)",
                   "call and its work, back to back µs (p10–p90)"})
          : Table({"append", "kB moved", "kernel, wall µs (p10–p90)", "call, wall µs (p10–p90)"});
  for (const AppendCase& spec : kAppendCases) {
    MLA_RETURN_IF_ERROR(measure_append(machine, runner, progress, quick, spec, &table, entries));
  }
  std::cout << "\nAppend: sequences × new tokens, 1 KV head, 16 bits; rows are read and written\n";
  if (!gpu) std::cout << "Wall time of the CPU that plays the GPU; it says nothing about a GPU\n";
  std::cout << table.to_string() << std::flush;
  return {};
}

// ---- memory ----

struct Lengths {
  std::string name;
  std::string what;
  Counts lengths;
};

constexpr int kMemoryBatch = 128;

/// The lengths of a shape of the bench: "klognormal2048".
Counts lengths_of(const std::string& shape_name) {
  Shape shape;
  if (!parse_shape("h1_q1_b" + std::to_string(kMemoryBatch) + "_" + shape_name, &shape).ok()) {
    return {};
  }
  return make_data_set(shape.spec).seqlens_k;
}

/// Those of suite varlen.
std::vector<Lengths> distributions() {
  return {{"uniform", "all 8192", lengths_of("k8192")},
          {"stepped", "256, 512, ..., 32768", lengths_of("kstepped32768")},
          {"lognormal2048", "log-normal, mean 2048, standard deviation 1024",
           lengths_of("klognormal2048")},
          {"lognormal8192", "log-normal, mean 8192, standard deviation 4096",
           lengths_of("klognormal8192")},
          {"skewed", "127 × 512, 1 × 131072", lengths_of("kskew131072")}};
}

Status measure_memory(Entries* entries) {
  const CacheShape shape;
  Table table(
      {"128 sequences", "contiguous MB", "paged MB", "saved", "fragmentation", "their lengths"});
  for (const auto& [name, what, lengths] : distributions()) {
    const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
    int64_t num_pages = 0;
    for (const int32_t length : lengths) num_pages += pages_for(length);
    PageTable pages;
    Batch batch;
    MLA_RETURN_IF_ERROR(PageTable::create(static_cast<int>(num_pages), &pages));
    MLA_RETURN_IF_ERROR(add_sequences(pages, lengths.size(), &batch));
    MLA_RETURN_IF_ERROR(pages.append(batch, lengths));
    const PageStatistics statistics = pages.statistics();
    const auto size = static_cast<double>(lengths.size());
    const double contiguous = size * longest * static_cast<double>(shape.token_bytes());
    const double block_table = size * static_cast<double>(pages_for(longest)) * sizeof(int32_t);
    const double paged =
        static_cast<double>(statistics.pages_used * shape.page_bytes()) + block_table;
    const double saved = 1 - paged / contiguous;  // a little below 0 where all lengths are equal
    table.add({name, number(contiguous / 1e6, 4), number(paged / 1e6, 4),
               percent(std::abs(saved) < 5e-4 ? 0 : saved), percent(statistics.fragmentation()),
               what});
    entries->push_back({"cache/memory_" + name + "/bytes",
                        0,
                        {{"bytes_contiguous", contiguous},
                         {"bytes_paged", paged},
                         {"bytes_block_table", block_table},
                         {"saved_share", saved},
                         {"fragmentation", statistics.fragmentation()},
                         {"pages", static_cast<double>(statistics.pages_used)},
                         {"tokens", static_cast<double>(statistics.tokens)}},
                        what,
                        ""});
  }
  std::cout
      << "\nMemory: 1 KV head, 16 bits; contiguous buffers are padded to the longest sequence; "
         "paged counts the block table\n"
      << table.to_string() << std::flush;
  return {};
}

}  // namespace

Status measure_cache(Machine& machine, Runner& runner, Progress& progress, bool quick,
                     std::vector<GoogleEntry>* entries) {
  MLA_RETURN_IF_ERROR(measure_host(quick, entries));
  MLA_RETURN_IF_ERROR(measure_appends(machine, runner, progress, quick, entries));
  return measure_memory(entries);
}

}  // namespace mla::bench
