// mla_run trace: every event of some blocks of a decode on the model.
#include <fmt/format.h>

#include <fstream>
#include <iterator>

#include "bench/measure/memory.h"
#include "bench/measure/shapes.h"
#include "bench/measure/write_file.h"
#include "bench/tools/chrome_recording.h"
#include "bench/tools/mla_run.h"
#include "reference/gpu_model/recording.h"
#include "reference/testing/device_data.h"
#include "reference/testing/recording_check.h"

namespace mla::bench {
namespace {

/// Decodes with the events written down; a plan is made before, and not recorded.
Status record(const Stage& stage, const DecodeCase& spec, uint64_t schedule,
              gpu_model::Recording* recording) {
  Machine& machine = model_machine();
  const DataSet data = make_data_set(spec);
  DeviceTensors tensors;
  MLA_RETURN_IF_ERROR(generate_on_device(machine, data, &tensors));
  WorkspaceBytes bytes;
  MLA_RETURN_IF_ERROR(workspace_bytes(stage, data.problem, machine.limits(), &bytes));
  DeviceBuffer plan, scratch;
  MLA_RETURN_IF_ERROR(plan.allocate(machine, bytes.plan));
  MLA_RETURN_IF_ERROR(scratch.allocate(machine, bytes.scratch));
  gpu_model::schedule().seed = schedule;
  MLA_RETURN_IF_ERROR(plan_decode(stage, data.problem, tensors.tensors().seqlens_k, plan));
  gpu_model::schedule().recording = recording;
  Status status = decode_planned(stage, data.problem, tensors.tensors(), plan, scratch);
  gpu_model::schedule().recording = nullptr;
  return status;
}

std::string describe(const RecordingSummary& summary) {
  const auto counted = [](uint64_t count, const char* one, const char* many) {
    return fmt::format("{} {}", count, count == 1 ? one : many);
  };
  return counted(summary.launches, "launch", "launches") + ", " +
         counted(summary.blocks, "block", "blocks") + ": " +
         counted(summary.events, "event", "events") + ", " +
         counted(summary.waits, "wait", "waits") + ", " +
         counted(summary.copies, "copy", "copies") + ", " +
         counted(summary.phases, "mbarrier phase", "mbarrier phases") + ", " +
         counted(summary.products, "wgmma of a warp", "wgmma of warps");
}

int check_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file) return refuse({StatusCode::kFileError, path + " cannot be read"});
  RecordingSummary summary;
  if (const Status status = check_recording(text, &summary); !status.ok()) {
    return refuse({status.code(), path + ": " + status.message()}, kWrong);
  }
  fmt::print("{}: right; {}{}{}\n", path, describe(summary), summary.truncated ? "; truncated" : "",
             summary.error.empty() ? "" : "; the kernel was rejected: " + summary.error);
  return kRight;
}

}  // namespace

int run_trace(const RunOptions& options, const TraceOptions& trace) {
  const auto invalid = [](const std::string& message) {
    return refuse({StatusCode::kInvalidArgument, message});
  };
  if (!trace.check.empty()) {
    if (!options.stage.empty() || !options.shape.empty() || !options.out.empty() ||
        !trace.chrome.empty()) {
      return invalid("--check reads a recording: leave out all other options");
    }
    return check_file(trace.check);
  }
  if (options.shape.empty()) return invalid("--shape is missing; see --help");
  if (options.out.empty() && trace.chrome.empty())
    return invalid("-o is missing: where to write the recording");
  if (options.out == trace.chrome) {
    return invalid("-o and --chrome are the same file, " + options.out);
  }
  if (options.stage == "all" || options.stage == "reference") {
    return invalid("--stage " + options.stage + " names no single stage, such as --stage 08");
  }
  for (const std::string& file : {options.out, trace.chrome}) {
    if (const Status status = check_writable(file); !status.ok()) return refuse(status);
  }
  if (trace.multiprocessors > 0) gpu_model::device().multiprocessors = trace.multiprocessors;
  std::vector<Placement> placements;
  Status status = place(options.stage, "model", &placements);
  if (!status.ok()) return refuse(status);
  const Placement& placement = placements.front();
  if (!placement.why_not.ok()) return refuse(placement.why_not);
  if (placement.stage->on_cpu) {
    return refuse({StatusCode::kUnsupported,
                   placement.slug + " runs on the CPU, and has no kernels to record"});
  }
  Shape shape;
  status = parse_shape(options.shape, &shape);
  if (status.ok()) {
    shape.spec.seed = options.seed.value_or(0);
    status = check_cache_format(*placement.stage, {.cache_format = shape.spec.cache_format});
  }
  if (status.ok()) {
    status = check_fits("shape " + shape.name, footprint(shape.spec), &model_machine(), 0);
  }
  if (!status.ok()) return refuse(status);

  const uint64_t schedule = trace.schedule.value_or(shape.spec.seed);
  gpu_model::RecordingOptions wanted{.blocks = trace.blocks,
                                     .max_events = trace.max_events,
                                     .max_bytes = size_t{trace.max_mib} << 20};
  if (trace.all_blocks) wanted.blocks.clear();
  gpu_model::Recording recording(wanted);
  const Status decoded = record(*placement.stage, shape.spec, schedule, &recording);
  if (!decoded.ok() && decoded.code() != StatusCode::kKernelRejected)
    return refuse(decoded, kWrong);
  const std::string json = recording.json({{"stage", placement.slug},
                                           {"shape", shape.name},
                                           {"seed", std::to_string(shape.spec.seed)},
                                           {"schedule", std::to_string(schedule)}});
  RecordingSummary summary;
  status = check_recording(json, &summary);
  if (!status.ok()) {
    return refuse({status.code(), "the recording contradicts itself: " + status.message()}, kWrong);
  }
  if (summary.blocks == 0) return invalid("no launch has a block of that number");
  std::string chrome;
  if (!trace.chrome.empty()) status = chrome_recording(json, &chrome);
  std::vector<FileContent> files;
  if (!options.out.empty()) files.push_back({options.out, {json}});
  if (!trace.chrome.empty()) files.push_back({trace.chrome, {chrome}});
  if (status.ok()) status = write_files(files);
  if (!status.ok()) return refuse(status, kWrong);
  for (const FileContent& file : files) fmt::print("wrote {}\n", file.path);
  fmt::print("{}\n", describe(summary));
  if (summary.truncated) {
    fmt::print(
        "note: truncated, because later events did not fit; see --max-events and --max-mib\n");
  }
  return decoded.ok() ? kRight : refuse(decoded, kWrong);
}

}  // namespace mla::bench
