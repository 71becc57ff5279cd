/// @file
/// mla_parallel: decodes over several ranks, a process with a GPU each, or threads on the model.
#include <fmt/format.h>

#include <fstream>
#include <iostream>
#include <map>

#include "bench/measure/choice_option.h"
#include "bench/measure/environment.h"
#include "bench/measure/program.h"
#include "bench/measure/table.h"
#include "bench/measure/write_file.h"
#include "bench/parallel/parallel_run.h"
#include "bench/parallel/rank_timeline.h"
#include "bench/service/scale.h"
#include "stages/common/machine/gpus.h"

namespace mla::bench {
namespace {

struct Options {
  int ranks = 0;
  std::vector<std::string> modes = {"context"};
  std::vector<std::string> exchanges = {"all_gather"};
  std::vector<std::string> shapes;
  std::vector<int> slices = {1};
  int pages_per_turn = 1;
  std::string machine = "auto", fault, out, timeline;
  std::vector<int> predicted_ranks = {1, 2, 4, 8, 16, 32, 64};
  bool predict = false, append = false, print_nccl = false;
  bool conformance = false, times = false, no_check = false, no_graphs = false;
  int time_limit_ms = 20000;
  ParallelOptions run;
};

int refuse(const Status& status, int code = kNothingRun) {
  return complain("mla_parallel", status, code);
}

Status exchange_of(const std::string& name, Exchange* exchange) {
  for (const Exchange one : kExchanges) {
    if (name != to_string(one)) continue;
    *exchange = one;
    return {};
  }
  return {StatusCode::kInvalidArgument,
          "exchange \"" + name + "\" must be all_gather, all_to_all or reduce_scatter"};
}

Status fault_of(const std::string& text, int ranks, ParallelOptions* options) {
  if (text.empty()) return {};
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const std::pair<const char*, Fault> faults[] = {{"kill", Fault::kKill},
                                                  {"kill-later", Fault::kKillLater},
                                                  {"stop", Fault::kStop},
                                                  {"shape", Fault::kShape},
                                                  {"error", Fault::kError}};
  for (const auto& [known, fault] : faults) {
    if (name == known) options->fault = fault;
  }
  const std::string rank = colon == std::string::npos ? "" : text.substr(colon + 1);
  const bool is_number =
      !rank.empty() && rank.size() < 6 && rank.find_first_not_of("0123456789") == std::string::npos;
  if (options->fault == Fault::kNone || !is_number || std::stoi(rank) >= ranks) {
    return {StatusCode::kInvalidArgument,
            "fault \"" + text +
                "\" must be kill, kill-later, stop, shape or error, and a rank: kill:1"};
  }
  options->faulty_rank = std::stoi(rank);
  return {};
}

/// Whether the others can notice it: in exchanges, whose sizes are compared.
Status check_fault(const ParallelOptions& options) {
  if (options.fault == Fault::kNone) return {};
  for (const ParallelCase& one : options.cases) {
    const DecodeCase& spec = one.shape.spec;
    if (one.mode != "context" || one.division.pages < 2) {
      return {StatusCode::kInvalidArgument,
              "--fault is of two ranks or more that share pages: --mode context"};
    }
    if (options.fault == Fault::kShape &&
        (spec.lengths.empty() ? spec.batch : static_cast<int>(spec.lengths.size())) < 2) {
      return {StatusCode::kInvalidArgument,
              "--fault shape is a sequence less, and " + one.shape.name + " has no two"};
    }
  }
  return {};
}

/// Every shape in every mode, with every exchange and number of slices that say something for it.
Status make_cases(const Options& options, int ranks, std::vector<ParallelCase>* cases) {
  if (options.conformance) {
    *cases = conformance_cases(ranks, kDefaultPageSize);
    return {};
  }
  for (const std::string& name : options.shapes) {
    ParallelCase one;
    MLA_RETURN_IF_ERROR(parse_shape(name, &one.shape));
    for (const std::string& mode : options.modes) {
      one.mode = mode;
      MLA_RETURN_IF_ERROR(divide(mode, ranks, &one.division));
      for (const std::string& exchange : options.exchanges) {
        MLA_RETURN_IF_ERROR(exchange_of(exchange, &one.division.settings.exchange));
        for (const int slices : options.slices) {
          one.division.settings.slices = slices;
          one.division.settings.pages_per_turn = options.pages_per_turn;
          cases->push_back(one);
          if (one.division.pages == 1) break;
        }
        if (one.division.pages == 1) break;  // nothing is exchanged
      }
    }
  }
  // Ranks meet anew where others share pages.
  std::stable_sort(cases->begin(), cases->end(), [](const auto& a, const auto& b) {
    return a.division.pages > b.division.pages;
  });
  return {};
}

/// Of --append: the report that is there.
Status read_report(const Options& options, nlohmann::ordered_json* report) {
  std::ifstream file(options.out);
  if (!options.append || !file) return {};
  *report = nlohmann::ordered_json::parse(file, nullptr, false);
  if (!report->is_discarded() && report->contains("context") &&
      (*report)["context"].value("schema", "") == "flashmla_parallel/1") {
    return {};
  }
  return {StatusCode::kFileError, options.out + " is no report of mla_parallel"};
}

/// Of --append: what is in one report was taken in one place, by one commit. Each row says of how many ranks it is.
Status check_same(const nlohmann::ordered_json& there, const nlohmann::ordered_json& here) {
  for (const char* name : {"machine", "gpu", "driver", "nvcc", "host_compiler", "commit", "nccl"}) {
    if (!there.contains(name) || !here.contains(name) || there[name] == here[name]) continue;
    return {StatusCode::kInvalidArgument,
            fmt::format("--append: the report that is there is of {} {}, this run of {}", name,
                        there[name].dump(), here[name].dump())};
  }
  return {};
}

nlohmann::ordered_json json_of(const Context& context) {
  nlohmann::ordered_json json;
  for (const auto& [key, value] : context) json[key] = value;
  return json;
}

/// Writes the report of a run, or adds its rows to the one that is there.
Status write_report(const Options& options, const ParallelOptions& run,
                    const nlohmann::ordered_json& report) {
  if (options.out.empty()) return {};
  nlohmann::ordered_json whole;
  MLA_RETURN_IF_ERROR(read_report(options, &whole));
  nlohmann::ordered_json here;
  if (Machine* machine = find_machine(run.machine); machine != nullptr) {
    here = json_of(describe_environment(*machine));
  }
  here["schema"] = "flashmla_parallel/1";
  if (report.contains("nccl")) here["nccl"] = report["nccl"];
  if (whole.is_null()) {
    whole["context"] = here;
    for (const char* part : {"rows", "conformance", "faults"}) {
      whole[part] = nlohmann::ordered_json::array();
    }
  }
  nlohmann::ordered_json& context = whole["context"];
  MLA_RETURN_IF_ERROR(check_same(context, here));
  if (here.contains("nccl")) context["nccl"] = here["nccl"];  // one rank alone has none
  context["ranks"] = std::max(context.value("ranks", 0), report.value("ranks", 0));
  if (report.contains("fault")) {
    whole["faults"].push_back(report["fault"]);
    return write_file(options.out, whole.dump(1) + "\n");
  }
  if (report.contains("timelines")) {
    for (const auto& one : report["timelines"]) whole["timelines"].push_back(one);
  }
  if (report.contains("conformance")) {
    whole["conformance"].push_back(report["conformance"]);
  } else {
    for (const auto& row : report["rows"]) whole["rows"].push_back(row);
  }
  return write_file(options.out, whole.dump(1) + "\n");
}

/// Of --timeline: the file that Perfetto opens.
Status write_trace(const Options& options, const nlohmann::ordered_json& timeline) {
  nlohmann::ordered_json context;
  if (Machine* machine = find_machine(options.run.machine); machine != nullptr) {
    context = json_of(describe_environment(*machine));
  }
  context.erase("schema");  // that is of times
  return write_file(options.timeline, ranks_chrome_trace(timeline, context));
}

/// Of --timeline: whether there is one to be taken.
Status check_timeline_options(const Options& options) {
  if (options.timeline.empty()) return {};
  MLA_RETURN_IF_ERROR(check_writable(options.timeline));
  const std::vector<ParallelCase>& cases = options.run.cases;
  if (options.conformance || cases.size() != 1) {
    return {StatusCode::kInvalidArgument,
            "--timeline is of one decode: one shape, mode, exchange and number of slices"};
  }
  if (cases[0].mode != "context" || cases[0].division.pages < 2 || cases[0].shape.spec.batch == 0) {
    return {StatusCode::kInvalidArgument,
            "--timeline is of two ranks or more that share pages: --mode context"};
  }
  return {};
}

/// What decodes over many GPUs are predicted to take. On no machine.
int predict(const Options& options) {
  ScaleModel model;
  const Links& links = model.links;
  Status status = check_writable(options.out);
  if (status.ok()) status = load_scale_model(&model);
  if (!status.ok()) return refuse(status);
  nlohmann::ordered_json report{{"context",
                                 {{"schema", "flashmla_scale/1"},
                                  {"decode", model.decode.origin},
                                  {"links", links.origin},
                                  {"merge", links.merge_origin}}},
                                {"links",
                                 {{"exchange_us", links.exchange_us},
                                  {"nvlink_gbps", links.nvlink_gbps},
                                  {"hop_us", links.hop_us},
                                  {"network_gbps", links.network_gbps},
                                  {"network_us", links.network_us},
                                  {"merge_us", links.merge_us},
                                  {"memory_gbps", links.memory_gbps},
                                  {"gpus_per_host", links.gpus_per_host}}}};
  fmt::print("{}", model.describe());
  for (const std::string& name : options.shapes) {
    Shape shape;
    if (status = parse_shape(name, &shape); !status.ok()) return refuse(status);
    std::vector<Forecast> forecasts;
    std::string table;
    status = forecast_all(model, shape, options.predicted_ranks, &forecasts, &table);
    if (!status.ok()) return refuse(status);
    for (const Forecast& one : forecasts) {
      report["rows"].push_back({{"shape", name},
                                {"way", one.way},
                                {"ranks", one.ranks},
                                {"head_ranks", one.head_ranks},
                                {"page_ranks", one.page_ranks},
                                {"decode_us", one.decode_us},
                                {"exchange_us", one.exchange_us},
                                {"merge_us", one.merge_us},
                                {"us", one.us()},
                                {"memory_gb", one.memory_gb()},
                                {"buffers_gb", one.buffers_gb}});
    }
    fmt::print("\n{}\n{}", shape.title(), table);
  }
  if (options.shapes.empty())
    return refuse({StatusCode::kInvalidArgument, "--predict needs a --shape"});
  for (const Crossover& one : crossovers(model)) {
    report["crossovers"].push_back({{"heads", one.heads},
                                    {"sequences", one.sequences},
                                    {"ranks", one.ranks},
                                    {"over_heads", one.over_heads},
                                    {"over_one", one.over_one}});
  }
  if (!options.out.empty()) status = write_file(options.out, report.dump(1) + "\n");
  return status.ok() ? kRight : refuse(status, kWrong);
}

/// NCCL refuses two ranks on one GPU of a host. So each says that it is a host of its own, and what they exchange goes
/// through sockets.
void be_a_host(int rank) {
  setenv("NCCL_HOSTID", fmt::format("rank-{}", rank).c_str(), 1);
}

/// Whether so many ranks can decode on GPUs here: NCCL, or why not.
int print_nccl(const Options& options) {
  const int gpus = count_gpus();
  std::string found;
  Status status;
  if (gpus < options.ranks) {
    found = too_few_gpus(options.ranks, gpus);
  } else {
    std::unique_ptr<NcclApi> nccl;
    status = make_nccl_api(&nccl);
    found = status.ok() ? nccl->description() : status.message();
  }
  fmt::print("{}\n", found);
  return gpus >= options.ranks && status.ok() ? kRight : kWrong;
}

int run(Options options) {
  if (options.predict) return predict(options);
  if (options.print_nccl) return print_nccl(options);
  std::optional<Seat> seat;
  if (const Status status = seat_of_environment(&seat); !status.ok()) return refuse(status);
  // A rank of a launcher tells the others, too.
  const auto refuse = [&](const Status& status) {
    const int code = complain("mla_parallel", status, kNothingRun);
    if (seat) decline(*seat, std::chrono::milliseconds(options.time_limit_ms), status);
    return code;
  };
  if (const Status status = check_writable(options.out); !status.ok()) return refuse(status);
  nlohmann::ordered_json there;
  if (const Status status = read_report(options, &there); !status.ok()) return refuse(status);
  const int ranks = seat ? seat->ranks : std::max(options.ranks, 1);
  if (seat && options.ranks != 0 && options.ranks != ranks) {
    return refuse({StatusCode::kInvalidArgument,
                   fmt::format("--ranks {}, but this process is one of {}", options.ranks, ranks)});
  }
  ParallelOptions& run = options.run;
  run.time_limit = std::chrono::milliseconds(options.time_limit_ms);
  run.check = !options.no_check;
  run.repeat = options.conformance;
  run.graphs = !options.no_graphs;
  // With a seat there are CUDA's GPUs or none; else nothing of CUDA may begin before the ranks are started.
  const int gpus = options.machine == "model" ? 0 : count_gpus();
  if (options.machine == "gpu" && gpus == 0) {
    std::string why_not = "no GPU";
    gpu_machine(&why_not);
    return refuse({StatusCode::kUnavailable, why_not});
  }
  run.machine = gpus > 0 ? MachineKind::kGpu : MachineKind::kModel;
  const bool on_gpu = run.machine == MachineKind::kGpu;
  if (on_gpu && !seat && ranks > gpus && !run.share_gpus) {
    return refuse({StatusCode::kUnavailable,
                   too_few_gpus(ranks, gpus) + ". --share-gpus is for checks on fewer"});
  }
  if (run.share_gpus && !on_gpu) {
    return refuse({StatusCode::kUnavailable, "--share-gpus: ranks on the model share no GPU"});
  }
  if (!on_gpu && seat) {
    return refuse({StatusCode::kUnavailable, "ranks on the model are threads: start one process"});
  }
  if (!there.is_null()) {  // what can be known before CUDA begins
    nlohmann::ordered_json here = json_of(describe_environment(model_machine()));
    here["machine"] = on_gpu ? "gpu" : "model";
    if (const Status same = check_same(there["context"], here); !same.ok()) return refuse(same);
  }
  run.times = options.times;
  run.timeline = !options.timeline.empty();
  if (run.times && !on_gpu) {
    return refuse({StatusCode::kUnavailable, "--times: the model has none; a GPU is needed"});
  }
  Status status = fault_of(options.fault, ranks, &run);
  if (status.ok() && !on_gpu && (run.fault == Fault::kKill || run.fault == Fault::kKillLater)) {
    status = {StatusCode::kInvalidArgument,
              "a thread cannot be killed: --fault stop, shape or error"};
  }
  if (status.ok()) status = make_cases(options, ranks, &run.cases);
  std::string why_not;
  if (status.ok() && find_stage(run.machine, run.stage, &why_not) == nullptr) {
    status = {StatusCode::kInvalidArgument, why_not};
  }
  if (status.ok() && run.cases.empty()) {
    status = {StatusCode::kInvalidArgument, "no --shape, and no --conformance"};
  }
  if (status.ok()) status = check_fault(run);
  if (status.ok()) status = check_timeline_options(options);
  if (!status.ok()) return refuse(status);
  if (!seat || seat->rank == 0) {
    fmt::print("{} ranks, {}\n", ranks,
               run.share_gpus ? "which share GPUs"
               : on_gpu       ? "a GPU each"
                              : "threads on the GPU model");
  }

  // Ranks that are threads meet in memory: in groups of each size that is needed.
  std::map<int, std::vector<std::unique_ptr<Transport>>> threads;
  for (const ParallelCase& one : run.cases) {
    const int pages = one.division.pages;
    if (on_gpu || pages == 1 || threads.contains(pages)) continue;
    for (int group = 0; group < ranks / pages; ++group) {
      std::vector<std::unique_ptr<Transport>> ends;
      status = make_thread_transports(pages, run.time_limit, &ends);
      if (!status.ok()) return refuse(status);
      for (auto& end : ends) threads[pages].push_back(std::move(end));
    }
  }
  const MakeTransport make_transport =
      [&](const Seat& own, int pages, std::unique_ptr<Rendezvous> rendezvous,
          std::unique_ptr<Transport>* transport, NcclApi** api) -> Status {
    if (!on_gpu) {
      *transport = std::move(threads.at(pages)[static_cast<size_t>(own.rank)]);
      return {};
    }
    std::unique_ptr<NcclApi> nccl;
    if (const Status made = make_nccl_api(&nccl); !made.ok()) {
      rendezvous->fail(made);
      return made;
    }
    *api = nccl.get();
    return make_nccl_transport(std::move(rendezvous), std::move(nccl), transport);
  };
  const auto body = [&](const Seat& own) {
    if (run.share_gpus) be_a_host(own.rank);
    nlohmann::ordered_json report;
    int code = run_rank(run, own, make_transport, &report);
    if (own.rank != reporting_rank(run)) return code;
    if (options.conformance && code <= kWrong && report.contains("rows") &&
        report["rows"].size() == run.cases.size()) {
      const auto rows = report["rows"];
      const auto wrong = std::count_if(rows.begin(), rows.end(),
                                       [](const auto& row) { return !row["wrong"].empty(); });
      report["conformance"] = {{"ranks", ranks}, {"cases", rows.size()}, {"wrong", wrong}};
      if (run.share_gpus) report["conformance"]["gpus"] = gpus;
      fmt::print("conformance over {} ranks: {} cases, {} wrong\n", ranks, rows.size(), wrong);
    }
    Status written = report.contains("rows") || report.contains("fault")
                         ? write_report(options, run, report)
                         : Status();
    if (written.ok() && report.contains("timelines")) {
      written = write_trace(options, report["timelines"][0]);
    }
    return written.ok() ? code : complain("mla_parallel", written, kWrong);
  };
  if (seat) {
    std::unique_ptr<Hub> hub;
    if (seat->rank == 0) status = open_hub(seat->hub, ranks, run.time_limit, &hub);
    return status.ok() ? body(*seat) : complain("mla_parallel", status, kNothingRun);
  }
  int code = 0;
  status = on_gpu ? run_processes(ranks, run.time_limit, body, &code)
                  : run_threads(ranks, run.time_limit, body, &code);
  return status.ok() ? code : refuse(status);
}

int parse_and_run(int argc, char** argv) {
  Options options;
  CLI::App app(
      "Decodes over several ranks: a process with a GPU each, connected by NCCL, or threads on the "
      "GPU model.");
  app.add_option("--ranks", options.ranks, "How many ranks to start; under mpirun it says")
      ->check(CLI::Range(1, 1024));
  auto* mode =
      app.add_option(
             "--mode", options.modes,
             "What ranks share: context (pages), heads, batch (sequences), or both (heads by "
             "two, pages by the rest)")
          ->delimiter(',')
          ->check(CLI::IsMember({"context", "heads", "batch", "both"}))
          ->capture_default_str();
  auto* exchange =
      app.add_option("--exchange", options.exchanges, "all_gather, all_to_all, reduce_scatter")
          ->delimiter(',')
          ->check(CLI::IsMember({"all_gather", "all_to_all", "reduce_scatter"}))
          ->capture_default_str();
  auto* shape =
      app.add_option("--shape", options.shapes, "As in mla_run: h128_q1_b8_k4096")->delimiter(',');
  auto* slices = app.add_option("--slices", options.slices,
                                "Slices of the batch: one is exchanged while the next is decoded")
                     ->delimiter(',')
                     ->check(CLI::Range(1, 1024))
                     ->capture_default_str();
  auto* turn =
      app.add_option("--pages-per-turn", options.pages_per_turn,
                     "Pages that are dealt to a rank together; 0: every rank has one run of them")
          ->check(CLI::Range(0, 1 << 30))
          ->capture_default_str();
  app.add_option("--stage", options.run.stage, "A stage, or auto")->capture_default_str();
  app.add_option("--machine", options.machine, "gpu, model or auto")
      ->check(CLI::IsMember({"gpu", "model", "auto"}))
      ->capture_default_str();
  auto* conformance =
      app.add_flag("--conformance", options.conformance,
                   "Check many small cases instead of --shape, each twice, for the same bits");
  auto* times = app.add_flag("--times", options.times, "Take times, on GPUs");
  auto* timeline = app.add_option(
      "--timeline", options.timeline,
      "Write here what every rank is at during one decode, on one clock: a Chrome trace "
      "(.json), for ui.perfetto.dev");
  app.add_flag("--share-gpus", options.run.share_gpus,
               "There may be more ranks than GPUs. For checks of what they do over NCCL: they take "
               "turns on a GPU, and exchange through sockets")
      ->excludes(times)
      ->excludes(timeline);
  auto* no_check =
      app.add_flag("--no-check", options.no_check, "Do not compare with the reference");
  app.add_flag("--no-graphs", options.no_graphs,
               "Enqueue every decode anew, and not as a CUDA graph");
  app.add_option("--warmup", options.run.warmup_s,
                 "Seconds of work before decodes are timed; by default the stage's own");
  app.add_option("--time-limit", options.time_limit_ms, "For which a rank waits for others, in ms")
      ->check(CLI::Range(1, 3600000))
      ->capture_default_str();
  app.add_option("--fault", options.fault,
                 "What one rank does wrong, to see what others make of it, and how soon: kill:1, "
                 "kill-later:1, stop:1, shape:1, error:1");
  app.add_flag("--print-nccl", options.print_nccl,
               "Print NCCL's version, or why --ranks cannot decode on GPUs here, then exit with 1");
  app.add_flag("--predict", options.predict,
               "Decode nothing: predict what --shape takes over many H200");
  app.add_option("--predict-ranks", options.predicted_ranks, "Over how many")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  auto* out = app.add_option("--out", options.out, "Write a report here (.json)");
  app.add_flag("--append", options.append, "Add to the report that is there, if one is")
      ->needs(out);
  for (CLI::Option* other : {mode, exchange, shape, slices, turn, times, no_check}) {
    conformance->excludes(other);  // it has its own
  }
  add_choice_table(&app);
  app.footer(kExitCodes);
  if (int code = 0; !parse(app, argc, argv, &code)) return code;
  note_choice_table("mla_parallel", options.run.stage);
  return run(std::move(options));
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run_program("mla_parallel", mla::bench::parse_and_run, argc, argv);
}
