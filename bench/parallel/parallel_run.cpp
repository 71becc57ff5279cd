#include "bench/parallel/parallel_run.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <thread>

#include "bench/measure/limits.h"
#include "bench/measure/memory.h"
#include "bench/measure/program.h"
#include "bench/measure/table.h"
#include "bench/measure/truth.h"
#include "bench/parallel/rank_timeline.h"
#include "stages/common/choose/choose.h"
#include "stages/common/machine/gpus.h"

namespace mla::bench {
namespace {

using Json = nlohmann::ordered_json;

double median(std::vector<double> values) {
  return quantile(std::move(values), 0.5);
}

/// One rank, from its start to its end.
class RankRun {
 public:
  RankRun(const ParallelOptions& options, const Seat& seat, const MakeTransport& make_transport,
          Json* report)
      : options_(options), seat_(seat), make_transport_(make_transport), report_(report) {}

  /// Joins first, so that the others hear of what is missing here, and ends when all have begun.
  Status begin() {
    MLA_RETURN_IF_ERROR(join_hub(seat_.hub, seat_.rank, seat_.ranks, options_.time_limit, &world_));
    if (options_.machine == MachineKind::kGpu) {
      MLA_RETURN_IF_ERROR(use_gpu(gpu_of_rank(seat_.local_rank, gpu_count(), options_.share_gpus)));
    }
    std::string why_not;
    machine_ = find_machine(options_.machine, &why_not);
    if (machine_ == nullptr) return {StatusCode::kUnavailable, why_not};
    stage_ = find_stage(options_.machine, options_.stage, &why_not);
    if (stage_ == nullptr) return {StatusCode::kInvalidArgument, why_not};
    MLA_RETURN_IF_ERROR(check_device(*stage_, machine_->limits()));
    std::vector<std::string> all;
    MLA_RETURN_IF_ERROR(world_->share("begun", &all));
    if (reports()) {
      (*report_)["machine"] = machine_->description();
      (*report_)["ranks"] = seat_.ranks;
    }
    return {};
  }

  Status run() {
    for (const ParallelCase& one : options_.cases) {
      MLA_RETURN_IF_ERROR(connect(one.division.pages));
      MLA_RETURN_IF_ERROR(run_case(one));
    }
    return disconnect();
  }

  /// Tells all that this rank has failed: those that wait for it in an exchange listen to their group alone.
  void fail(const Status& why) {
    if (world_ != nullptr)
      world_->fail(why);  // first: who hears of it in the group fails there, too
    if (transport_ != nullptr) transport_->fail(why);
  }
  bool reports() const { return seat_.rank == reporting_rank(options_); }
  /// By this rank's clock. Less than 0: there was none yet.
  double seconds_since_fault() const { return fault_us_ < 0 ? -1 : 1e-6 * (host_us() - fault_us_); }

 private:
  /// Meets the ranks that share pages with this one, `pages` of them. One alone exchanges nothing and needs no NCCL.
  Status connect(int pages) {
    if (transport_ != nullptr && transport_->ranks() == pages) return {};
    MLA_RETURN_IF_ERROR(disconnect());
    if (pages == 1) {
      std::vector<std::unique_ptr<Transport>> alone;
      MLA_RETURN_IF_ERROR(make_thread_transports(1, options_.time_limit, &alone));
      transport_ = std::move(alone[0]);
      api_ = nullptr;
      return make_rank_clock(
          *machine_, [this](Stream) { return machine_->synchronize(); }, &clock_);
    }
    std::unique_ptr<Rendezvous> group;
    MLA_RETURN_IF_ERROR(join_group(*world_, seat_.hub, seat_.rank / pages, pages, &hub_, &group));
    MLA_RETURN_IF_ERROR(make_transport_(seat_, pages, std::move(group), &transport_, &api_));
    if (reports() && api_ != nullptr) (*report_)["nccl"] = api_->description();
    return make_rank_clock(
        *machine_, [this](Stream stream) { return transport_->wait(stream); }, &clock_,
        [this](const Status& why) { fail(why); });
  }
  /// Whoever has the group's hub stays until all have left it.
  Status disconnect() {
    if (transport_ == nullptr) return {};
    std::vector<std::string> all;
    MLA_RETURN_IF_ERROR(world_->share("end", &all));
    clock_.reset();  // its graphs hold calls of the transport
    transport_.reset();
    MLA_RETURN_IF_ERROR(world_->share("left", &all));
    hub_.reset();
    return {};
  }

  Status run_case(const ParallelCase& one) {
    DecodeCase spec = one.shape.spec;
    if (is_faulty(Fault::kShape)) {
      if (spec.lengths.empty()) {
        --spec.batch;
      } else {
        spec.lengths.pop_back();
      }
    }
    const DataSet whole = make_data_set(spec);
    RankData data;
    Status status = make_rank_data(*machine_, whole, one.division, seat_.rank, &data);
    DeviceBuffer workspace;
    size_t bytes = 0;
    if (status.ok()) {
      status = parallel_workspace_bytes(*stage_, data.problem, data.settings, one.division.pages,
                                        &bytes);
    }
    if (status.ok()) status = workspace.allocate(*machine_, bytes);
    if (status.ok() && options_.check) status = find_truth(whole);
    // All are here before the first exchange, whose time limit does not begin while data are made.
    if (!status.ok()) world_->fail(status);
    MLA_RETURN_IF_ERROR(status);
    std::vector<std::string> all;
    MLA_RETURN_IF_ERROR(world_->share("ready", &all));
    if (options_.fault != Fault::kNone) MLA_RETURN_IF_ERROR(expect_fault({}));
    misbehave(Fault::kKill);
    misbehave(Fault::kStop);
    Workspace lent = workspace;
    if (is_faulty(Fault::kError)) lent.bytes = 0;

    const auto decode_whole = [&](Stream stream) {
      return decode_parallel(*stage_, data.problem, data.tensors, data.settings, *transport_, lent,
                             stream);
    };
    int whole_handle = 0;
    MLA_RETURN_IF_ERROR(clock_->prepare(decode_whole, use_graphs(), &whole_handle));
    if (options_.fault == Fault::kKillLater) MLA_RETURN_IF_ERROR(repeat_amid_kill(whole_handle));
    const auto decode_anew = [&](RankOutputs* outputs) -> Status {
      MLA_RETURN_IF_ERROR(
          machine_->fill(data.out.data(), 0xff, data.out.bytes(), clock_->stream()));
      MLA_RETURN_IF_ERROR(
          machine_->fill(data.lse.data(), 0xff, data.lse.bytes(), clock_->stream()));
      MLA_RETURN_IF_ERROR(clock_->run(whole_handle, 1, nullptr));
      return options_.repeat ? read_outputs(*machine_, data, outputs) : Status();
    };
    RankOutputs outputs, again;
    MLA_RETURN_IF_ERROR(decode_anew(&outputs));
    if (options_.repeat) MLA_RETURN_IF_ERROR(decode_anew(&again));

    Json row = row_of(one, whole, data);
    if (options_.check) {
      Status right = same_bits(outputs, again);
      if (right.ok()) {
        right = compare_rank(*machine_, whole, data, expected(), rows_, one.division.pages > 1);
      }
      MLA_RETURN_IF_ERROR(world_->share(right.ok() ? "" : right.message(), &all));
      row["wrong"] = Json::array();
      for (size_t rank = 0; rank < all.size(); ++rank) {
        if (!all[rank].empty()) row["wrong"].push_back(fmt::format("rank {}: {}", rank, all[rank]));
      }
      any_wrong_ = any_wrong_ || !row["wrong"].empty();
    }
    if (options_.times) MLA_RETURN_IF_ERROR(take_times(one, whole, data, lent, whole_handle, &row));
    Json timeline = row_of(one, whole, data);
    std::string phases;
    if (options_.timeline) {
      MLA_RETURN_IF_ERROR(take_timeline(data, lent, whole_handle, &timeline, &phases));
    }
    clock_->forget(whole_handle);
    if (reports() && options_.fault == Fault::kNone) {
      print(row);
      (*report_)["rows"].push_back(row);
      if (options_.timeline) {
        fmt::print("\n{}\n", phases);
        (*report_)["timelines"].push_back(timeline);
      }
    }
    return {};
  }

  /// What all ranks are at during one decode. On GPUs the last of many back to back, when ranks have found their pace.
  Status take_timeline(RankData& data, const Workspace& workspace, int whole_handle, Json* timeline,
                       std::string* phases) {
    constexpr int kReplays = 100;
    const bool on_gpu = options_.machine == MachineKind::kGpu;
    std::unique_ptr<PhaseClock> clock;
    MLA_RETURN_IF_ERROR(clock_->make_phase_clock(&clock));
    int handle = 0;
    MLA_RETURN_IF_ERROR(clock_->prepare(
        [&](Stream stream) {
          clock->begin();
          transport_->observe(clock.get());
          const Status status = decode_parallel(*stage_, data.problem, data.tensors, data.settings,
                                                *transport_, workspace, stream);
          transport_->observe(nullptr);
          return status;
        },
        use_graphs(), &handle));
    if (on_gpu) {  // and what the marks cost
      const double heavy = options_.warmup_s >= 0 ? options_.warmup_s : stage_->sustained_warmup_s;
      Timed plain{"whole_us", whole_handle, 1, heavy}, marked{"marked_us", handle, 1, 0};
      for (Timed* what : {&plain, &marked}) {
        MLA_RETURN_IF_ERROR(time(what));
        double us = median(what->samples);
        MLA_RETURN_IF_ERROR(longest(&us));
        (*timeline)[what->name] = us;
      }
    }
    std::vector<std::string> all;
    MLA_RETURN_IF_ERROR(world_->share("timeline", &all));
    MLA_RETURN_IF_ERROR(clock_->run(handle, on_gpu ? kReplays : 1, nullptr));
    RankReading own;
    MLA_RETURN_IF_ERROR(clock->read(&own.marks, &own.uncertainty_us));
    clock_->forget(handle);
    std::vector<RankReading> readings;
    MLA_RETURN_IF_ERROR(share_readings(*world_, own, &readings));
    RanksTimeline found;
    MLA_RETURN_IF_ERROR(make_timeline(readings, &found));
    const Problem& problem = data.problem;
    MLA_RETURN_IF_ERROR(check_timeline(
        found, steps_of(std::min(data.settings.slices, problem.batch),
                        problem.causal && problem.seqlen_q > 1, data.settings.exchange)));
    (*timeline)["measured"] =
        on_gpu ? fmt::format("the last of {} {} back to back, by CUDA events{}", kReplays,
                             use_graphs() ? "replays of a graph" : "decodes",
                             use_graphs() ? " in it" : "")
               : "one decode on the GPU model, by the host's clock: no GPU's time";
    (*timeline)["uncertainty_us"] = found.uncertainty_us;
    (*timeline)["clocks"] = found.is_one_clock ? "one host's" : "brought together by barriers";
    (*timeline)["barrier_us"] = found.barrier_us;
    (*timeline)["phases"] = phases_json(found);
    *phases = fmt::format(
        "Timeline: {}. Times of two ranks are comparable to {} µs; clocks: {}, barriers bring them "
        "together to {} µs.\n{}",
        (*timeline)["measured"].get<std::string>(), number(found.uncertainty_us),
        (*timeline)["clocks"].get<std::string>(), number(found.barrier_us), summary(found));
    return {};
  }

  /// Something that is timed: how often one run does it, and how long others of it run before.
  struct Timed {
    const char* name;
    int handle, per_run;
    double warmup;
    std::vector<double> samples = {};
  };

  /// The times of one case, each the longest of all ranks'. All are taken in turns, so that a GPU that gets slower
  /// as it gets warm makes none of them look better. What a decode consists of is timed several to a graph, so that
  /// what a graph costs beside is not in it, and the decode both ways: parts can be added up to it.
  Status take_times(const ParallelCase& one, const DataSet& whole, RankData& data,
                    const Workspace& workspace, int whole_handle, Json* row) {
    const double heavy = options_.warmup_s >= 0 ? options_.warmup_s : stage_->sustained_warmup_s;
    const double light = std::min(heavy, 0.05);
    std::vector<Timed> timed = {{"whole_us", whole_handle, 1, heavy}};
    const auto add = [&](const char* name, const RankClock::Enqueue& enqueue, int per_run,
                         double warmup) {
      timed.push_back({name, 0, per_run, warmup});
      return clock_->prepare(enqueue, use_graphs(), &timed.back().handle);
    };
    const auto together = [](const auto& enqueue) {
      return [enqueue](Stream stream) -> Status {
        for (int i = 0; i < kTogether; ++i) MLA_RETURN_IF_ERROR(enqueue(stream));
        return {};
      };
    };
    const auto half = [&](auto function) {
      return [&, function](Stream stream) {
        return function(*stage_, data.problem, data.tensors, data.settings, *transport_, workspace,
                        stream);
      };
    };
    (*row)["together"] = kTogether;
    MLA_RETURN_IF_ERROR(add("together_us", together(half(decode_parallel)), kTogether, heavy));
    MLA_RETURN_IF_ERROR(add("share_us", together(half(decode_share)), kTogether, heavy));

    const Exchange kind = data.settings.exchange;
    const int ranks = one.division.pages;
    ExchangeBuffers buffers;
    if (ranks > 1) {
      MLA_RETURN_IF_ERROR(add("merge_us", together(half(merge_shares)), kTogether, light));
      (*row)["bytes_sent"] = exchange_bytes(data.problem, kind, ranks) * (ranks - 1);
      MLA_RETURN_IF_ERROR(buffers.make(*machine_, data.problem, kind, ranks));
      // The exchange without the merge, as the decode does it.
      const auto as_decode = [&](Stream stream) { return exchange(buffers, kind, stream); };
      MLA_RETURN_IF_ERROR(add("exchange_us", together(as_decode), kTogether, light));
      // NCCL's collectives for the same bytes.
      const auto alone = [&](Stream stream) { return exchange_alone(buffers, kind, stream); };
      if (api_ != nullptr) MLA_RETURN_IF_ERROR(add("nccl_us", alone, kTogether, light));
    }

    // The whole problem on one GPU.
    RankData on_one;
    DeviceBuffer one_workspace;
    MLA_RETURN_IF_ERROR(make_rank_data(*machine_, whole, Division{}, 0, &on_one));
    MLA_RETURN_IF_ERROR(allocate_workspace(*stage_, on_one.problem, &one_workspace));
    const auto decode_one = [&](Stream stream) {
      return decode(*stage_, on_one.problem, on_one.tensors, one_workspace, stream);
    };
    MLA_RETURN_IF_ERROR(add("one_us", decode_one, 1, heavy));

    for (int round = 0; round < options_.rounds; ++round) {
      for (Timed& what : timed) MLA_RETURN_IF_ERROR(time(&what));
    }
    for (const Timed& what : timed) {
      double us = median(what.samples);
      MLA_RETURN_IF_ERROR(longest(&us));
      (*row)[what.name] = us;
      if (what.handle != whole_handle) clock_->forget(what.handle);
    }
    return {};
  }

  /// Every rank runs it equally often.
  Status time(Timed* what) {
    const int at_once = RankClock::kMostAtOnce / what->per_run;
    double guess = 0;
    MLA_RETURN_IF_ERROR(clock_->run(what->handle, 3, &guess));
    MLA_RETURN_IF_ERROR(longest(&guess));
    const auto runs = [&](double seconds, int least, int most) {
      return static_cast<int>(
          std::clamp(1e6 * seconds / std::max(guess, 1.0), 1.0 * least, 1.0 * most));
    };
    MLA_RETURN_IF_ERROR(clock_->run(what->handle, runs(what->warmup, 3, 100000), nullptr, at_once));
    for (int i = 0; i < 3; ++i) {
      double us = 0;
      MLA_RETURN_IF_ERROR(clock_->run(what->handle, runs(0.03, 5, 2000), &us, at_once));
      what->samples.push_back(us / what->per_run);
    }
    return {};
  }

  /// What an exchange sends and receives, of no meaning.
  struct ExchangeBuffers {
    DeviceBuffer send, receive, parts, sum;
    size_t bytes = 0, sums = 0;

    Status make(Machine& machine, const Problem& problem, Exchange kind, int ranks) {
      const auto count = static_cast<size_t>(ranks);
      const int64_t rows = problem.lse_elements();
      const bool is_sum = kind == Exchange::kReduceScatter;
      bytes = static_cast<size_t>(is_sum ? rows * int64_t{sizeof(float)}
                                         : exchange_bytes(problem, kind, ranks));
      sums = is_sum ? static_cast<size_t>(rows / ranks) * kHeadDimV : 0;
      for (DeviceBuffer* buffer : {&send, &receive}) {
        MLA_RETURN_IF_ERROR(buffer->allocate(machine, bytes * count));
        MLA_RETURN_IF_ERROR(machine.fill(buffer->data(), 0, buffer->bytes()));
      }
      if (is_sum) {
        MLA_RETURN_IF_ERROR(parts.allocate(machine, sums * count * sizeof(float)));
        MLA_RETURN_IF_ERROR(sum.allocate(machine, sums * sizeof(float)));
        MLA_RETURN_IF_ERROR(machine.fill(parts.data(), 0, parts.bytes()));
      }
      return machine.synchronize();
    }
  };

  /// Of this rank, in what is gathered.
  const void* place_in(const ExchangeBuffers& of) const {
    return of.receive.as<char>() + static_cast<size_t>(transport_->rank()) * of.bytes;
  }

  Status exchange(const ExchangeBuffers& of, Exchange kind, Stream stream) {
    MLA_RETURN_IF_ERROR(
        kind == Exchange::kAllToAll
            ? transport_->all_to_all(of.send.data(), of.receive.data(), of.bytes, stream)
            : transport_->all_gather(place_in(of), of.receive.data(), of.bytes, stream));
    if (of.sums > 0) {
      MLA_RETURN_IF_ERROR(transport_->join(stream));
      MLA_RETURN_IF_ERROR(
          transport_->reduce_scatter(of.parts.as<float>(), of.sum.as<float>(), of.sums, stream));
    }
    return transport_->join(stream);
  }

  static constexpr int kTogether = 8;
  Status exchange_alone(const ExchangeBuffers& of, Exchange kind, Stream stream) {
    const auto begin = std::chrono::steady_clock::now();
    const auto settle = [&]() -> Status {
      for (bool is_busy = true; is_busy;) {
        Status status = api_->progress(&is_busy);
        if (status.ok() && is_busy &&
            std::chrono::steady_clock::now() - begin > options_.time_limit) {
          status = {StatusCode::kRankFailed, "NCCL does not take a call"};
        }
        if (!status.ok()) {
          transport_->fail(status);  // aborts: memory of a kernel that hangs cannot be freed
          return status;
        }
      }
      return {};
    };
    MLA_RETURN_IF_ERROR(api_->follow(stream));
    for (int i = 0; i < kTogether; ++i) {
      MLA_RETURN_IF_ERROR(kind == Exchange::kAllToAll
                              ? api_->all_to_all(of.send.data(), of.receive.data(), of.bytes)
                              : api_->all_gather(place_in(of), of.receive.data(), of.bytes));
      MLA_RETURN_IF_ERROR(settle());
      if (of.sums == 0) continue;
      MLA_RETURN_IF_ERROR(api_->reduce_scatter(of.parts.as<float>(), of.sum.as<float>(), of.sums));
      MLA_RETURN_IF_ERROR(settle());
    }
    return api_->lead(stream);
  }

  Status longest(double* value) {
    std::vector<std::string> all;
    MLA_RETURN_IF_ERROR(world_->share(fmt::format("{}", *value), &all));
    for (const std::string& other : all) {
      *value = std::max(*value, std::strtod(other.c_str(), nullptr));
    }
    return {};
  }

  /// What the whole should give. Kept, because cases that follow each other often share it.
  Status find_truth(const DataSet& whole) {
    const std::string name = whole.spec.name() + shape_name(whole);
    if (name == truth_) return {};
    DeviceTensors tensors;
    MLA_RETURN_IF_ERROR(generate_on_device(*machine_, whole, &tensors));
    MLA_RETURN_IF_ERROR(values_.evaluate(*machine_, whole, tensors,
                                         work_of(whole.problem, whole.total_tokens()).flop));
    rows_ = values_.rows();
    truth_ = name;
    return {};
  }
  const ReferenceResult& expected() const { return values_.expected(); }

  bool use_graphs() const { return options_.graphs && options_.machine == MachineKind::kGpu; }
  bool is_faulty(Fault fault) const {
    return options_.fault == fault && options_.faulty_rank == seat_.rank;
  }
  /// This rank's clock of the fault begins to run, `later` from now. The faulty rank's goes on after that of every
  /// other, so none notices a fault that by its own clock has yet to come.
  Status expect_fault(std::chrono::milliseconds later) {
    fault_us_ = host_us() + 1e3 * static_cast<double>(later.count());
    std::vector<std::string> all;
    return world_->share("expects the fault", &all);
  }
  void misbehave(Fault fault) const {
    if (!is_faulty(fault)) return;
    if (fault == Fault::kStop) {
      std::this_thread::sleep_for(3 * options_.time_limit);
    } else {
      raise(SIGKILL);
    }
  }

  /// The rank that is to be killed is, some time later, while all repeat a decode and wait for nothing else.
  Status repeat_amid_kill(int handle) {
    using Clock = std::chrono::steady_clock;
    constexpr std::chrono::milliseconds kLater{500};
    MLA_RETURN_IF_ERROR(expect_fault(kLater));
    const auto at = Clock::now() + kLater;
    if (is_faulty(Fault::kKillLater)) {
      std::thread([at] {
        std::this_thread::sleep_until(at);
        raise(SIGKILL);
      }).detach();
    }
    while (Clock::now() < at + 3 * options_.time_limit) {
      MLA_RETURN_IF_ERROR(clock_->run(handle, RankClock::kMostAtOnce, nullptr));
    }
    return {};
  }

  /// What was run, and not what was asked for. A stage that chooses does so for what it decodes.
  Json row_of(const ParallelCase& one, const DataSet& whole, const RankData& data) const {
    const int pages = one.division.pages;
    std::string stage = stage_->slug;
    if (stage == kAutoSlug) {
      std::vector<std::string> names;
      for (const Problem& decoded : decoded_problems(data.problem, data.settings, pages)) {
        Choice choice;
        if (!choose(options_.machine, decoded, machine_->limits(), &choice).ok()) continue;
        if (std::find(names.begin(), names.end(), name_of(choice)) != names.end()) continue;
        names.push_back(name_of(choice));
      }
      if (!names.empty()) stage = fmt::format("{}", fmt::join(names, " + "));
    }
    return {{"shape", one.shape.name},
            {"mode", one.mode},
            {"ranks", seat_.ranks},
            {"page_ranks", one.division.pages},
            {"pages_per_turn", data.settings.pages_per_turn},
            {"exchange", pages > 1 ? to_string(data.settings.exchange) : "none"},
            {"slices", pages > 1 ? count_slices(data.problem, data.settings) : 1},
            {"stage", stage},
            {"tokens", whole.total_tokens()},
            {"cache_bytes", data.cache_bytes}};
  }

  void print(const Json& row) const {
    std::string line =
        fmt::format("{:<28} {:<8} {:<14} slices {} {:<24}", row["shape"].get<std::string>(),
                    row["mode"].get<std::string>(), row["exchange"].get<std::string>(),
                    row["slices"].get<int>(), row["stage"].get<std::string>());
    for (const char* name :
         {"one_us", "whole_us", "together_us", "share_us", "merge_us", "exchange_us", "nccl_us"}) {
      if (row.contains(name) && row[name].is_number()) {
        line += fmt::format("  {} {:.1f}", std::string(name, std::string(name).size() - 3),
                            row[name].get<double>());
      }
    }
    if (row.contains("one_us") && row["one_us"].is_number()) {
      line += fmt::format("  {:.3f} of one",
                          row["whole_us"].get<double>() / row["one_us"].get<double>());
    }
    if (row.contains("wrong")) {
      line += row["wrong"].empty() ? "  right" : "  WRONG: " + row["wrong"][0].get<std::string>();
    }
    fmt::print("{}\n", line);
    std::fflush(stdout);
  }

 public:
  bool any_wrong() const { return any_wrong_; }

 private:
  const ParallelOptions& options_;
  const Seat seat_;
  const MakeTransport& make_transport_;
  Json* report_;
  Machine* machine_ = nullptr;
  const Stage* stage_ = nullptr;
  std::unique_ptr<Rendezvous> world_;
  std::unique_ptr<Hub> hub_;
  std::unique_ptr<Transport> transport_;
  NcclApi* api_ = nullptr;
  std::unique_ptr<RankClock> clock_;
  Truth values_;
  std::string truth_;
  std::vector<QueryRow> rows_;
  bool any_wrong_ = false;
  double fault_us_ = -1;
};

}  // namespace

const char* to_string(Fault fault) {
  switch (fault) {
    case Fault::kKill:
      return "is killed before its first exchange";
    case Fault::kKillLater:
      return "is killed amid decodes that all repeat";
    case Fault::kStop:
      return "does not come";
    case Fault::kShape:
      return "decodes another shape";
    case Fault::kError:
      return "has an argument that is refused";
    case Fault::kNone:
      break;
  }
  return "does nothing wrong";
}

int reporting_rank(const ParallelOptions& options) {
  return options.fault != Fault::kNone && options.faulty_rank == 0 ? 1 : 0;
}

Status divide(const std::string& mode, int ranks, Division* division) {
  *division = {};
  if (mode == "context") {
    division->pages = ranks;
  } else if (mode == "heads") {
    division->heads = ranks;
  } else if (mode == "batch") {
    division->batch = ranks;
  } else if (mode == "both") {
    if (ranks < 4 || ranks % 2 != 0) {
      return {StatusCode::kInvalidArgument,
              fmt::format("ranks = {} must be 4 or more, and even, to share heads and pages both",
                          ranks)};
    }
    division->heads = 2;
    division->pages = ranks / 2;
  } else {
    return {StatusCode::kInvalidArgument,
            "mode \"" + mode + "\" must be context, heads, batch or both"};
  }
  return {};
}

int run_rank(const ParallelOptions& options, const Seat& seat, const MakeTransport& make_transport,
             Json* report) {
  const auto begin = WallClock::now();
  RankRun rank(options, seat, make_transport, report);
  Status status = rank.begin();
  const bool has_begun = status.ok();
  if (status.ok()) status = rank.run();
  const double since_fault = rank.seconds_since_fault();
  if (status.ok() && since_fault >= 0) {
    status = {StatusCode::kRankFailed, "the fault was not noticed"};
  } else if (since_fault >= 0 && rank.reports()) {
    (*report)["fault"] = {{"fault", to_string(options.fault)},
                          {"rank", options.faulty_rank},
                          {"ranks", seat.ranks},
                          {"shape", options.cases[0].shape.name},
                          {"time_limit_ms", options.time_limit.count()},
                          {"status", status.to_string()},
                          {"seconds", since_fault}};
  }
  if (status.ok()) return rank.any_wrong() ? kWrong : kRight;
  rank.fail(status);
  fmt::print(stderr, "mla_parallel: rank {}, {}: {}\n", seat.rank,
             since_fault >= 0 ? fmt::format("{:.3f} s after the fault", since_fault)
                              : fmt::format("after {:.1f} s", seconds_since(begin)),
             status.to_string());
  return has_begun ? kWrong : kNothingRun;
}

std::vector<ParallelCase> conformance_cases(int ranks, int page_size) {
  std::vector<ParallelCase> cases;
  size_t turn = 0;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int seqlen_q : {1, 2, 4}) {
      for (const bool causal : {false, true}) {
        for (const DataKind data : {DataKind::kNeedles, DataKind::kFlat}) {
          for (const Exchange exchange : kExchanges) {
            ParallelCase one;
            one.mode = "context";
            one.division.pages = ranks;
            const int turns[] = {1, 0, 2};  // 0: contiguous
            one.division.settings = {turns[(turn + turn / 3) % 3], exchange,
                                     1 + static_cast<int>(turn % 2) * 2};
            DecodeCase& spec = one.shape.spec;
            spec.dtype = dtype;
            spec.seqlen_q = seqlen_q;
            spec.causal = causal;
            spec.data = data;
            spec.page_size = page_size;
            spec.seed = turn % 4;
            spec.num_heads_q = turn % 2 == 0 ? 16 * ranks : 128;
            if (spec.num_heads_q % ranks != 0) spec.num_heads_q = 16 * ranks;
            const int p = page_size;
            spec.lengths = {0,         1,        3, p - 1, p, p + 1, ranks * p, ranks * p + 1,
                            5 * p - 2, 9 * p + 2};
            spec.batch = static_cast<int>(spec.lengths.size());
            one.shape.name = fmt::format("{}", shape_name(make_data_set(spec)));
            cases.push_back(one);
            ++turn;
          }
        }
      }
    }
  }
  return cases;
}

}  // namespace mla::bench
