/// @file
/// mla_cost: what a layer costs in every form of attention, and where absorbing pays.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bench/measure/program.h"
#include "bench/measure/recorded.h"
#include "bench/measure/table.h"
#include "reference/layers/cost_model.h"

namespace mla::bench {
namespace {

using cost::Form;
using cost::LayerCost;
using cost::Step;

/// A model, and what its layer would be with another attention of as many heads.
struct Model {
  std::string title;
  int64_t layers;
  cost::Mla mla;
};

Model model_named(const std::string& name) {
  if (name == "v2") return {"DeepSeek-V2", 60, cost::deepseek_v2()};
  if (name == "v2-lite") return {"DeepSeek-V2-Lite", 27, cost::deepseek_v2_lite()};
  if (name == "mha32") {
    const cost::MultiHead mha = cost::mha_32();
    return {"32-head MHA", 32, {.d_model = mha.d_model, .heads = mha.heads}};
  }
  return {"DeepSeek-V3", 61, cost::deepseek_v3()};
}

struct Options {
  std::vector<std::string> models{"v3"};
  std::vector<int64_t> contexts{4096, 32768, 131072};
  int64_t batch = 1;
  int64_t new_tokens = 0;  // 0: decode (1) and prefill (all)
  bool causal = true;
  int64_t element_bytes = 2;
  double tflops = 0;  // 0: recorded, cold
  double gbps = 0;
  bool picture = false;
  std::map<std::string, int64_t> dimensions;  // given on the command line, over the model's
};

/// 4K, 1000
std::string tokens(int64_t count) {
  return count >= 1024 && count % 1024 == 0 ? std::to_string(count / 1024) + "K"
                                            : std::to_string(count);
}

/// One form of attention: a row of the table.
struct Row {
  std::string name;
  Status status;
  LayerCost cost;
};

std::vector<Row> rows_of(const Model& model, const Step& step) {
  const cost::Mla& mla = model.mla;
  std::vector<Row> rows;
  const auto add = [&](const std::string& name, const auto&... layer) {
    Row& row = rows.emplace_back();
    row.name = name;
    row.status = layer_cost(layer..., step, &row.cost);
  };
  const auto standard = [&](int64_t kv_heads) {
    return cost::MultiHead{mla.d_model, mla.heads, kv_heads, mla.nope};
  };
  add("multi-head", standard(mla.heads));
  if (mla.heads > 8 && mla.heads % 8 == 0) add("grouped, 8 KV heads", standard(8));
  add("traditional latent",
      cost::TraditionalLatent{mla.d_model, mla.heads > 0 ? mla.d_model / mla.heads : 0});
  add("MLA, K and V cached", mla, Form::kUnabsorbedExpanded);
  add("MLA, expanded each step", mla, Form::kUnabsorbedLatent);
  add("MLA absorbed", mla, Form::kAbsorbed);
  return rows;
}

/// A dash where there is no such part.
std::string gflop(const cost::Cost& work) {
  return number(work.flop > 0 ? work.flop / 1e9 : kUnknown);
}

/// "core, bytes": the part with the longest least time, and what takes that long.
std::string longest_part(const LayerCost& cost, const Options& options) {
  std::string longest;
  double seconds = 0;
  const auto consider = [&](const char* part, double time, const char* limit) {
    if (!(time > seconds)) return;
    seconds = time;
    longest = std::string(part) + ", " + limit;
  };
  const std::pair<const char*, const cost::Cost*> parts[] = {
      {"projections", &cost.projections}, {"expansion", &cost.expansion}, {"core", &cost.core}};
  for (const auto& [name, work] : parts) {
    consider(name, work->flop / (options.tflops * 1e12), "FLOP");
    consider(name, work->bytes / (options.gbps * 1e9), "bytes");
  }
  return longest;
}

Status print_table(const Model& model, const Options& options, const Step& step) {
  std::cout << "\n"
            << model.title << ", " << step.batch << " x " << tokens(step.context) << " tokens, "
            << (step.new_tokens == step.context && step.context > 1
                    ? "prefill"
                    : tokens(step.new_tokens) + " new per sequence")
            << (step.causal ? "" : ", not causal") << "; one layer\n";
  // Two tables of at most 80 columns: what there is to do, and how long it must take.
  Table work({"attention", "cache B/token", "GFLOP projections", "expansion", "core"});
  Table time({"attention", "cache GB*", "GB", "core FLOP/B", "least µs", "longest part"});
  for (const Row& row : rows_of(model, step)) {
    if (!row.status.ok()) return row.status;
    const LayerCost& cost = row.cost;
    const double cache = cost.cache_bytes_per_token * static_cast<double>(step.batch) *
                         static_cast<double>(step.context) * static_cast<double>(model.layers);
    const double us = 1e6 * roofline_seconds(cost, options.tflops * 1e12, options.gbps * 1e9);
    work.add({row.name, number(cost.cache_bytes_per_token, 1), gflop(cost.projections),
              gflop(cost.expansion), gflop(cost.core)});
    time.add({row.name, number(cache / 1e9), number(cost.total().bytes / 1e9),
              number(cost.core.intensity()), microseconds(us), longest_part(cost, options)});
  }
  std::cout << work.to_string() << "\n"
            << time.to_string() << "* of " << model.layers << " layers\n";
  return {};
}

// --- The picture ---------------------------------------------------------------------------------

struct Costs {
  LayerCost absorbed, latent, expanded;
};
Status costs_of(const cost::Mla& model, const Step& step, Costs* costs) {
  MLA_RETURN_IF_ERROR(layer_cost(model, Form::kAbsorbed, step, &costs->absorbed));
  MLA_RETURN_IF_ERROR(layer_cost(model, Form::kUnabsorbedLatent, step, &costs->latent));
  return layer_cost(model, Form::kUnabsorbedExpanded, step, &costs->expanded);
}

/// Of the two forms with a latent cache: which does less.
char less_work(const Costs& costs) {
  const cost::Cost absorbed = costs.absorbed.total(), latent = costs.latent.total();
  const bool flop = absorbed.flop < latent.flop, bytes = absorbed.bytes < latent.bytes;
  if (flop && bytes) return '#';
  return flop ? 'f' : bytes ? 'b' : '.';
}

/// Which of the three forms has the shortest least time.
char least_time(const Costs& costs, const Options& options) {
  const auto seconds = [&](const LayerCost& cost) {
    return roofline_seconds(cost, options.tflops * 1e12, options.gbps * 1e9);
  };
  const double absorbed = seconds(costs.absorbed), latent = seconds(costs.latent),
               expanded = seconds(costs.expanded);
  if (absorbed < std::min(latent, expanded)) return 'A';
  return expanded < latent ? 'C' : 'E';
}

Status print_picture(const Model& model, const Options& options) {
  constexpr int kColumns = 21;           // half octaves of context from 256 to 256K
  constexpr int64_t kMostNew = 1 << 18;  // octaves of new tokens
  const auto context_of = [](int column) {
    return static_cast<int64_t>(std::lround(256 * std::exp2(column / 2.0)));
  };
  std::cout
      << "\n"
      << model.title << ": where absorbing pays, batch " << options.batch
      << (options.causal ? ", causal\n" : ", not causal\n")
      << "      new tokens per sequence (up), context (right); nothing where new > context\n\n"
      << "      absorbed against expanding each step     least time at " << number(options.tflops)
      << " TFLOP/s, " << number(options.gbps, 4) << " GB/s\n\n";
  for (int64_t new_tokens = kMostNew; new_tokens >= 1; new_tokens /= 2) {
    std::string work, time;
    for (int column = 0; column < kColumns; ++column) {
      Step step{options.batch, new_tokens, context_of(column), options.causal,
                options.element_bytes};
      if (new_tokens > step.context) {
        work += "  ";
        time += "  ";
        continue;
      }
      Costs costs;
      MLA_RETURN_IF_ERROR(costs_of(model.mla, step, &costs));
      work += {less_work(costs), ' '};
      time += {least_time(costs, options), ' '};
    }
    const std::string label = tokens(new_tokens);
    std::string line = std::string(5 - label.size(), ' ') + label + " " + work;
    line.resize(6 + 2 * kColumns - 1, ' ');
    line += "   " + time;
    line.erase(line.find_last_not_of(' ') + 1);
    std::cout << line << "\n";
  }
  std::string axis(2 * kColumns + 10, ' ');
  for (int column = 0; column < kColumns; column += 4) {
    axis.replace(2 * static_cast<size_t>(column), tokens(context_of(column)).size(),
                 tokens(context_of(column)));
  }
  axis.resize(2 * kColumns - 1 + 3, ' ');
  std::cout << "      " << axis;
  for (int column = 0; column < kColumns; column += 4) {
    const std::string label = tokens(context_of(column));
    std::cout << label << std::string(column + 4 < kColumns ? 8 - label.size() : 0, ' ');
  }
  std::cout
      << "\n\n"
      << "      # fewer FLOP and bytes   f fewer FLOP    A absorbed   E K and V expanded each "
         "step\n"
      << "      b fewer bytes   . neither                C K and V cached ("
      << factor(static_cast<double>(model.mla.expanded_row()) /
                static_cast<double>(model.mla.latent_row()))
      << " the memory)\n\n";

  const auto share = [&](Form against) {
    return number(cost::bytes_crossover_share(model.mla, against));
  };
  std::cout << "Expanding one token costs what absorbing adds to "
            << number(cost::pairs_per_expansion(model.mla), 4) << " (query, key) pairs.\n"
            << "Absorbed moves fewer bytes as long as new tokens are less than "
            << share(Form::kUnabsorbedLatent)
            << " of the context\n(against expanding each step), or "
            << share(Form::kUnabsorbedExpanded) << " (against K and V cached).\n\n";
  Table table(
      {"context", "fewer FLOP below", "fewer bytes below", "and below, against K and V cached"});
  for (const int64_t context : options.contexts) {
    const auto s_k = static_cast<double>(context);
    const auto bytes = [&](Form against) {
      return number(s_k * cost::bytes_crossover_share(model.mla, against));
    };
    table.add({tokens(context),
               number(cost::flop_crossover_new_tokens(model.mla, s_k, options.causal), 4),
               bytes(Form::kUnabsorbedLatent), bytes(Form::kUnabsorbedExpanded) + " new tokens"});
  }
  std::cout << table.to_string();
  return {};
}

/// The model with the dimensions that were given.
Model customised(Model model, const Options& options) {
  const std::map<std::string, int64_t*> fields{{"d-model", &model.mla.d_model},
                                               {"heads", &model.mla.heads},
                                               {"q-lora", &model.mla.q_lora},
                                               {"kv-lora", &model.mla.kv_lora},
                                               {"nope", &model.mla.nope},
                                               {"rope", &model.mla.rope},
                                               {"v", &model.mla.v},
                                               {"layers", &model.layers}};
  for (const auto& [name, value] : options.dimensions) {
    *fields.at(name) = value;
    model.title += ", " + name + " " + std::to_string(value);
  }
  return model;
}

Status print(const Model& model, const Options& options) {
  for (const int64_t context : options.contexts) {
    std::vector<int64_t> new_tokens{options.new_tokens};
    if (options.new_tokens == 0) new_tokens = {1, context};
    for (const int64_t count : new_tokens) {
      MLA_RETURN_IF_ERROR(print_table(
          model, options, {options.batch, count, context, options.causal, options.element_bytes}));
    }
  }
  return options.picture ? print_picture(model, options) : Status{};
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Prints what one attention layer costs, computed as multi-head, grouped-query, traditional\n"
      "latent and multi-head latent attention, and where absorbing pays. Nothing is measured.\n"
      "Examples:\n  mla_cost --models v3,v2-lite,mha32\n"
      "  mla_cost --contexts 8K --batch 64 --new-tokens 2\n"
      "  mla_cost --models v2-lite --heads 32 --picture"};
  app.add_option(
         "--models", options.models,
         "v3 (default), v2, v2-lite, mha32: each one's own attention, and the others with as many "
         "heads; separated by commas")
      ->delimiter(',')
      ->check(CLI::IsMember({"v3", "v2", "v2-lite", "mha32"}));
  std::vector<uint64_t> contexts;
  app.add_option("--contexts", contexts, "lengths of the context, in tokens: 4K,32K,128K (default)")
      ->delimiter(',')
      ->transform(CLI::AsSizeValue(false));
  app.add_option("--batch", options.batch, "sequences")->capture_default_str();
  app.add_option("--new-tokens", options.new_tokens,
                 "per sequence; default: 1 (decode), and the whole context (prefill)");
  app.add_flag("!--not-causal", options.causal, "every query sees every token");
  app.add_option("--element-bytes", options.element_bytes,
                 "bytes of an element of weights, activations and cache")
      ->capture_default_str();
  app.add_option("--tflops", options.tflops,
                 "rate of matrix products, for least times; default: the recorded one")
      ->check(CLI::PositiveNumber);
  app.add_option("--gbps", options.gbps,
                 "rate of memory reads in GB/s, for least times; default: the recorded one")
      ->check(CLI::PositiveNumber);
  app.add_flag("--picture", options.picture, "draw where absorbing pays");
  const char* dimensions[] = {"d-model", "heads", "q-lora", "kv-lora",
                              "nope",    "rope",  "v",      "layers"};
  for (const char* name : dimensions) {
    app.add_option_function<int64_t>(
           std::string("--") + name,
           [&options, name](const int64_t& value) { options.dimensions[name] = value; },
           "instead of the model's own")
        ->group("Dimensions");
  }
  app.footer(kExitCodes);
  if (int code = 0; !parse(app, argc, argv, &code)) return code;
  if (!contexts.empty()) {
    options.contexts.clear();
    // A length past 2^63 turns negative here and is refused as such.
    for (const uint64_t context : contexts)
      options.contexts.push_back(static_cast<int64_t>(context));
  }
  if (app.count("--new-tokens") > 0 && options.new_tokens < 1) {
    return complain("mla_cost",
                    {StatusCode::kInvalidArgument,
                     "new-tokens = " + std::to_string(options.new_tokens) + " must be at least 1"});
  }
  if (const auto layers = options.dimensions.find("layers");
      layers != options.dimensions.end() && layers->second < 1) {
    return complain("mla_cost",
                    {StatusCode::kInvalidArgument,
                     "layers = " + std::to_string(layers->second) + " must be at least 1"});
  }
  const int given = (options.tflops > 0) + (options.gbps > 0);
  std::string source = ", as given";
  if (given < 2) {
    Recorded recorded;
    if (const Status status = load_newest_recorded(&recorded); !status.ok()) {
      return complain("mla_cost", status, kWrong);
    }
    source = (given == 1 ? ",\nwhere not given the ceiling of " : ",\nthe cold ceilings of ") +
             recorded.origin();
    if (!(options.tflops > 0)) options.tflops = recorded.ceilings.matrix_cold / 1e12;
    if (!(options.gbps > 0)) options.gbps = recorded.ceilings.read / 1e9;
  }
  std::cout << "A multiply-add is 2 FLOP; " << options.element_bytes
            << "-byte elements. Least time of each part: the longer of\n"
            << "FLOP at " << number(options.tflops) << " TFLOP/s and bytes at "
            << number(options.gbps, 4) << " GB/s" << source << ".\n";
  for (const std::string& name : options.models) {
    if (const Status status = print(customised(model_named(name), options), options);
        !status.ok()) {
      return complain("mla_cost", status);
    }
  }
  return 0;
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run_program("mla_cost", mla::bench::run, argc, argv);
}
