#include "bench/shapes.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <numbers>
#include <regex>
#include <sstream>

namespace mla::bench {
namespace {

/// Uniform in (0, 1), a function of the counter alone.
double uniform(uint64_t counter) {
  const uint64_t bits = generator::mix((counter + 1) * generator::kStep);
  return (static_cast<double>(bits >> 11) + 0.5) / 9007199254740992.0;
}

/// Lengths whose logarithm is normal, with this mean and half of it as standard deviation.
std::vector<int32_t> log_normal_lengths(int batch, double mean) {
  const double variance = std::log(1 + 0.25);  // of the logarithm: ln(1 + sd^2 / mean^2)
  std::vector<int32_t> lengths;
  for (int i = 0; i < batch; ++i) {
    const auto counter = static_cast<uint64_t>(2 * i);
    const double normal = std::sqrt(-2 * std::log(uniform(counter))) *
                          std::cos(2 * std::numbers::pi * uniform(counter + 1));
    const double length = mean * std::exp(std::sqrt(variance) * normal - variance / 2);
    lengths.push_back(static_cast<int32_t>(std::max(1.0, std::round(length))));
  }
  return lengths;
}

/// Reads "128" off the front of `text`.
bool take_number(std::string_view* text, int* value) {
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), *value);
  if (error != std::errc() || *value <= 0) return false;
  text->remove_prefix(static_cast<size_t>(end - text->data()));
  return true;
}

bool take(std::string_view* text, std::string_view prefix) {
  if (!text->starts_with(prefix)) return false;
  text->remove_prefix(prefix.size());
  return true;
}

/// "[lognormal|skew|varied]4096", by which the lengths are set.
bool take_lengths(std::string_view* text, DecodeCase* spec) {
  const bool log_normal = take(text, "lognormal");
  const bool skew = !log_normal && take(text, "skew");
  const bool varied = !log_normal && !skew && take(text, "varied");
  if (!take_number(text, &spec->seqlen_k)) return false;
  if (log_normal) spec->lengths = log_normal_lengths(spec->batch, spec->seqlen_k);
  if (skew) {
    spec->lengths.assign(static_cast<size_t>(spec->batch), 512);
    spec->lengths.back() = spec->seqlen_k;
  }
  spec->variable_lengths = varied;
  spec->empty_fraction = varied ? 0.125 : 0;
  return true;
}

}  // namespace

std::string Shape::title() const {
  std::ostringstream text;
  text << "h_q=" << spec.num_heads_q;
  if (spec.num_heads_kv != 1) text << " h_kv=" << spec.num_heads_kv;
  text << " s_q=" << spec.seqlen_q << (spec.causal ? " causal" : "") << ", " << spec.batch << " x ";
  if (name.find("klognormal") != std::string::npos) text << "log-normal ";
  if (name.find("kskew") != std::string::npos) text << "512, one ";
  if (spec.variable_lengths) text << "varied ";
  text << spec.seqlen_k;
  if (spec.fixed_split_tokens > 0) text << " split every " << spec.fixed_split_tokens;
  text << ", " << to_string(spec.dtype);
  return text.str();
}

Status parse_shape(std::string_view name, Shape* shape) {
  Shape result;
  result.name = name;
  DecodeCase& spec = result.spec;
  std::string_view rest = name;
  const bool heads = take(&rest, "h") && take_number(&rest, &spec.num_heads_q) &&
                     (!take(&rest, "x") || take_number(&rest, &spec.num_heads_kv));
  const bool sizes = heads && take(&rest, "_q") && take_number(&rest, &spec.seqlen_q) &&
                     take(&rest, "_b") && take_number(&rest, &spec.batch) && take(&rest, "_k") &&
                     take_lengths(&rest, &spec);
  if (sizes) {
    spec.causal = take(&rest, "_causal");
    std::string_view split = rest;
    if (take(&split, "_split") && take_number(&split, &spec.fixed_split_tokens) &&
        spec.fixed_split_tokens % kPageSize == 0) {
      rest = split;
    }
    if (take(&rest, "_fp16")) spec.dtype = DType::kFloat16;
  }
  if (!sizes || !rest.empty()) {
    return {StatusCode::kInvalidArgument,
            "shape '" + std::string(name) +
                "' is not of the form h128_q1_b64_k4096[_causal][_split1024][_fp16]" +
                (rest.empty() ? "" : ": stuck at '" + std::string(rest) + "'")};
  }
  *shape = std::move(result);
  return {};
}

namespace {

const std::map<std::string_view, std::vector<std::string>>& suites() {
  static const std::map<std::string_view, std::vector<std::string>> all = {
      {"smoke", {"h16_q1_b2_k256", "h16_q2_b2_kvaried256_causal"}},
      {"main",
       {"h128_q1_b1_k4096", "h128_q1_b16_k4096", "h128_q1_b64_k4096", "h128_q1_b128_k4096",
        "h128_q1_b128_k8192", "h128_q2_b128_k4096_causal", "h64_q1_b64_k4096", "h16_q1_b1_k8192",
        "h16_q1_b16_k4096", "h16_q1_b64_k4096", "h16_q1_b128_k8192", "h128_q1_b128_klognormal8192",
        "h128_q1_b128_kskew131072"}},
      {"table",
       {"h128_q1_b1_k4096",
        "h128_q1_b1_k65536",
        "h128_q1_b1_k262144",
        "h128_q1_b16_k4096",
        "h128_q1_b64_k4096",
        "h128_q1_b128_k4096",
        "h128_q1_b128_k8192",
        "h128_q1_b128_k16384",
        "h128_q1_b128_k32768",
        "h128_q2_b128_k4096_causal",
        "h128_q2_b128_k8192_causal",
        "h64_q1_b64_k4096",
        "h64_q1_b128_k8192",
        "h16_q1_b1_k8192",
        "h16_q1_b16_k4096",
        "h16_q1_b64_k4096",
        "h16_q1_b128_k8192",
        "h16_q1_b128_k32768",
        "h32_q1_b128_k8192",
        "h16_q1_b4_k512",
        "h128_q1_b128_klognormal8192",
        "h128_q1_b128_kskew131072"}},
      {"invariant",
       {"h128_q1_b128_k8192", "h128_q1_b128_k8192_split1024", "h16_q1_b128_k8192",
        "h16_q1_b128_k8192_split1024", "h128_q1_b1_k65536", "h128_q1_b1_k65536_split1024"}},
      {"plan",
       {"h128_q1_b1_klognormal2048", "h128_q1_b128_klognormal2048", "h128_q1_b1024_klognormal2048",
        "h128_q1_b8192_klognormal2048"}}};
  return all;
}

}  // namespace

std::vector<std::string> suite(std::string_view name) {
  const auto found = suites().find(name);
  return found == suites().end() ? std::vector<std::string>{} : found->second;
}

std::string suite_names() {
  std::string names;
  for (const auto& [name, shapes] : suites())
    names += (names.empty() ? "" : ", ") + std::string(name);
  return names;
}

Status select_shapes(std::string_view suite_name, const std::string& filter, DType dtype,
                     std::vector<Shape>* shapes) {
  const std::vector<std::string> names = suite(suite_name);
  if (names.empty()) {
    return {StatusCode::kInvalidArgument,
            "suite '" + std::string(suite_name) + "' is none of " + suite_names()};
  }
  std::vector<std::string> chosen = filter.empty() ? names : std::vector<std::string>{};
  std::istringstream items(filter);
  for (std::string item; std::getline(items, item, ',');) {
    if (Shape named; parse_shape(item, &named).ok()) {
      chosen.push_back(item);
      continue;
    }
    try {
      const std::regex pattern(item);
      std::copy_if(names.begin(), names.end(), std::back_inserter(chosen),
                   [&](const std::string& name) { return std::regex_search(name, pattern); });
    } catch (const std::regex_error& error) {
      return {StatusCode::kInvalidArgument,
              "'" + item + "' is neither a shape nor a regular expression: " + error.what()};
    }
  }
  shapes->clear();
  for (std::string name : chosen) {
    if (dtype == DType::kFloat16 && !name.ends_with("_fp16")) name += "_fp16";
    const bool known = std::any_of(shapes->begin(), shapes->end(),
                                   [&](const Shape& shape) { return shape.name == name; });
    if (known) continue;
    MLA_RETURN_IF_ERROR(parse_shape(name, &shapes->emplace_back()));
    shapes->back().plan_only = suite_name == "plan";
  }
  if (shapes->empty()) {
    return {StatusCode::kInvalidArgument,
            "no shape of suite '" + std::string(suite_name) + "' matches '" + filter + "'"};
  }
  if (suite_name == "table" && filter.empty()) {
    std::vector<Shape> plans;
    MLA_RETURN_IF_ERROR(select_shapes("plan", "", dtype, &plans));
    shapes->insert(shapes->end(), plans.begin(), plans.end());
  }
  return {};
}

}  // namespace mla::bench
