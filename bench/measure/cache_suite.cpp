#include "bench/measure/cache_suite.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <numeric>

#include "bench/measure/sampler.h"
#include "bench/measure/shapes.h"
#include "bench/measure/table.h"
#include "reference/layers/cost_model.h"
#include "reference/quantise.h"
#include "reference/testing/data_generator.h"
#include "stages/common/cache/paged_cache.h"

namespace mla::bench {
namespace {

using Batch = std::vector<SequenceId>;
using Counts = std::vector<int32_t>;

double microseconds_since(WallClock::time_point begin) {
  return 1e6 * seconds_since(begin);
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

constexpr int kPromptTokens = 4096;
constexpr size_t kPromptPages = kPromptTokens / kDefaultPageSize;

/// us for one page or sequence.
struct PageTimes {
  double allocate, fork, free_fork, free;
};

/// Prompts of 64 pages are appended, forked and freed.
Status time_pages(PageTable& table, PageTimes* us) {
  constexpr size_t kSequences = 256;
  Batch batch, forks(kSequences);
  const Counts prompt{kPromptTokens};
  MLA_RETURN_IF_ERROR(add_sequences(table, kSequences, &batch));
  auto begin = WallClock::now();
  for (const SequenceId id : batch) MLA_RETURN_IF_ERROR(table.append({&id, 1}, prompt));
  us->allocate = microseconds_since(begin) / (kSequences * kPromptPages);
  begin = WallClock::now();
  for (size_t i = 0; i < kSequences; ++i) MLA_RETURN_IF_ERROR(table.fork(batch[i], &forks[i]));
  us->fork = microseconds_since(begin) / kSequences;
  begin = WallClock::now();
  MLA_RETURN_IF_ERROR(free_sequences(table, forks));
  us->free_fork = microseconds_since(begin) / kSequences;
  begin = WallClock::now();
  MLA_RETURN_IF_ERROR(free_sequences(table, batch));
  us->free = microseconds_since(begin) / (kSequences * kPromptPages);
  return {};
}

/// One token to each of a batch, again and again: every 64th append of a sequence takes a page.
Status time_appends(PageTable& table, size_t batch_size, double* us) {
  constexpr int kSteps = 128;
  const Counts one(batch_size, 1);
  Batch batch;
  MLA_RETURN_IF_ERROR(add_sequences(table, batch_size, &batch));
  // Sequences at every place of their last page.
  Counts prompts(batch_size);
  std::iota(prompts.begin(), prompts.end(), 100);
  for (int32_t& tokens : prompts) tokens = 100 + tokens % kDefaultPageSize;
  MLA_RETURN_IF_ERROR(table.append(batch, prompts));
  const auto begin = WallClock::now();
  for (int step = 0; step < kSteps; ++step) MLA_RETURN_IF_ERROR(table.append(batch, one));
  *us = microseconds_since(begin) / kSteps;
  return free_sequences(table, batch);
}

/// us for one buffer of memory.
struct BufferTimes {
  double allocate, free;
};

/// Buffers of `bytes`, all of them, then back in the same order. Their memory is not touched.
Status time_buffers(size_t bytes, size_t count,
                    const std::function<Status(size_t, void**)>& allocate,
                    const std::function<void(void*)>& free, BufferTimes* us) {
  std::vector<void*> buffers(count);
  Status status;
  auto begin = WallClock::now();
  for (void*& buffer : buffers) {
    if (status.ok()) status = allocate(bytes, &buffer);
  }
  us->allocate = microseconds_since(begin) / static_cast<double>(count);
  begin = WallClock::now();
  for (void* const buffer : buffers) free(buffer);
  us->free = microseconds_since(begin) / static_cast<double>(count);
  return status;
}

Status allocate_on_host(size_t bytes, void** buffer) {
  *buffer = std::malloc(bytes);
  return *buffer != nullptr ? Status()
                            : Status(StatusCode::kOutOfMemory, "malloc gives no more memory");
}

/// An operation of the host, whose table lives as long as it.
struct HostOperation {
  std::string name;
  std::string what;
  int pages;  ///< Of its table
  std::function<Status(Machine& machine, PageTable& table, double* us)> time;

  std::string benchmark() const { return "cache/host_" + name + "/wall"; }
};

/// What paging replaces: a buffer per page or per prompt from an allocator.
void add_allocators(MachineKind kind, std::vector<HostOperation>* operations) {
  const auto add = [&](const std::string& name, const std::string& what, size_t bytes, size_t count,
                       bool device) {
    for (const bool back : {false, true}) {
      const auto time = [=](Machine& machine, PageTable&, double* us) -> Status {
        BufferTimes times;
        MLA_RETURN_IF_ERROR(
            device ? time_buffers(
                         bytes, count,
                         [&](size_t size, void** buffer) { return machine.allocate(size, buffer); },
                         [&](void* buffer) { machine.deallocate(buffer); }, &times)
                   : time_buffers(bytes, count, allocate_on_host, std::free, &times));
        *us = back ? times.free : times.allocate;
        return {};
      };
      operations->push_back({name + (back ? "_free" : ""),
                             what + (back ? ", given back" : ", taken"), /*pages=*/1, time});
    }
  };
  const auto page_bytes = static_cast<size_t>(CacheShape{.num_pages = 1}.page_bytes());
  for (const bool device : {false, true}) {
    if (device && kind != MachineKind::kGpu) continue;
    const std::string name = device ? "cuda_malloc" : "malloc";
    add(name, fmt::format("a page's {:.1f} kB", double(page_bytes) / 1e3), page_bytes, 1024,
        device);
    const size_t prompt_bytes = page_bytes * kPromptPages;
    add(name + "_prompt",
        fmt::format("{:.2f} MB for {} tokens in a row", double(prompt_bytes) / 1e6, kPromptTokens),
        prompt_bytes, 16, device);
  }
}

std::vector<HostOperation> host_operations(MachineKind kind) {
  constexpr int kPages = 256 * kPromptPages;
  const auto part = [](double PageTimes::*which) {
    return [which](Machine&, PageTable& table, double* us) -> Status {
      PageTimes times;
      MLA_RETURN_IF_ERROR(time_pages(table, &times));
      *us = times.*which;
      return {};
    };
  };
  std::vector<HostOperation> operations{
      {"allocate", "a page, by appends of 64 pages to a sequence", kPages,
       part(&PageTimes::allocate)},
      {"free", "a page, by sequences of 64 pages", kPages, part(&PageTimes::free)},
      {"fork", "a sequence of 64 pages", kPages, part(&PageTimes::fork)},
      {"free_of_fork", "a sequence of 64 pages that another one shares", kPages,
       part(&PageTimes::free_fork)}};
  for (const int batch : {1, 128, 1024}) {
    operations.push_back({"append_b" + std::to_string(batch),
                          "one token to each of " + std::to_string(batch), batch * 8,
                          [batch](Machine&, PageTable& table, double* us) {
                            return time_appends(table, static_cast<size_t>(batch), us);
                          }});
  }
  add_allocators(kind, &operations);
  return operations;
}

Status measure_host(Machine& machine, GoogleBenchmark& google, bool quick) {
  Table table({"bookkeeping", "ns (p10–p90)", "million/s", "of"});
  bool any = false;
  for (const HostOperation& operation : host_operations(machine.kind())) {
    if (!google.is_chosen(operation.benchmark())) continue;
    any = true;
    PageTable pages;
    MLA_RETURN_IF_ERROR(PageTable::create(operation.pages, kDefaultPageSize, &pages));
    const auto measure = [&](int count, std::vector<double>* us) -> Status {
      for (int i = 0; i < count; ++i) {
        MLA_RETURN_IF_ERROR(operation.time(machine, pages, &us->emplace_back()));
      }
      return {};
    };
    std::vector<double> samples;
    const GoogleRun run{operation.benchmark(), quick ? 1 : 17, 3, measure, {}, &samples};
    MLA_RETURN_IF_ERROR(google.run({&run, 1}).front());
    for (double& sample : samples) sample *= 1e3;
    const Summary ns = summarize(samples);
    table.add({operation.name, spread(ns), number(1e3 / ns.median), operation.what});
    google.add({{operation.benchmark(),
                 ns.median / 1e3,
                 {{"ns", ns.median},
                  {"p10_ns", ns.p10},
                  {"p90_ns", ns.p90},
                  {"n", ns.n},
                  {"per_second", 1e9 / ns.median}},
                 operation.what,
                 ""}});
  }
  if (any) {
    std::cout << "\nHost: wall time of one thread; the device only gives memory\n"
              << table.to_string() << std::flush;
  }
  return {};
}

// ---- device: an append ----

/// New tokens for a batch of sequences that have `context` tokens each. Rows are bf16 and one KV
/// head's.
struct AppendCase {
  int batch;
  int tokens;   ///< A sequence
  int context;  ///< A sequence, before
  CacheFormat format = CacheFormat::k16Bit;
  /// The format comes first, so that what reads times of append_* takes no quantised one for one of
  /// 16 bits.
  std::string name(const std::string& mode) const {
    return "cache/" + (is_quantised(format) ? std::string(to_string(format)) + "_" : "") +
           "append_b" + std::to_string(batch) + "_t" + std::to_string(tokens) + "/" + mode;
  }
  CacheShape shape(int num_pages) const {
    return {.num_pages = num_pages, .cache_format = format, .cache_scale = 0.01f};
  }
  int64_t total_tokens() const { return int64_t{batch} * tokens; }
  int pages(int steps) const {
    return batch *
           static_cast<int>(pages_for(context + int64_t{steps} * tokens, kDefaultPageSize) + 1);
  }
};

constexpr AppendCase kAppendCases[] = {{1, 1, 100},
                                       {128, 1, 100},
                                       {1024, 1, 100},
                                       {1, 4096, 0},
                                       {1, 4096, 0, CacheFormat::kFp8Tile128},
                                       {1, 4096, 0, CacheFormat::kFp8Tensor},
                                       {1, 4096, 0, CacheFormat::kInt8Tile128}};
/// Of a row as it is appended.
constexpr int64_t kRowBytes = kHeadDimQK * 2;

/// The kernel alone: runs and rows lie on the device.
class KernelCase {
 public:
  Status create(Machine& machine, const AppendCase& spec) {
    shape_ = spec.shape(spec.pages(1));
    PageTable table;
    Batch batch;
    PreparedAppend plan;
    const auto size = static_cast<size_t>(spec.batch);
    MLA_RETURN_IF_ERROR(PageTable::create(shape_.num_pages, shape_.page_size, &table));
    MLA_RETURN_IF_ERROR(add_sequences(table, size, &batch));
    MLA_RETURN_IF_ERROR(table.append(batch, Counts(size, spec.context)));
    MLA_RETURN_IF_ERROR(table.prepare_append(batch, Counts(size, spec.tokens), &plan));
    make_runs(plan, &host_runs_);
    host_rows_.resize(static_cast<size_t>(spec.total_tokens() * kHeadDimQK));
    for (size_t i = 0; i < host_rows_.size(); ++i) {
      host_rows_[i] = kv_bits(1, shape_.dtype, DataKind::kFlat, 0, static_cast<int64_t>(i), 0, 0);
    }
    MLA_RETURN_IF_ERROR(
        runs_.assign(machine, host_runs_.data(), host_runs_.size() * sizeof(RowRun)));
    MLA_RETURN_IF_ERROR(rows_.assign(machine, host_rows_.data(), host_rows_.size() * 2));
    return cache_.allocate(machine, static_cast<size_t>(shape_.num_pages * shape_.page_bytes()));
  }

  Status enqueue(const Machine& machine, Stream stream) const {
    return write_runs(machine, shape_, runs_.as<RowRun>(), static_cast<int64_t>(host_runs_.size()),
                      rows_.data(), cache_.data(), stream);
  }

  /// Every row is where its run says.
  Status check(Machine& machine) const {
    MLA_RETURN_IF_ERROR(machine.synchronize());
    const int64_t row_bytes = shape_.token_bytes();
    for (const RowRun& run : host_runs_) {
      std::vector<uint8_t> there(static_cast<size_t>(run.tokens * row_bytes));
      MLA_RETURN_IF_ERROR(machine.copy_to_host(
          there.data(), cache_.as<std::byte>() + run.destination * row_bytes, there.size()));
      for (int64_t row = 0; row < run.tokens; ++row) {
        const std::vector<uint8_t> expected = kept(run.source + row);
        if (!std::equal(expected.begin(), expected.end(), there.begin() + row * row_bytes)) {
          return {StatusCode::kKernelRejected,
                  "a wrong row at " + std::to_string(run.destination + row)};
        }
      }
    }
    return {};
  }

 private:
  /// A row as the cache keeps it.
  std::vector<uint8_t> kept(int64_t row) const {
    std::vector<uint8_t> bytes(static_cast<size_t>(shape_.token_bytes()));
    const uint16_t* const bits = host_rows_.data() + row * kHeadDimQK;
    if (!is_quantised(shape_.cache_format)) {
      std::memcpy(bytes.data(), bits, bytes.size());
      return bytes;
    }
    float values[kHeadDimQK];
    for (int column = 0; column < kHeadDimQK; ++column) {
      values[column] = to_float(shape_.dtype, bits[column]);
    }
    const Problem problem{.dtype = shape_.dtype,
                          .cache_format = shape_.cache_format,
                          .cache_scale = shape_.cache_scale};
    quantise_row(problem, shape_.scale_rule, values, bytes.data());
    return bytes;
  }

  CacheShape shape_;
  std::vector<RowRun> host_runs_;
  std::vector<uint16_t> host_rows_;
  DeviceBuffer runs_, rows_, cache_;
};

/// PagedCache::append as a server calls it: bookkeeping, the copy of the runs, the kernel. One call
/// after the other, without waiting; then once for all of them.
/// @param returned_us  per call, until it has returned
/// @param all_us       the device's work included
Status time_calls(Machine& machine, const AppendCase& spec, PagedCache& cache, const void* rows,
                  int steps, double* returned_us, double* all_us) {
  const auto size = static_cast<size_t>(spec.batch);
  const Counts tokens(size, spec.tokens), context(size, spec.context);
  Batch batch;
  MLA_RETURN_IF_ERROR(add_sequences(cache, size, &batch));
  MLA_RETURN_IF_ERROR(cache.append(batch, context, rows));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  const auto begin = WallClock::now();
  for (int step = 0; step < steps; ++step) {
    MLA_RETURN_IF_ERROR(cache.append(batch, tokens, rows));
  }
  *returned_us = microseconds_since(begin) / steps;
  MLA_RETURN_IF_ERROR(machine.synchronize());
  *all_us = microseconds_since(begin) / steps;
  return free_sequences(cache, batch);
}

/// Samples of one append, in us.
struct AppendTimes {
  Contender kernel;
  std::vector<double> returned, all;
};

Status measure_kernel(Machine& machine, Runner& runner, GoogleBenchmark& google, Progress& progress,
                      const AppendCase& spec, Contender* contender) {
  KernelCase kernel;
  MLA_RETURN_IF_ERROR(kernel.create(machine, spec));
  contender->cold_name = spec.name("cold");
  if (machine.kind() == MachineKind::kGpu) contender->sustained_name = spec.name("sustained");
  MLA_RETURN_IF_ERROR(runner.prepare([&](Stream stream) { return kernel.enqueue(machine, stream); },
                                     &contender->handle));
  std::vector<double> first;
  MLA_RETURN_IF_ERROR(runner.run_cold(contender->handle, 1, &first));
  MLA_RETURN_IF_ERROR(kernel.check(machine));
  contender->expected_us = first.front();
  sample(runner, google, {contender, 1}, [&](const std::string& text) { progress.step(text); });
  runner.clear();
  return contender->status;
}

Status measure_calls(Machine& machine, GoogleBenchmark& google, bool quick, const AppendCase& spec,
                     AppendTimes* times) {
  const bool gpu = machine.kind() == MachineKind::kGpu;
  const int steps = spec.tokens > 1 ? 1 : gpu ? 64 : 2;
  std::unique_ptr<PagedCache> cache;
  MLA_RETURN_IF_ERROR(PagedCache::create(machine, spec.shape(spec.pages(steps)), &cache));
  DeviceBuffer rows;  // whatever they hold
  MLA_RETURN_IF_ERROR(rows.allocate(
      machine,
      static_cast<size_t>(int64_t{spec.batch} * std::max(spec.tokens, spec.context) * kRowBytes)));
  double warm_up[2];
  MLA_RETURN_IF_ERROR(
      time_calls(machine, spec, *cache, rows.data(), steps, &warm_up[0], &warm_up[1]));
  for (const bool whole : {false, true}) {
    const auto measure = [&](int count, std::vector<double>* us) -> Status {
      for (int i = 0; i < count; ++i) {
        double returned = 0, all = 0;
        MLA_RETURN_IF_ERROR(time_calls(machine, spec, *cache, rows.data(), steps, &returned, &all));
        us->push_back(whole ? all : returned);
      }
      return {};
    };
    const GoogleRun run{spec.name(whole ? "all" : "returned"),
                        quick ? 1
                        : gpu ? 7
                              : 2,
                        quick ? 2
                        : gpu ? 4
                              : 3,
                        measure,
                        {},
                        whole ? &times->all : &times->returned};
    MLA_RETURN_IF_ERROR(google.run({&run, 1}).front());
  }
  return {};
}

Status measure_append(Machine& machine, Runner& runner, GoogleBenchmark& google, Progress& progress,
                      bool quick, const AppendCase& spec, Table* table) {
  const bool gpu = machine.kind() == MachineKind::kGpu;
  AppendTimes times;
  progress.step(spec.name("cold"));
  MLA_RETURN_IF_ERROR(measure_kernel(machine, runner, google, progress, spec, &times.kernel));
  progress.step(spec.name("all"));
  MLA_RETURN_IF_ERROR(measure_calls(machine, google, quick, spec, &times));
  progress.clear();

  const double bytes =
      static_cast<double>(spec.total_tokens() * (kRowBytes + spec.shape(1).token_bytes()));
  const auto add = [&](const std::string& mode, const std::vector<double>& samples) {
    const Summary us = summarize(samples);
    if (us.n == 0) return us;
    GoogleEntry entry;
    entry.name = spec.name(mode);
    entry.us = us.median;
    entry.counters = {{"p10_us", us.p10}, {"p90_us", us.p90}, {"n", us.n}, {"bytes", bytes}};
    if (gpu) entry.counters["GBps"] = bytes / us.median / 1e3;
    entry.label = gpu ? "" : "wall time on the GPU model, not a GPU's";
    google.add({entry});
    return us;
  };
  const Summary cold = add("cold", times.kernel.cold);
  const Summary sustained = add("sustained", times.kernel.sustained);
  const Summary returned = add("returned", times.returned);
  const Summary all = add("all", times.all);
  std::vector<std::string> cells{std::to_string(spec.batch) + " × " + std::to_string(spec.tokens) +
                                     ", " + to_string(spec.format),
                                 number(bytes / 1e3), spread(cold)};
  if (gpu) {
    cells.insert(cells.end(), {number(bytes / cold.median / 1e3), spread(sustained),
                               number(bytes / sustained.median / 1e3), spread(returned)});
  }
  cells.push_back(spread(all));
  table->add(std::move(cells));
  return {};
}

std::vector<std::string> names_of(const AppendCase& spec, MachineKind machine) {
  std::vector<std::string> names{spec.name("cold")};
  if (machine == MachineKind::kGpu) names.push_back(spec.name("sustained"));
  names.insert(names.end(), {spec.name("returned"), spec.name("all")});
  return names;
}

Status measure_appends(Machine& machine, Runner& runner, GoogleBenchmark& google,
                       Progress& progress, bool quick) {
  const bool gpu = machine.kind() == MachineKind::kGpu;
  Table table =
      gpu ? Table({"append", "kB moved", "kernel, cold µs (p10–p90)", "GB/s",
                   "sustained µs (p10–p90)", "GB/s", "call returns µs (p10–p90)",
                   "call and its work, back to back µs (p10–p90)"})
          : Table({"append", "kB moved", "kernel, wall µs (p10–p90)", "call, wall µs (p10–p90)"});
  bool any = false;
  for (const AppendCase& spec : kAppendCases) {
    if (!google.is_any_chosen(names_of(spec, machine.kind()))) continue;
    any = true;
    MLA_RETURN_IF_ERROR(measure_append(machine, runner, google, progress, quick, spec, &table));
  }
  if (!any) return {};
  std::cout << "\nAppend: sequences × new tokens, format; 1 KV head; rows of bf16 are read, and "
               "written or "
               "quantised\n";
  if (!gpu)
    std::cout << "Wall time of the CPU that plays the GPU, which says nothing about a GPU\n";
  std::cout << table.to_string() << std::flush;
  return {};
}

// ---- memory ----

/// Sequences of one distribution, in the caches of one model.
struct BatchOfLengths {
  std::string name;  ///< "memory_uniform", "model_v3"
  std::string what;
  Counts lengths;
  int64_t token_bytes = CacheShape{}.token_bytes();  ///< Of all layers that are counted

  std::string benchmark() const { return "cache/" + name + "/bytes"; }
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
std::vector<BatchOfLengths> distributions() {
  return {{"memory_uniform", "all 8192", lengths_of("k8192")},
          {"memory_stepped", "256, 512, ..., 32768", lengths_of("kstepped32768")},
          {"memory_lognormal2048", "log-normal, mean 2048, standard deviation 1024",
           lengths_of("klognormal2048")},
          {"memory_lognormal8192", "log-normal, mean 8192, standard deviation 4096",
           lengths_of("klognormal8192")},
          {"memory_skewed", "127 × 512, 1 × 131072", lengths_of("kskew131072")}};
}

/// One batch in the caches of whole models. Layers: the models' own (arXiv 2412.19437, 2405.04434).
std::vector<BatchOfLengths> models() {
  const Counts lengths = lengths_of("klognormal2048");
  const auto model = [&](const std::string& name, const std::string& what, int layers,
                         int64_t values) {
    return BatchOfLengths{"model_" + name,
                          fmt::format("{}, {} layers of {} values", what, layers, values), lengths,
                          layers * values * 2};
  };
  const auto multi = cost::mha_32();
  return {model("v3", "DeepSeek-V3", 61, cost::deepseek_v3().latent_row()),
          model("v2", "DeepSeek-V2", 60, cost::deepseek_v2().latent_row()),
          model("v2_lite", "DeepSeek-V2-Lite", 27, cost::deepseek_v2_lite().latent_row()),
          model("mha_32", "multi-head attention, 32 heads of 128", 32,
                2 * multi.kv_heads * multi.head_dim)};
}

/// Bytes of the batch, paged and contiguous, as counters and as a row of the table.
Status memory_of(const BatchOfLengths& batch, GoogleEntry* entry, Table* table) {
  const Counts& lengths = batch.lengths;
  const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
  int64_t num_pages = 0;
  for (const int32_t length : lengths) num_pages += pages_for(length, kDefaultPageSize);
  PageTable pages;
  Batch sequences;
  MLA_RETURN_IF_ERROR(PageTable::create(static_cast<int>(num_pages), kDefaultPageSize, &pages));
  MLA_RETURN_IF_ERROR(add_sequences(pages, lengths.size(), &sequences));
  MLA_RETURN_IF_ERROR(pages.append(sequences, lengths));
  const PageStatistics statistics = pages.statistics();
  const auto size = static_cast<double>(lengths.size());
  const auto token_bytes = static_cast<double>(batch.token_bytes);
  const double contiguous = size * longest * token_bytes;
  const double block_table =
      size * static_cast<double>(pages_for(longest, kDefaultPageSize)) * sizeof(int32_t);
  const double paged =
      static_cast<double>(statistics.pages_used * kDefaultPageSize) * token_bytes + block_table;
  const double saved = 1 - paged / contiguous;  // a little below 0 where all lengths are equal
  const double lost =
      static_cast<double>(statistics.pages_used * kDefaultPageSize - statistics.tokens_stored) *
      token_bytes;
  table->add({batch.name.substr(batch.name.find('_') + 1), number(token_bytes / 1e3),
              number(contiguous / 1e6, 4), number(paged / 1e6, 4),
              percent(std::abs(saved) < 5e-4 ? 0 : saved), percent(statistics.utilization()),
              percent(statistics.fragmentation()), number(lost / 1e6), batch.what});
  *entry = {batch.benchmark(),
            0,
            {{"bytes_contiguous", contiguous},
             {"bytes_paged", paged},
             {"bytes_block_table", block_table},
             {"saved_share", saved},
             {"fragmentation", statistics.fragmentation()},
             {"utilisation", statistics.utilization()},
             {"bytes_lost", lost},
             {"bytes_per_token", token_bytes},
             {"pages", static_cast<double>(statistics.pages_used)},
             {"tokens", static_cast<double>(statistics.tokens)}},
            batch.what,
            ""};
  return {};
}

/// @param title  what is the same in all of them
Status measure_memory(GoogleBenchmark& google, const std::vector<BatchOfLengths>& batches,
                      const std::string& title) {
  Table table({"128 sequences", "kB per token", "contiguous MB", "paged MB", "saved", "utilisation",
               "fragmentation", "empty rows, MB", "of"});
  bool any = false;
  for (const BatchOfLengths& batch : batches) {
    if (!google.is_chosen(batch.benchmark())) continue;
    any = true;
    GoogleEntry entry;
    MLA_RETURN_IF_ERROR(memory_of(batch, &entry, &table));
    const auto timeless = [](int count, std::vector<double>* us) -> Status {
      us->resize(static_cast<size_t>(count));
      return {};
    };
    const GoogleRun run{batch.benchmark(), 1, 1, timeless};
    MLA_RETURN_IF_ERROR(google.run({&run, 1}).front());
    google.add({entry});
  }
  if (!any) return {};
  std::cout << "\n"
            << title
            << "; contiguous buffers are padded to the longest sequence; paged counts the block "
               "table\n"
            << table.to_string() << std::flush;
  return {};
}

}  // namespace

std::vector<std::string> cache_benchmark_names(MachineKind machine) {
  std::vector<std::string> names;
  for (const HostOperation& operation : host_operations(machine))
    names.push_back(operation.benchmark());
  for (const AppendCase& spec : kAppendCases) {
    const std::vector<std::string> more = names_of(spec, machine);
    names.insert(names.end(), more.begin(), more.end());
  }
  for (const auto& batches : {distributions(), models()}) {
    for (const BatchOfLengths& batch : batches) names.push_back(batch.benchmark());
  }
  return names;
}

Status measure_cache(Machine& machine, Runner& runner, GoogleBenchmark& google, Progress& progress,
                     bool quick) {
  MLA_RETURN_IF_ERROR(measure_host(machine, google, quick));
  MLA_RETURN_IF_ERROR(measure_appends(machine, runner, google, progress, quick));
  MLA_RETURN_IF_ERROR(
      measure_memory(google, distributions(), "Memory of one layer: 1 KV head, 16 bits"));
  return measure_memory(google, models(),
                        "Memory of all layers by model: 16 bits, lengths log-normal, mean 2048");
}

}  // namespace mla::bench
