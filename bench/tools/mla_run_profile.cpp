// mla_run profile: what a stage's kernels do to memory, counted on the model.
#include <fmt/format.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bench/profile/profile.h"
#include "bench/tools/mla_run.h"
#include "bench/tools/stage_runner.h"
#include "reference/gpu_model/named_devices.h"
#include "stages/common/choose/choose.h"

namespace mla::bench {
namespace {

/// Registers per thread of a stage's kernels, as ptxas gave them when counters were recorded on a GPU.
std::map<std::string, unsigned> recorded_registers(const std::string& slug) {
  std::map<std::string, unsigned> registers;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(
           std::filesystem::path(MLA_SOURCE_FOLDER) / "bench/results", error)) {
    if (!file.path().filename().string().starts_with("counters_gpu")) continue;
    std::ifstream stream(file.path());
    const auto json = nlohmann::json::parse(stream, nullptr, false);
    if (!json.is_object()) continue;
    // bench/report/counters.py wrote it.
    for (const auto& run : json.value("runs", nlohmann::json::array())) {
      if (run.value("stage", "") != slug) continue;
      for (const auto& [name, kernel] : run["kernels"].items()) {
        registers[name] = std::max(registers[name], kernel.value("registers", 0U));
      }
    }
  }
  return registers;
}

/// Runs the stage once on the model.
Status count(const Placement& placement, const Dump& dump, gpu_model::Profile* profile) {
  gpu_model::Schedule& schedule = gpu_model::schedule();
  schedule.profile = profile;  // before memory is allocated: it is aligned for it
  StageRunner runner;
  double seconds = 0;
  Status status = runner.prepare(placement, dump);
  if (status.ok()) status = runner.run(&seconds);
  schedule.profile = nullptr;
  return status;
}

}  // namespace

int run_profile(const RunOptions& options, char** arguments) {
  // Kernels that can be counted are in a program of their own: their inline functions must not be mixed with others.
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  const std::string name = self.filename().string();
  if (name.starts_with("mla_run")) {
    const std::filesystem::path other = self.parent_path() / ("mla_profile" + name.substr(7));
    execv(other.c_str(), arguments);
    return refuse(
        {StatusCode::kUnavailable,
         fmt::format(
             "{} cannot be started: {}. It is built with mla_run, but not with AddressSanitizer, "
             "under which kernels cannot be counted",
             other.string(), std::strerror(errno))});
  }
  if (options.stage == "reference") {
    return refuse({StatusCode::kInvalidArgument,
                   "profile is for stages; the reference has no kernels to count"});
  }
  if (options.json && options.listing) {
    return refuse({StatusCode::kInvalidArgument, "--json and --listing exclude each other"});
  }
  for (const gpu_model::NamedDevice& device : gpu_model::named_devices()) {
    if (device.name == options.device) gpu_model::device() = device.device;
  }
  std::vector<Placement> placements;
  Dump dump;
  Status status = place(options.stage, "model", &placements);
  if (status.ok()) {
    status = load_problem(options, {.decodes = true, .machine = &model_machine()}, &dump);
  }
  if (!status.ok()) return refuse(status);
  leave_out_unable(dump.problem, &placements);
  for (Placement& placement : placements) {
    if (!placement.why_not.ok() || !placement.stage->on_cpu) continue;
    placement.why_not = {StatusCode::kUnsupported,
                         placement.slug + " runs on the CPU, and has no kernels to count"};
  }
  gpu_model::schedule().seed = options.schedule;
  gpu_model::schedule().detect_races = false;
  if (!options.json) fmt::print("{}\n", describe(dump));
  bool any = false;
  for (const Placement& placement : placements) {
    if (!placement.why_not.ok()) {
      if (placements.size() == 1) return refuse(placement.why_not);
      continue;
    }
    any = true;
    std::string slug = placement.slug;  // whose kernels run
    if (Choice choice;
        slug == kAutoSlug &&
        choose(MachineKind::kModel, dump.problem, placement.machine->limits(), &choice).ok()) {
      slug = choice.stage->slug;
    }
    gpu_model::Profile profile;
    status = count(placement, dump, &profile);
    if (!status.ok()) return refuse(status, kWrong);
    const std::vector<KernelProfile> kernels = profile_kernels(profile, recorded_registers(slug));
    if (options.json) {
      nlohmann::ordered_json json{{"schema", "flashmla_counters/1"},
                                  {"stage", placement.slug},
                                  {"problem", problem_arguments(options)},
                                  {"machine", placement.machine->description()}};
      json["kernels"] = profile_json(kernels);
      fmt::print("{}\n", json.dump());
    } else {
      fmt::print("\n{}: {}\n{}", placement.slug, placement.idea, profile_table(kernels));
      if (options.listing) fmt::print("{}", profile_listing(kernels, MLA_SOURCE_FOLDER));
    }
  }
  return any ? kRight
             : refuse({StatusCode::kUnsupported, "no stage runs on this device, on this cache"});
}

}  // namespace mla::bench
