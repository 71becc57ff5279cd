/// @file
/// mla_formats: what each cache format does to results, by length, by how peaked the softmax is, and with
/// latent or rotary columns that are larger than the others.
#include <fmt/format.h>

#include <map>
#include <nlohmann/json.hpp>

#include "bench/measure/cache_errors.h"
#include "bench/measure/program.h"
#include "bench/measure/progress.h"
#include "bench/measure/table.h"
#include "bench/measure/write_file.h"

namespace mla::bench {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::vector<int> tokens = {256, 4096, 32768};
  std::vector<double> deviations = {0.01, 1, 4, 16};
  std::vector<int> outliers = {0, 4};
  std::vector<double> rotary = {1};
  int heads = 16;
  uint64_t seed = 0;
  ScaleRule rule = ScaleRule::kLargest;
  std::string out;
};

int refuse(const Status& status, int exit_code = kNothingRun) {
  return complain("mla_formats", status, exit_code);
}

Json json_of(const Distance& distance) {
  return {{"out_rel_l2", distance.out},
          {"out_ordinary_rel_l2", distance.out_ordinary},
          {"out_max", distance.out_max},
          {"lse_max", distance.lse}};
}

Json json_of(const ErrorCase& spec, const CacheErrors& errors) {
  Json json{{"tokens", spec.tokens},
            {"deviation", errors.deviation},
            {"outliers", spec.outliers},
            {"rotary", spec.rotary},
            {"softmax_scale", errors.softmax_scale},
            {"formats", Json::object()}};
  for (const CacheError& one : errors.all) {
    Json format{{"row_bytes", one.row_bytes}};
    if (one.cache_scale > 0) format["cache_scale"] = one.cache_scale;
    format["from_exact"] = json_of(one.from_exact);
    if (one.format != mla::to_string(CacheFormat::k16Bit)) {
      format["from_16_bits"] = json_of(one.from_16_bits);
    }
    json["formats"][one.format] = std::move(format);
  }
  return json;
}

std::vector<ErrorCase> cases_of(const Options& options) {
  std::vector<ErrorCase> cases;
  for (const int outliers : options.outliers) {
    for (const double rotary : options.rotary) {
      for (const int tokens : options.tokens) {
        cases.push_back({tokens, options.heads, outliers, rotary, options.seed});
      }
    }
  }
  return cases;
}

int compute(const Options& options) {
  if (const Status status = check_writable(options.out); !status.ok()) return refuse(status);
  Json all{{"schema", "flashmla_formats/1"},
           {"heads", options.heads},
           {"seed", options.seed},
           {"scale_rule", options.rule == ScaleRule::kLargest ? "largest" : "power_of_two"},
           {"outlier_factor", kOutlierFactor},
           {"cases", Json::array()}};
  std::vector<std::string> head{"tokens", "logits' deviation", "outliers", "rotary"};
  for (const std::string what : {"out, ", "lse, "}) {
    for (const CacheFormat format : kCacheFormats) head.push_back(what + mla::to_string(format));
    head.push_back(what + kRotaryInE4M3);
  }
  Table table(head);
  Progress progress;
  for (const ErrorCase& spec : cases_of(options)) {
    progress.step(fmt::format("{} tokens", spec.tokens));
    std::vector<CacheErrors> errors;
    if (const Status status = cache_errors(spec, options.deviations, options.rule, &errors);
        !status.ok()) {
      progress.clear();
      return refuse(status);
    }
    for (const CacheErrors& one : errors) {
      std::vector<std::string> row{std::to_string(spec.tokens), number(one.deviation),
                                   std::to_string(spec.outliers), number(spec.rotary)};
      for (const CacheError& format : one.all) {
        row.push_back(error(format.from_exact.out_ordinary));
      }
      for (const CacheError& format : one.all) row.push_back(error(format.from_exact.lse));
      table.add(row);
      all["cases"] += json_of(spec, one);
    }
  }
  progress.clear();
  fmt::print(
      "{}out: relative L2 error over {} heads, in the columns that are no outliers; lse: the "
      "largest "
      "error. Both are errors against\nfloat64 results of the values before these are rounded to "
      "bf16; every cache is made of the rounded values. Outlier columns\nare {:g} times as large. "
      "Only this study has {}: there, rotary columns have 8 bits, too, and a scale of\ntheir "
      "own.\n",
      table.to_string(), options.heads, kOutlierFactor, kRotaryInE4M3);
  if (options.out.empty()) return kRight;
  const Status status = write_file(options.out, all.dump(1) + "\n");
  return status.ok() ? kRight : refuse(status, kWrong);
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Computes on the host what each cache format (docs/cache_formats.md) does to results. "
      "mla_run quantise does it for tensors from files.\nExamples:\n  mla_formats\n"
      "  mla_formats --tokens 1024 --deviations 1,2,4,8 --outliers 0,1,16 --out formats.json\n"
      "  mla_formats --tokens 8192 --outliers 0 --rotary 1,4,16"};
  app.add_option("--tokens", options.tokens, "Lengths of the one sequence, separated by commas")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option(
         "--deviations", options.deviations,
         "Standard deviations of the logits, which the scale gives: how peaked the softmax is")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option(
         "--outliers", options.outliers,
         "How many of the 512 latent columns are outliers, 20 times as large in every token")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--rotary", options.rotary,
                 "Factors: the 64 rotary columns are this many times as large in every token")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--heads", options.heads, "Query heads")->capture_default_str();
  app.add_option("--seed", options.seed, "Seed of the values")->capture_default_str();
  const std::map<std::string, ScaleRule> rules{{"largest", ScaleRule::kLargest},
                                               {"power_of_two", ScaleRule::kPowerOfTwo}};
  app.add_option("--rule", options.rule,
                 "How scales come from the largest value: largest (default), or power_of_two")
      ->transform(CLI::CheckedTransformer(rules).description("{largest,power_of_two}"))
      ->type_name("TEXT");
  app.add_option("--out", options.out, "Write everything here, as JSON");
  app.footer(kExitCodes);
  if (int code = 0; !parse(app, argc, argv, &code)) return code;
  return compute(options);
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run_program("mla_formats", mla::bench::run, argc, argv);
}
