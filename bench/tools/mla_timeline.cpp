// Shows who does what when inside one launch of a stage that says so (stages/common/timeline.h).
//
// Exit code: 0 all right; 1 the run failed; 2 nothing was run: bad input, or no such machine.
#include <algorithm>

#include "bench/measure/memory.h"
#include "bench/measure/program.h"
#include "bench/measure/shapes.h"
#include "bench/measure/write_file.h"
#include "bench/tools/timeline.h"
#include "reference/testing/device_data.h"
#include "stages/common/stage.h"

namespace mla::bench {
namespace {

struct Options {
  std::string stage, machine = "gpu", shape = "h128_q1_b2_k4096", trace, picture;
  std::vector<int> blocks = {0};
  double from_us = 0, to_us = 1e9;
};

Status write(const std::string& path, const std::string& text) {
  MLA_RETURN_IF_ERROR(write_file(path, text));
  std::cout << "wrote " << path << "\n";
  return {};
}

Status attach(MachineKind kind, const timeline::Recording& recording) {
  for (const timeline::Attach set : timeline::attachments(kind)) {
    MLA_RETURN_IF_ERROR(set(recording));
  }
  return {};
}

/// Decodes twice, because the first run finds caches cold and code not loaded, and records the second.
Status record(Machine& machine, const Stage& stage, const DecodeCase& spec, int blocks,
              std::vector<timeline::Record>* records) {
  const DataSet data = make_data_set(spec);
  DeviceTensors tensors;
  MLA_RETURN_IF_ERROR(generate_on_device(machine, data, &tensors));
  DeviceBuffer workspace, buffer;
  MLA_RETURN_IF_ERROR(allocate_workspace(stage, data.problem, &workspace));
  records->resize(size_t{timeline::kTracks} * static_cast<size_t>(blocks));
  MLA_RETURN_IF_ERROR(buffer.allocate(machine, records->size() * sizeof(timeline::Record)));
  for (const bool warm : {false, true}) {
    MLA_RETURN_IF_ERROR(machine.fill(buffer.data(), 0, buffer.bytes()));
    MLA_RETURN_IF_ERROR(machine.synchronize());
    if (warm) {
      MLA_RETURN_IF_ERROR(
          attach(stage.machine, {buffer.as<timeline::Record>(), static_cast<unsigned>(blocks)}));
    }
    MLA_RETURN_IF_ERROR(decode(stage, data.problem, tensors.tensors(), workspace));
    MLA_RETURN_IF_ERROR(machine.synchronize());
  }
  MLA_RETURN_IF_ERROR(attach(stage.machine, {nullptr, 0}));
  return machine.copy_to_host(records->data(), buffer.data(), buffer.bytes());
}

int refuse(const Status& status, int code = kNothingRun) {
  return complain("mla_timeline", status, code);
}

int run(const Options& options) {
  for (const std::string& file : {options.trace, options.picture}) {
    if (const Status status = check_writable(file); !status.ok()) return refuse(status);
  }
  const bool on_gpu = options.machine == "gpu";
  std::string why_not;
  Machine* machine = on_gpu ? gpu_machine(&why_not) : &model_machine();
  if (machine == nullptr) return refuse({StatusCode::kUnavailable, why_not});
  const Stage* stage = find_stage(machine->kind(), options.stage);
  if (stage == nullptr) {
    std::string known;
    for (const Stage& other : stages(machine->kind())) known += " " + other.slug;
    return refuse({StatusCode::kInvalidArgument,
                   "no stage " + options.stage +
                       " that records; there are:" + (known.empty() ? " none" : known)});
  }
  Shape shape;
  Status status = check_device(*stage, machine->limits());
  if (status.ok()) status = parse_shape(options.shape, &shape);
  if (status.ok()) {
    status = check_cache_format(*stage, {.cache_format = shape.spec.cache_format});
  }
  if (status.ok()) {
    status = check_fits("shape " + shape.name, footprint(shape.spec), machine, 0);
  }
  if (!status.ok()) return refuse(status);

  std::vector<timeline::Record> records;
  std::vector<BlockTimeline> timelines;
  const int last = *std::max_element(options.blocks.begin(), options.blocks.end());
  status = record(*machine, *stage, shape.spec, last + 1, &records);
  if (status.ok()) status = read_timelines(records, options.blocks, &timelines);
  if (!status.ok()) return refuse(status, kWrong);
  for (BlockTimeline& timeline : timelines) {
    timeline = cut(timeline, options.from_us, options.to_us);
  }

  const std::string title = stage->slug + ", " + shape.name + ", " + machine->description() +
                            (on_gpu ? "" : "; a clock of the model is one event");
  std::cout << title << "\n";
  for (const BlockTimeline& timeline : timelines) std::cout << summary(timeline);
  if (!options.trace.empty()) status = write(options.trace, chrome_trace(timelines, title));
  if (status.ok() && !options.picture.empty()) {
    status = write(options.picture, svg(timelines, title));
  }
  return status.ok() ? kRight : refuse(status, kWrong);
}

int parse_and_run(int argc, char** argv) {
  Options options;
  CLI::App app("Shows what each warpgroup and the TMA thread do, clock by clock, in one launch.");
  app.add_option("--stage", options.stage, "A stage that records (08 or 08_seesaw)")->required();
  app.add_option("--machine", options.machine,
                 "gpu, or model, which knows only the order of events")
      ->check(CLI::IsMember({"gpu", "model"}))
      ->capture_default_str();
  app.add_option("--shape", options.shape, "A shape, as in mla_run")->capture_default_str();
  app.add_option("--block", options.blocks, "Which blocks of the grid to show")
      ->check(CLI::Range(0, 1023))
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--from-us", options.from_us,
                 "Show what comes after this time, from a block's first event on");
  app.add_option("--to-us", options.to_us, "Show what comes before this time");
  app.footer(kExitCodes);
  app.add_option("--trace", options.trace, "Write a Chrome trace here (.json)");
  app.add_option("--svg", options.picture, "Write a picture here (.svg)");
  if (int code = 0; !parse(app, argc, argv, &code)) return code;
  const auto invalid = [](const std::string& message) {
    return refuse({StatusCode::kInvalidArgument, message});
  };
  if (!options.trace.empty() && options.trace == options.picture) {
    return invalid("--trace and --svg are the same file, " + options.trace);
  }
  if (!(options.from_us < options.to_us)) {
    return invalid("--from-us must be before --to-us: nothing would be shown");
  }
  return run(options);
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run_program("mla_timeline", mla::bench::parse_and_run, argc, argv);
}
