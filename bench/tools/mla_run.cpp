// Runs one stage, or all, on tensors dumped from a model (.npy), or on generated ones: the command line.
//
// Exit codes: bench/measure/program.h.
#include "bench/tools/mla_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "bench/measure/build_info.h"
#include "bench/measure/choice_option.h"
#include "bench/measure/format_option.h"
#include "bench/measure/memory.h"
#include "bench/measure/shapes.h"
#include "reference/float16.h"
#include "reference/gpu_model/named_devices.h"
#include "reference/testing/device_data.h"

namespace mla::bench {
namespace {

Status place_on_gpu(const std::string& slug, Placement* placement) {
  std::string why_not;
  const Stage* stage = find_stage(MachineKind::kGpu, slug, &why_not);
  if (stage == nullptr) return {StatusCode::kUnavailable, why_not};
  Machine* gpu = gpu_machine(&why_not);
  if (gpu == nullptr) return {StatusCode::kUnavailable, why_not};
  MLA_RETURN_IF_ERROR(check_device(*stage, gpu->limits()));
  placement->stage = stage;
  placement->machine = gpu;
  return {};
}

Status place_on_model(const std::string& slug, Placement* placement) {
  const Stage* stage = find_stage(MachineKind::kModel, slug);
  MLA_RETURN_IF_ERROR(check_device(*stage, model_machine().limits()));
  placement->stage = stage;
  placement->machine = &model_machine();
  return {};
}

}  // namespace

void leave_out_unable(const Problem& problem, std::vector<Placement>* placements) {
  for (Placement& placement : *placements) {
    if (!placement.why_not.ok()) continue;
    placement.why_not = check_cache_format(*placement.stage, problem);
  }
}

int refuse(const Status& status, int exit_code) {
  return complain("mla_run", status, exit_code);
}

Status place(const std::string& name, const std::string& machine,
             std::vector<Placement>* placements) {
  note_choice_table("mla_run", name);
  std::string known;
  std::vector<Stage> asked;
  for (const Stage& stage : stages(MachineKind::kModel)) {
    known += stage.slug + ", ";
    if (name == "all") asked.push_back(stage);
  }
  if (const Stage* one = find_stage(MachineKind::kModel, name)) asked.push_back(*one);
  for (const Stage& stage : asked) {
    Placement placement;
    placement.slug = stage.slug;
    placement.idea = stage.idea;
    if (machine != "model") placement.why_not = place_on_gpu(stage.slug, &placement);
    if (machine == "model" || (machine == "auto" && !placement.why_not.ok())) {
      placement.fallback = placement.why_not.message();
      placement.why_not = place_on_model(stage.slug, &placement);
    }
    placements->push_back(std::move(placement));
  }
  if (!placements->empty()) return {};
  return {StatusCode::kInvalidArgument,
          (name.empty() ? "--stage is missing" : "--stage " + name + " is not known") +
              "; one of " + known + "auto or all needed"};
}

int run_list() {
  std::vector<Stage> listed = stages(MachineKind::kModel);
  listed.push_back(auto_stage(MachineKind::kModel));
  for (const Stage& stage : listed) {
    fmt::print("{:<20} {}\n", stage.slug, stage.idea);
    if (reads_quantised(stage)) {
      fmt::print("{:<20}   reads {}\n", "", names_of_formats(stage));
    }
    for (const char* machine : {"gpu", "model"}) {
      std::vector<Placement> placements;
      if (const Status status = place(stage.slug, machine, &placements); !status.ok()) {
        return refuse(status);
      }
      const Placement& placement = placements.front();
      fmt::print("{:<20}   {:<5}  {}\n", "", machine,
                 placement.why_not.ok() ? where(*placement.stage, *placement.machine)
                                        : placement.why_not.message());
    }
  }
  fmt::print("{:<20} {}\n", "reference", "float64 on the CPU: the truth");
  return kRight;
}

std::string describe(const Dump& dump) {
  const Problem& problem = dump.problem;
  const auto [shortest, longest] =
      std::minmax_element(dump.seqlens_k.begin(), dump.seqlens_k.end());
  return fmt::format(
      "{}, b={} s_q={} h_q={} h_kv={}, {}{} tokens in {} pages, scale {:g}, {}causal{}{}",
      to_string(problem.dtype), problem.batch, problem.seqlen_q, problem.num_heads_q,
      problem.num_heads_kv, *shortest,
      *shortest != *longest ? fmt::format(" to {}", *longest) : std::string(), problem.num_pages,
      problem.softmax_scale, problem.causal ? "" : "not ",
      problem.fixed_split_tokens > 0
          ? fmt::format(", split every {} tokens", problem.fixed_split_tokens)
          : std::string(),
      is_quantised(problem.cache_format)
          ? fmt::format(", cache {}", mla::to_string(problem.cache_format))
          : std::string());
}

namespace {

DataKind data_kind(const std::string& name) {
  for (const DataKind kind : kDataKinds) {
    if (name == mla::to_string(kind)) return kind;
  }
  return DataKind::kFlat;
}

Status invalid(const std::string& message) {
  return {StatusCode::kInvalidArgument, message};
}

/// Reads "0.135234" or "1/24".
Status parse_scale(const std::string& text, float* scale) {
  const auto refused = [&](const std::string& why) {
    return invalid("--scale " + text + " " + why);
  };
  char* rest = nullptr;
  double value = std::strtod(text.c_str(), &rest);
  bool right = rest != text.c_str();
  if (right && *rest == '/') {
    const char* const below = rest + 1;
    value /= std::strtod(below, &rest);
    right = rest != below;
  }
  if (!right || *rest != '\0') return refused("is no number such as 0.135234 or 1/24");
  *scale = static_cast<float>(value);
  if (!(value > 0) || std::isinf(value)) return refused("must be finite and greater than 0");
  if (*scale == 0) return refused("is too small: the scale is a float, in which this becomes 0");
  if (std::isinf(*scale)) return refused("is too large: the scale is a float");
  return {};
}

/// What --dtype and --split say, and the shape's name may say, too.
Status apply_flags(const RunOptions& options, DecodeCase* spec) {
  const DumpFiles& files = options.files;
  if (files.dtype && *files.dtype != DType::kFloat16 && spec->dtype == DType::kFloat16) {
    return invalid("--shape " + options.shape + " ends with _fp16, but --dtype says " +
                   mla::to_string(*files.dtype));
  }
  spec->dtype = files.dtype.value_or(spec->dtype);
  if (files.fixed_split_tokens != 0 && spec->fixed_split_tokens != 0 &&
      files.fixed_split_tokens != spec->fixed_split_tokens) {
    return invalid(fmt::format("--shape {} and --split {} name different splits", options.shape,
                               files.fixed_split_tokens));
  }
  if (files.fixed_split_tokens != 0) spec->fixed_split_tokens = files.fixed_split_tokens;
  spec->causal |= files.causal;
  if (is_quantised(files.cache_format)) {
    if (is_quantised(spec->cache_format) && spec->cache_format != files.cache_format) {
      return invalid(fmt::format("--shape {} and --cache-format {} name different formats",
                                 options.shape, mla::to_string(files.cache_format)));
    }
    spec->cache_format = files.cache_format;
  }
  if (files.cache_scale && spec->cache_format != CacheFormat::kFp8Tensor) {
    return invalid("--cache-scale needs --cache-format fp8_tensor, or a shape with that format");
  }
  spec->cache_scale = files.cache_scale.value_or(0);
  return {};
}

/// Fills `dump` with a generated case, its tensors only if it is to be decoded.
Status generate_dump(const RunOptions& options, const Use& use, Dump* dump) {
  Shape shape;
  MLA_RETURN_IF_ERROR(parse_shape(options.shape, &shape));
  MLA_RETURN_IF_ERROR(apply_flags(options, &shape.spec));
  shape.spec.seed = options.seed.value_or(0);
  shape.spec.data = data_kind(options.data.value_or(to_string(DataKind::kNeedles)));
  const std::string what = "shape " + shape.name;
  const Footprint one = footprint(shape.spec);
  MLA_RETURN_IF_ERROR(use.decodes ? check_fits(what, one, use.machine, /*host_copies=*/1)
                                  : check_tables_fit(what, one));
  DataSet data = make_data_set(shape.spec);
  MLA_RETURN_IF_ERROR(validate(data.problem));
  if (use.decodes) {
    HostTensors tensors = generate(data);
    dump->q.converted = std::move(tensors.q);
    dump->kv_cache.converted = std::move(tensors.kv_cache);
    dump->kv_codes = std::move(tensors.quantised_cache);
    dump->strided = shape.spec.strided;
    dump->table_buffer = std::move(tensors.block_table);
    dump->length_buffer = std::move(tensors.seqlens_k);
  }
  dump->problem = data.problem;
  dump->block_table = std::move(data.block_table);
  dump->seqlens_k = std::move(data.seqlens_k);
  return {};
}

}  // namespace

bool same_file(const std::string& a, const std::string& b) {
  if (a.empty() || b.empty()) return false;
  std::error_code error;
  if (std::filesystem::equivalent(a, b, error)) return true;  // by another name, too
  const auto whole = [&error](const std::string& path) {
    const std::filesystem::path absolute = std::filesystem::absolute(path, error);
    const std::filesystem::path canonical = std::filesystem::weakly_canonical(absolute, error);
    return error ? absolute.lexically_normal() : canonical;
  };
  return whole(a) == whole(b);
}

Status load_problem(const RunOptions& options, const Use& use, Dump* dump) {
  DumpFiles files = options.files;
  if (files.fixed_split_tokens % kGrainTokens != 0) {
    return invalid(
        fmt::format("--split {} must be a multiple of {}", files.fixed_split_tokens, kGrainTokens));
  }
  if (!options.shape.empty()) {
    if (!files.q.empty() || !files.cache.empty() || !files.block_table.empty() ||
        !files.seqlens.empty()) {
      return invalid(
          "--shape generates tensors, but --q, --cache, --block-table, --seqlens name files of "
          "them");
    }
    if (!options.scale.empty()) return invalid("--shape has its own scale: leave out --scale");
    if (files.layout) return invalid("--shape has its own layout, paged: leave out --layout");
    return generate_dump(options, use, dump);
  }
  const std::pair<const char*, bool> wanted[] = {{"--q", !files.q.empty()},
                                                 {"--cache", !files.cache.empty()},
                                                 {"--seqlens", !files.seqlens.empty()},
                                                 {"--scale", !options.scale.empty()}};
  for (const auto& [flag, given] : wanted) {
    if (!given) return invalid(std::string(flag) + " or --shape is missing; see --help");
  }
  for (const auto& [flag, given] : {std::pair("--data", options.data.has_value()),
                                    std::pair("--seed", options.seed.has_value())}) {
    if (given) return invalid(std::string(flag) + " is for generated tensors: it needs --shape");
  }
  if (!files.cache_scale && files.cache_format == CacheFormat::kFp8Tensor) {
    return invalid("--cache-format fp8_tensor needs --cache-scale, because no file holds it");
  }
  if (files.cache_scale && files.cache_format != CacheFormat::kFp8Tensor) {
    return invalid("--cache-scale needs --cache-format fp8_tensor");
  }
  MLA_RETURN_IF_ERROR(parse_scale(options.scale, &files.softmax_scale));
  MLA_RETURN_IF_ERROR(load(files, dump));
  if (!use.decodes) return {};
  return check_fits(files.q + " and " + files.cache, footprint(dump->problem), use.machine,
                    /*host_copies=*/0);
}

std::string problem_arguments(const RunOptions& options) {
  const DumpFiles& files = options.files;
  std::string text;
  const auto add = [&](const char* flag, std::string value) {
    if (value.empty()) return;
    if (value.find_first_of(" '\"$\\*?") != std::string::npos) {  // as a shell takes it
      for (size_t at = 0; (at = value.find('\'', at)) != std::string::npos; at += 4) {
        value.replace(at, 1, "'\\''");
      }
      value = "'" + value + "'";
    }
    text += fmt::format("{}{} {}", text.empty() ? "" : " ", flag, value);
  };
  if (!options.shape.empty()) {
    add("--shape", options.shape);
    add("--seed", std::to_string(options.seed.value_or(0)));
    add("--data", options.data.value_or(to_string(DataKind::kNeedles)));
  } else {
    add("--q", files.q);
    add("--cache", files.cache);
    add("--block-table", files.block_table);
    add("--seqlens", files.seqlens);
    if (files.layout) add("--layout", files.layout == CacheLayout::kPaged ? "paged" : "contiguous");
    add("--scale", options.scale);
  }
  if (files.dtype) add("--dtype", mla::to_string(*files.dtype));
  if (is_quantised(files.cache_format)) {
    add("--cache-format", mla::to_string(files.cache_format));
  }
  if (files.cache_scale) add("--cache-scale", fmt::format("{:.9g}", *files.cache_scale));
  if (files.causal) text += " --causal";
  if (files.fixed_split_tokens != 0) add("--split", std::to_string(files.fixed_split_tokens));
  return text;
}

namespace {

constexpr const char* kDumpHelp = R"(
Dumping from PyTorch, where NumPy has no bfloat16 but 16-bit patterns do:

  numpy.save("q.npy", q.contiguous().view(torch.int16).cpu().numpy())

and from JAX or ml_dtypes: numpy.save("q.npy", numpy.asarray(q).view(numpy.uint16)).

--scale is the factor on q.k before the softmax. It comes from the unabsorbed heads, not from the 576 columns here:
192^-1/2 for DeepSeek-V2 and V3, times (0.1 mscale ln 40 + 1)^2 with YaRN: 0.135234 for V3, 0.114721 for V2-Lite.
)";

/// A subcommand with a name, a line and what ends its help.
CLI::App* add_command(CLI::App& app, const char* name, const char* what, const std::string& more) {
  CLI::App* command = app.add_subcommand(name, what);
  command->footer(more + "\n" + kExitCodes);
  command->get_formatter()->column_width(34);
  return command;
}

void add_stage(CLI::App* command, RunOptions* options, const char* what) {
  command->add_option("--stage", options->stage, what);
  command->add_option("--machine", options->machine, "gpu, model (the CPU plays the GPU), or auto")
      ->check(CLI::IsMember({"gpu", "model", "auto"}))
      ->capture_default_str();
  add_choice_table(command);
}

void add_cache_scale(CLI::App* command, std::optional<float>* scale, const char* what,
                     const char* group) {
  command->add_option("--cache-scale", *scale, what)->check(CLI::PositiveNumber)->group(group);
}

/// How the cache that is decoded is kept.
void add_cache_format(CLI::App* command, RunOptions* options) {
  const char* const group = "The cache's format (docs/cache_formats.md)";
  command
      ->add_option(
          "--cache-format", options->files.cache_format,
          "The format of --cache, a file of |u1 [pages, page_size, h_kv, 656 or 576], or of "
          "the generated cache; by default 16 bits")
      ->transform(format_names(/*quantised=*/false))
      ->type_name("TEXT")
      ->group(group);
  add_cache_scale(
      command, &options->files.cache_scale,
      "The scale of fp8_tensor; by default, generated tensors have the one that they need", group);
}

/// The problem: from files, or generated.
void add_problem(CLI::App* command, RunOptions* options) {
  const char* const inputs = "Tensors from files (.npy, little-endian, C order)";
  DumpFiles& files = options->files;
  command->add_option("--q", files.q, "[b, s_q, h_q, 576]")->group(inputs);
  command
      ->add_option("--cache", files.cache,
                   "[pages, 64, h_kv, 576], or contiguous [b, s, h_kv, 576]")
      ->group(inputs);
  command
      ->add_option("--block-table", files.block_table,
                   "[b, max_pages], page ids: 32 or 64 bits, signed or not")
      ->group(inputs);
  command
      ->add_option("--seqlens", files.seqlens,
                   "[b], tokens per sequence: the same types as page ids")
      ->group(inputs);
  const std::map<std::string, CacheLayout> layouts{{"paged", CacheLayout::kPaged},
                                                   {"contiguous", CacheLayout::kContiguous}};
  command
      ->add_option("--layout", files.layout,
                   "paged or contiguous; by default paged if there is a block table")
      ->transform(CLI::CheckedTransformer(layouts).description("{paged,contiguous}"))
      ->type_name("TEXT")
      ->group(inputs);
  const std::map<std::string, DType> dtypes{{"bf16", DType::kBFloat16}, {"fp16", DType::kFloat16}};
  command
      ->add_option("--dtype", files.dtype,
                   "bf16 or fp16: what files of patterns, <u2 and <i2, hold; values of <f2 and <f4 "
                   "are rounded to it")
      ->transform(CLI::CheckedTransformer(dtypes).description("{bf16,fp16}"))
      ->type_name("TEXT")
      ->group(inputs);
  command
      ->add_option("--scale", options->scale, "Factor on q.k, such as 0.135234 or 1/24; see below")
      ->group(inputs);
  command->add_flag("--causal", files.causal, "Query i of s_q sees tokens 0 ... s_k - s_q + i")
      ->group(inputs);

  command
      ->add_option("--split", files.fixed_split_tokens,
                   "Cut sequences every this many tokens (a multiple of 64): batch-invariant")
      ->check(CLI::PositiveNumber)
      ->group(inputs);

  const char* const generated = "Or generated tensors";
  command
      ->add_option("--shape", options->shape,
                   "Such as h16_q1_b2_k256, h128_q2_b64_kvaried4096_causal, h16_q1_k256+512+1024")
      ->group(generated);
  std::vector<std::string> kinds;
  for (const DataKind kind : kDataKinds) kinds.push_back(mla::to_string(kind));
  command
      ->add_option(
          "--data", options->data,
          "needles (default: a few tokens dominate), flat, extreme values or logits, tiles "
          "of 128 cache columns of many sizes, or values that grow along a sequence")
      ->check(CLI::IsMember(kinds))
      ->group(generated);
  command
      ->add_option("--seed", options->seed, "Odd: DeepSeek-V3's scale; even (default 0): 576^-1/2")
      ->group(generated);
}

/// The device that the model pretends to be.
void add_device(CLI::App* command, RunOptions* options) {
  std::vector<std::string> devices;
  std::string what = "The device that the model pretends to be:";
  for (const gpu_model::NamedDevice& device : gpu_model::named_devices()) {
    devices.push_back(device.name);
    what += fmt::format("{} {} ({})", devices.size() > 1 ? "," : "", device.name, device.what);
  }
  command->add_option("--device", options->device, what)
      ->check(CLI::IsMember(devices))
      ->group("On the model");
}

void add_decode(CLI::App* command, RunOptions* options) {
  add_stage(command, options,
            "A stage (02 or 02_shared_tiled), auto (the fastest, by a table), all, or reference");
  add_problem(command, options);
  add_cache_format(command, options);
  const char* const results = "Results";
  command->add_option("--out", options->out, "Write out [b, s_q, h_q, 512] here (.npy)")
      ->group(results);
  command->add_option("--lse", options->lse, "Write lse [b, h_q, s_q] here (.npy, <f4)")
      ->group(results);
  command->add_option("--out-format", options->out_format, "bits (<u2, the default) or fp32 (<f4)")
      ->check(CLI::IsMember({"bits", "fp32"}))
      ->group(results);
  command
      ->add_option("--check-out", options->check_out,
                   "Your own kernel's out (.npy), to be compared with the reference, too")
      ->group(results);
  command->add_option("--check-lse", options->check_lse, "Your own kernel's lse (.npy), likewise")
      ->group(results);
  const char* const model = "On the model";
  command
      ->add_option(
          "--schedules", options->schedules,
          "Run under this many thread schedules (default 1), or under those of a range such "
          "as 17..19; all must give the same bits")
      ->group(model);
  add_device(command, options);
}

void add_trace(CLI::App* command, RunOptions* options, TraceOptions* trace) {
  command->add_option("--stage", options->stage, "A stage (08 or 08_seesaw)");
  add_choice_table(command);
  command->add_option("--shape", options->shape, "A small shape, such as h16_q1_b2_k256");
  command->add_option(
      "--seed", options->seed,
      "Seed of the data, as in decode, and of the schedule (default 0: the friendly one)");
  command->add_option("--schedule", trace->schedule, "Seed of the schedule, if it is another");
  command
      ->add_option(
          "--block", trace->blocks,
          "Blocks of each grid, by number (default 0); all blocks of a cluster are recorded")
      ->delimiter(',');
  command->add_flag("--blocks", trace->all_blocks, "Every block")->excludes("--block");
  command
      ->add_option("--multiprocessors", trace->multiprocessors,
                   "How many the device has: with fewer, a block gets more of the work")
      ->check(CLI::Range(1, 1024));
  command
      ->add_option("--max-events", trace->max_events, "Keep this many events, and count the rest")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--max-mib", trace->max_mib, "Keep this many MiB of the events' text")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("-o,--out", options->out, "Write the recording here (.json)");
  command->add_option(
      "--chrome", trace->chrome,
      "Write the recording as a Chrome trace, for Perfetto; its time is the order of events");
  command->add_option("--check", trace->check, "Replay a recording, and say whether it is right");
}

void add_quantise(CLI::App* command, RunOptions* options, QuantiseOptions* quantise) {
  add_problem(command, options);
  const char* const results = "Formats";
  command->add_option("--format", quantise->format, "One format; by default all")
      ->transform(format_names(/*quantised=*/true))
      ->type_name("TEXT")
      ->group(results);
  const std::map<std::string, ScaleRule> rules{{"largest", ScaleRule::kLargest},
                                               {"power_of_two", ScaleRule::kPowerOfTwo}};
  command
      ->add_option(
          "--scales", quantise->rule,
          "largest: a tile's largest value has the largest code (default); or power_of_two")
      ->transform(CLI::CheckedTransformer(rules).description("{largest,power_of_two}"))
      ->type_name("TEXT")
      ->group(results);
  add_cache_scale(command, &quantise->cache_scale,
                  "The scale of fp8_tensor; by default that of the largest value of any token",
                  results);
  command
      ->add_option(
          "--out", quantise->out,
          "Write the cache in the format of --format here (.npy, |u1): [pages, page_size, h_kv, "
          "bytes]")
      ->group(results);
}

void add_recommend(CLI::App* command, RecommendOptions* options) {
  Wish& wish = options->wish;
  std::map<std::string, Goal> goals;
  for (const Goal goal : {Goal::kLatency, Goal::kThroughput, Goal::kMemory}) {
    goals[to_string(goal)] = goal;
  }
  command
      ->add_option("--goal", wish.goal,
                   "latency (the shortest step), throughput (the most tokens per second) or memory "
                   "(the fewest bytes per token)")
      ->transform(CLI::CheckedTransformer(goals).description("{latency,throughput,memory}"))
      ->type_name("TEXT")
      ->required();
  command->add_option("--heads", wish.heads, "Query heads of the model")->capture_default_str();
  command->add_option("--layers", wish.layers, "Layers of the model")->capture_default_str();
  command->add_option("--context", wish.context, "Tokens of each sequence")->capture_default_str();
  command->add_option("--batch", wish.batch,
                      "Sequences; by default 1, for throughput as many as bring more");
  command->add_option("--budget", options->budget, "Memory for caches, such as 2GiB");
  command->add_option("--p99", options->p99, "A slow step takes at most this, such as 50ms");
}

/// Runs the program described by the command line; CLI11's own exit codes become ours.
int parse_and_run(int argc, char** argv) {
  CLI::App app(
      "Decodes with the stages, on tensors of a model or generated ones, and explains what they "
      "do.",
      "mla_run");
  app.require_subcommand(1);
  app.get_formatter()->column_width(12);
  app.set_version_flag("--version", fmt::format("mla_run, commit {}", kCommit),
                       "Print the commit that it was built from");
  app.footer(
      "mla_run COMMAND --help says more.\nExample: mla_run decode --stage 02 --shape "
      "h16_q1_b2_k256\n\n" +
      std::string(kExitCodes));

  RunOptions decode, plan, predict, explain, profile, trace, quantise;
  TraceOptions trace_options;
  QuantiseOptions quantise_options;
  RecommendOptions recommend_options;
  CLI::App* command = add_command(
      app, "decode", "Decode with one stage, or all, and compare with the float64 reference", R"(
Examples, the second with the dump in tests/data:

  mla_run decode --stage all --shape h9x3_q2_b3_kvaried100_causal --machine model --schedules 3
  mla_run decode --stage 02 --dtype bf16 --scale 0.135234 \
      --q tests/data/paged/q.npy --cache tests/data/paged/cache.npy \
      --block-table tests/data/paged/block_table.npy --seqlens tests/data/paged/seqlens.npy \
      --out out.npy --lse lse.npy
)" + std::string(kDumpHelp));
  add_decode(command, &decode);

  command = add_command(app, "plan", "Make a stage's plan: who attends to which tokens", R"(
Example:

  mla_run plan --stage 04 --machine model --shape h128_q8_b5_kskew20000)");
  add_stage(command, &plan, "A stage that makes a plan, or all of them");
  add_problem(command, &plan);

  command = add_command(app, "predict",
                        "Print what a stage is expected to spend, and the time that follows",
                        R"(
Times are for the GPU here, or for the recorded one. The own limit is the least time that the stage's design could take
on it; the floor is the least time of any design. With --ranks: a decode over this many H200, in every way to share it.
Examples:

  mla_run predict --stage 08 --shape h128_q1_b64_k4096
  mla_run predict --ranks 2,8 --shape h128_q1_b1_k1000000)");
  add_stage(command, &predict, "A stage, or all");
  add_problem(command, &predict);
  command->add_flag("--json", predict.json,
                    "Print one JSON object per stage, in bytes, FLOP and seconds");
  command
      ->add_option("--ranks", predict.ranks,
                   "Numbers of GPUs that share the decode (docs/parallel.md)")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024));

  command = add_command(
      app, "explain", "Say what binds a shape, what stages spend on it, and what could be done", R"(
Examples:

  mla_run explain --shape h128_q1_b128_k8192
  mla_run explain --stage 08 --shape h16_q1_b1_k8192)");
  add_stage(command, &explain, "The stage to advise on; by default the best one");
  add_problem(command, &explain);

  command = add_command(
      app, "profile", "Count on the model how a stage accesses memory: sectors, bank conflicts", R"(
Counts for every kernel: requests to global memory and the 32-byte sectors that they touch; wavefronts of shared memory
and bank conflicts; what warps execute. docs/counters.md says what is counted, and how it compares with a GPU's counters.
Examples:

  mla_run profile --stage 02 --shape h16_q1_b1_k256
  mla_run profile --stage 02 --shape h16_q1_b1_k256 --listing)");
  command->add_option("--stage", profile.stage, "A stage, or all");
  add_choice_table(command);
  add_problem(command, &profile);
  command->add_flag("--listing", profile.listing,
                    "Also print the kernels' source with the counts beside each line");
  command->add_flag("--json", profile.json, "Print one JSON object per stage, with every line");
  command
      ->add_option(
          "--schedule", profile.schedule,
          "The schedule of the threads (default 0); counts are the same under every schedule")
      ->check(CLI::NonNegativeNumber);
  add_device(command, &profile);
  command = add_command(app, "trace", "Record every event of a block of a decode on the GPU model",
                        R"(
docs/recording.md describes the file. A trace is not a timeline: it knows the order of events and no times.
Examples:

  mla_run trace --stage 08 --shape h64_q1_b1_k256 --seed 3 -o trace.json --chrome chrome.json
  mla_run trace --check trace.json)");
  add_trace(command, &trace, &trace_options);

  command =
      add_command(app, "quantise",
                  "Quantise the cache to 8 bits, and print the error that results get from it", R"(
docs/cache_formats.md says what the formats hold.
Examples:

  mla_run quantise --shape h16_q1_b4_k1024 --data flat
  mla_run quantise --dtype bf16 --scale 0.135234 \
      --q tests/data/paged/q.npy --cache tests/data/paged/cache.npy \
      --block-table tests/data/paged/block_table.npy --seqlens tests/data/paged/seqlens.npy \
      --format fp8_tile128 --out cache_fp8.npy)");
  add_quantise(command, &quantise, &quantise_options);

  command = add_command(app, "recommend",
                        "Say which stage, cache and batch meet a goal, by recorded times", R"(
Exit code 1: nothing that is recorded meets the goal; the table says why.
Examples:

  mla_run recommend --goal latency --heads 128 --context 4096
  mla_run recommend --goal throughput --heads 16 --layers 27 --context 8192 --budget 2GiB --p99 50ms)");
  add_recommend(command, &recommend_options);

  command = add_command(app, "list", "Show the stages, and what can run here", R"(
Example:

  mla_run list)");

  if (argc == 1) return std::cout << app.help(), kNothingRun;
  if (int code = 0; !parse(app, argc, argv, &code)) return code;
  if (app.got_subcommand("decode")) return run_decode(decode);
  if (app.got_subcommand("plan")) return run_plan(plan);
  if (app.got_subcommand("predict")) {
    return predict.ranks.empty() ? run_predict(predict) : run_predict_ranks(predict);
  }
  if (app.got_subcommand("explain")) return run_explain(explain);
  if (app.got_subcommand("profile")) return run_profile(profile, argv);
  if (app.got_subcommand("trace")) return run_trace(trace, trace_options);
  if (app.got_subcommand("quantise")) return run_quantise(quantise, quantise_options);
  if (app.got_subcommand("recommend")) return run_recommend(recommend_options);
  return run_list();
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run_program("mla_run", mla::bench::parse_and_run, argc, argv);
}
