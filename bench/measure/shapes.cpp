#include "bench/measure/shapes.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <climits>
#include <cmath>
#include <map>
#include <optional>
#include <regex>
#include <sstream>

#include "bench/measure/draws.h"
#include "bench/measure/memory.h"

namespace mla::bench {
namespace {

/// Standard deviation of q.k on flat data: 576 products of two N(0,1)/10.
constexpr double kFlatProductDeviation = 0.24;

/// Tokens of a sequence, by the contract: 2^30.
constexpr double kMostTokens = double{kMaxTokensPerSeq};

/// Lengths whose logarithm is normal, with this mean and half of it as standard deviation.
std::vector<int32_t> log_normal_lengths(int batch, double mean) {
  const double variance = std::log(1 + 0.25);  // of the logarithm: ln(1 + sd^2 / mean^2)
  std::vector<int32_t> lengths;
  for (int i = 0; i < batch; ++i) {
    const double z = normal(/*key=*/0, int64_t{2} * i);
    const double length = mean * std::exp(std::sqrt(variance) * z - variance / 2);
    lengths.push_back(static_cast<int32_t>(std::clamp(std::round(length), 1.0, kMostTokens)));
  }
  return lengths;
}

/// Reads a name from its front. The first number that is out of range is remembered.
class NameReader {
 public:
  explicit NameReader(std::string_view name) : rest_(name) {}

  bool take(std::string_view prefix) {
    if (!rest_.starts_with(prefix)) return false;
    rest_.remove_prefix(prefix.size());
    return true;
  }

  /// Reads "128". `what` is the letter before it, for a message.
  bool number(const char* what, int* value, int64_t least = 1, int64_t most = INT_MAX) {
    const size_t digits = std::min(rest_.find_first_not_of("0123456789"), rest_.size());
    if (digits == 0) return false;
    int64_t read = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + digits, read);
    if (error != std::errc() || read < least || read > most) {
      if (why_.empty()) {
        why_ = fmt::format("has {} = {}; {} to {} are allowed", what, rest_.substr(0, digits),
                           least, most);
      }
      return false;
    }
    *value = static_cast<int>(read);
    rest_.remove_prefix(digits);
    return true;
  }

  /// "256+0+1024", at least two. Takes nothing otherwise.
  bool list(std::vector<int32_t>* lengths) {
    const std::string_view number_or_plus = rest_.substr(0, rest_.find_first_not_of("0123456789+"));
    if (number_or_plus.find('+') == std::string_view::npos) return false;
    do {
      if (!tokens(&lengths->emplace_back(), /*least=*/0)) return false;
    } while (take("+"));
    return true;
  }

  bool tokens(int* value, int64_t least = 1) {
    return number("k", value, least, static_cast<int64_t>(kMostTokens));
  }

  /// What is not read yet.
  std::string_view rest() const { return rest_; }
  /// Why a number was refused; empty if none was.
  const std::string& why() const { return why_; }

 private:
  std::string_view rest_;
  std::string why_;
};

/// "[lognormal|stepped|skew|varied]4096", or a list, as it is spelled; make_lengths() makes them.
bool take_lengths(NameReader& name, Shape* shape) {
  DecodeCase& spec = shape->spec;
  if (std::vector<int32_t> listed; name.list(&listed)) {
    shape->lengths = Lengths::kListed;
    spec.seqlen_k = *std::max_element(listed.begin(), listed.end());
    spec.lengths = std::move(listed);
    return true;
  }
  for (const Lengths kind :
       {Lengths::kLogNormal, Lengths::kStepped, Lengths::kSkew, Lengths::kVaried}) {
    if (name.take(to_string(kind))) {
      shape->lengths = kind;
      break;
    }
  }
  return name.tokens(&spec.seqlen_k);
}

/// The lengths of a batch of `spec->batch` sequences.
void make_lengths(Shape* shape) {
  DecodeCase& spec = shape->spec;
  switch (shape->lengths) {
    case Lengths::kLogNormal:
      spec.lengths = log_normal_lengths(spec.batch, spec.seqlen_k);
      break;
    case Lengths::kStepped:
      for (int64_t i = 1; i <= spec.batch; ++i) {
        spec.lengths.push_back(
            static_cast<int32_t>((spec.seqlen_k * i + spec.batch - 1) / spec.batch));
      }
      break;
    case Lengths::kSkew:
      spec.lengths.assign(static_cast<size_t>(spec.batch), 512);
      spec.lengths.back() = spec.seqlen_k;
      break;
    case Lengths::kVaried:
      spec.variable_lengths = true;
      spec.empty_fraction = 0.125;
      break;
    default:
      break;
  }
}

constexpr const char* kForm =
    "h128_q1_b64_k4096[_causal][_split1024][_page16][_strided][_fp8_tile128][_peak4][_fp16]; "
    "h16x2 has 2 KV heads, a split is a multiple of 64, quantised caches are fp8_tile128, "
    "fp8_tensor "
    "and int8_tile128, and lengths are k4096, klognormal8192, kstepped32768, kskew131072, "
    "kvaried256 "
    "or a list such as k256+512+1024, without _b or with _b3";

Status bad_shape(std::string_view name, const std::string& why) {
  return {StatusCode::kInvalidArgument, fmt::format("shape '{}' {}", name, why)};
}

}  // namespace

const char* to_string(Measure measure) {
  switch (measure) {
    case Measure::kTimes:
      return "times";
    case Measure::kEnergy:
      return "energy";
    case Measure::kPlans:
      return "plans";
    case Measure::kErrors:
      return "errors";
  }
  return "unknown";
}

const char* to_string(Lengths lengths) {
  switch (lengths) {
    case Lengths::kEqual:
      return "equal";
    case Lengths::kLogNormal:
      return "lognormal";
    case Lengths::kStepped:
      return "stepped";
    case Lengths::kSkew:
      return "skew";
    case Lengths::kVaried:
      return "varied";
    case Lengths::kListed:
      return "listed";
  }
  return "unknown";
}

std::string Shape::title() const {
  static const std::map<Lengths, const char*> kinds{
      {Lengths::kEqual, ""},         {Lengths::kLogNormal, "log-normal "},
      {Lengths::kSkew, "512, one "}, {Lengths::kStepped, "stepped to "},
      {Lengths::kListed, "up to "},  {Lengths::kVaried, "varied "}};
  std::string text = fmt::format("h_q={}", spec.num_heads_q);
  if (spec.num_heads_kv != 1) text += fmt::format(" h_kv={}", spec.num_heads_kv);
  text += fmt::format(" s_q={}{}, {} x {}{}", spec.seqlen_q, spec.causal ? " causal" : "",
                      spec.batch, kinds.at(lengths), spec.seqlen_k);
  if (spec.fixed_split_tokens > 0) text += fmt::format(" split every {}", spec.fixed_split_tokens);
  if (spec.page_size != kDefaultPageSize) text += fmt::format(", pages of {}", spec.page_size);
  if (spec.strided) text += ", strided";
  if (is_quantised(spec.cache_format)) {
    text += fmt::format(", cache {}", mla::to_string(spec.cache_format));
  }
  if (peak > 0) text += fmt::format(", logits of deviation {}", peak);
  return text + ", " + mla::to_string(spec.dtype);
}

Status parse_shape(std::string_view text, Shape* shape) {
  Shape result;
  result.name = text;
  DecodeCase& spec = result.spec;
  NameReader name(text);
  const bool heads = name.take("h") && name.number("h", &spec.num_heads_q) &&
                     (!name.take("x") || name.number("h_kv", &spec.num_heads_kv)) &&
                     name.take("_q") && name.number("q", &spec.seqlen_q);
  const bool counted = heads && name.take("_b");
  bool right = heads && (!counted || name.number("b", &spec.batch)) && name.take("_k") &&
               take_lengths(name, &result) && (counted || result.lengths == Lengths::kListed);
  if (right) {
    spec.causal = name.take("_causal");
    right = !name.take("_split") || name.number("split", &spec.fixed_split_tokens);
  }
  if (right) right = !name.take("_page") || name.number("page", &spec.page_size);
  if (right) spec.strided = name.take("_strided");
  for (const CacheFormat format : kCacheFormats) {
    if (right && is_quantised(format) && name.take(std::string("_") + mla::to_string(format))) {
      spec.cache_format = format;
      break;
    }
  }
  if (right) right = !name.take("_peak") || name.number("peak", &result.peak);
  if (right && name.take("_fp16")) spec.dtype = DType::kFloat16;
  std::string why = name.why();
  if (why.empty() && spec.fixed_split_tokens % kGrainTokens != 0) {
    why = fmt::format("has split = {}; multiples of {} are allowed", spec.fixed_split_tokens,
                      kGrainTokens);
  }
  if (why.empty() && !is_page_size(spec.page_size)) {
    why = fmt::format("has page = {}; 16, 32, 64, 128 and 256 are allowed", spec.page_size);
  }
  if (why.empty() && has_tile_scales(spec.cache_format) && spec.dtype != DType::kBFloat16) {
    why = fmt::format("has _fp16 and _{0}; {0} needs bf16", mla::to_string(spec.cache_format));
  }
  if (!right || !name.rest().empty() || !why.empty()) {
    const std::string stuck =
        name.rest().empty() ? "" : fmt::format("; stuck at '{}'", name.rest());
    return bad_shape(text, (why.empty() ? "is not of the form " : why + ". The form is ") + kForm +
                               (why.empty() ? stuck : ""));
  }
  if (result.peak > 0) spec.softmax_scale = static_cast<float>(result.peak / kFlatProductDeviation);
  if (result.lengths == Lengths::kListed) {
    const auto count = static_cast<int>(spec.lengths.size());
    if (counted && spec.batch != count) {
      return bad_shape(
          text, fmt::format("lists {0} lengths for {1} sequences; leave out _b, or say _b{0}",
                            count, spec.batch));
    }
    spec.batch = count;
  }
  const double bytes = double{sizeof(int32_t)} * spec.batch;
  MLA_RETURN_IF_ERROR(check_memory(fmt::format("a list of the lengths of shape '{}'", text), bytes,
                                   host_memory_there(), "host memory"));
  make_lengths(&result);
  *shape = std::move(result);
  return {};
}

namespace {

using Names = std::vector<std::string>;

/// Every name of `a`, then those of `b` that are not there yet.
Names joined(Names a, const Names& b) {
  for (const std::string& name : b) {
    if (std::find(a.begin(), a.end(), name) == a.end()) a.push_back(name);
  }
  return a;
}

/// Each of `names`, and what padding makes of it.
Names with_padded(const Names& names) {
  Names result = names;
  for (const std::string& name : names) result = joined(result, {padded(name)});
  return result;
}

/// Errors by length, peakiness, dtype and splits.
Names numerics() {
  Names names;
  for (const char* dtype : {"", "_fp16"}) {
    for (const char* tokens : {"256", "4096", "65536"}) {
      for (const char* peak : {"", "_peak1", "_peak4", "_peak16"}) {
        names.push_back(std::string("h16_q1_b2_k") + tokens + peak + dtype);
      }
    }
    for (const char* split : {"64", "512", "4096", "32768"}) {
      names.push_back(std::string("h16_q1_b2_k65536_split") + split + "_peak4" + dtype);
    }
  }
  return names;
}

/// Shapes in 16 bits, and in each quantised format beside. Five of 16 heads: the service's simulated clock fits
/// four coefficients to them.
Names quantised() {
  Names names;
  for (const char* shape : {"h16_q1_b1_k8192", "h16_q1_b8_k8192", "h16_q1_b16_k8192",
                            "h16_q1_b64_k4096", "h16_q1_b128_k8192", "h64_q1_b32_k8192",
                            "h64_q1_b128_k8192", "h128_q1_b1_k4096", "h128_q1_b128_k8192"}) {
    for (const CacheFormat format : kCacheFormats) {
      names.push_back(std::string(shape) +
                      (is_quantised(format) ? std::string("_") + mla::to_string(format) : ""));
    }
  }
  return names;
}

/// The benchmark that the project's two texts describe. They give ranges and roles; the configurations
/// are ours. Causal shapes have two query tokens, because the mask hides nothing from one.
Names texts() {
  Names names = {"h128_q1_b64_k4096",  // bound by arithmetic
                 "h128_q1_b128_k4096",       "h128_q1_b32_k16384", "h128_q2_b64_k8192_causal",
                 "h128_q4_b32_k8192_causal",
                 "h8_q1_b64_k8192",  // bound by memory
                 "h16_q1_b64_k8192",         "h32_q1_b64_k8192",   "h64_q1_b64_k8192"};
  Names uneven = {"h128_q1_k1024+1024+1024+1024+1024+1024+1024+1024",
                  "h128_q1_k2048+2048+2048+2048+2048+2048+2048+2048",
                  "h128_q1_k4096+4096+4096+4096+4096+4096+4096+4096"};
  for (const int batch : {4, 8, 16}) {
    uneven.push_back(fmt::format("h128_q1_b{}_klognormal2048", batch));
  }
  names = joined(names, with_padded(uneven));
  for (const char* dtype : {"", "_fp16"}) {  // what is asked for most comes first
    for (const char* mask : {"", "_causal"}) {
      const int queries = *mask == 0 ? 1 : 2;
      for (const int heads : {128, 64, 32, 16, 8}) {
        for (const int batch : {1, 2, 4, 8, 16}) {
          for (const int tokens : {512, 1024, 2048, 4096, 8192, 16384}) {
            const auto name =
                fmt::format("h{}_q{}_b{}_k{}{}{}", heads, queries, batch, tokens, mask, dtype);
            names = joined(names, {name});
          }
        }
      }
    }
  }
  return names;
}

std::vector<Suite> make_suites() {
  std::vector<Suite> result = {
      {"main",
       "a few shapes of every kind: what a GPU runs by default",
       {"h128_q1_b1_k4096", "h128_q1_b16_k4096", "h128_q1_b64_k4096", "h128_q1_b128_k4096",
        "h128_q1_b128_k8192", "h128_q2_b128_k4096_causal", "h64_q1_b64_k4096", "h16_q1_b1_k8192",
        "h16_q1_b16_k4096", "h16_q1_b64_k4096", "h16_q1_b128_k8192", "h128_q1_b128_klognormal8192",
        "h128_q1_b128_kskew131072"}},
      {"table",
       "the shapes that the chapters show, for which peers are recorded",
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
      {"compute",
       "128 heads, many query rows: the tensor cores' limit",
       {"h128_q1_b128_k4096", "h128_q1_b128_k8192", "h128_q1_b128_k16384", "h128_q1_b128_k32768",
        "h128_q2_b128_k4096_causal", "h128_q2_b128_k8192_causal", "h128_q3_b32_k4096_causal",
        "h128_q4_b32_k4096_causal", "h128_q4_b32_k8192_causal", "h128_q4_b32_k32768_causal"}},
      {"bandwidth",
       "few heads: the memory's limit",
       {"h16_q1_b64_k4096", "h32_q1_b64_k4096", "h64_q1_b64_k4096", "h8_q1_b128_k8192",
        "h16_q1_b128_k8192", "h32_q1_b128_k8192", "h64_q1_b128_k8192", "h16_q1_b128_k32768"}},
      {"latency",
       "1 to 8 sequences of 512 to 262144 tokens",
       {"h128_q1_b1_k512", "h128_q1_b1_k4096", "h128_q1_b1_k65536", "h128_q1_b1_k262144",
        "h128_q1_b8_k4096", "h16_q1_b1_k512", "h16_q1_b1_k8192", "h16_q1_b1_k65536",
        "h16_q1_b1_k262144", "h16_q1_b4_k512", "h16_q1_b8_k4096"}},
      {"varlen", "unequal lengths, and the same batches padded to their longest sequence",
       with_padded({"h128_q1_b128_k8192", "h128_q1_b128_kstepped32768",
                    "h128_q1_b128_klognormal2048", "h128_q1_b128_klognormal8192",
                    "h128_q1_b128_kskew131072"})},
      {"dtypes",
       "bf16 and fp16",
       {"h128_q1_b64_k4096", "h128_q1_b64_k4096_fp16", "h16_q1_b64_k4096",
        "h16_q1_b64_k4096_fp16"}},
      {"quantised", "16 bits and each 8-bit cache format side by side", quantised()},
      {"causal",
       "with the causal mask and without it",
       {"h128_q2_b128_k4096_causal", "h128_q2_b128_k4096"}},
      {"prefill",
       "many query tokens: causal as in prefill, without a mask as in cross-attention",
       {"h128_q128_b1_k4096_causal", "h128_q128_b1_k4096", "h128_q512_b1_k4096_causal",
        "h128_q2048_b1_k4096_causal", "h128_q2048_b1_k4096"}},
      {"invariant",
       "what batch-invariant mode costs",
       {"h128_q1_b128_k8192", "h128_q1_b128_k8192_split1024", "h16_q1_b128_k8192",
        "h16_q1_b128_k8192_split1024", "h128_q1_b1_k65536", "h128_q1_b1_k65536_split1024"}},
      {"resources",
       "power, clocks and energy, all stages back to back for 1.2 s",
       {"h128_q1_b64_k4096", "h16_q1_b64_k4096", "h128_q1_b1_k4096"},
       Measure::kEnergy},
      {"plan",
       "only the making of plans",
       {"h128_q1_b1_klognormal2048", "h128_q1_b128_klognormal2048", "h128_q1_b1024_klognormal2048",
        "h128_q1_b8192_klognormal2048"},
       Measure::kPlans},
      {"numerics", "errors by length, peakiness, dtype and splits", numerics(), Measure::kErrors},
      {"smoke",
       "small enough for the model, where it is the default",
       {"h16_q1_b2_k256", "h16_q2_b2_kvaried256_causal"},
       Measure::kTimes,
       /*apart=*/true},
      {"cross",
       "cross-attention between modalities, no mask: 77 text tokens read 1024 image patches, the "
       "patches read the text, 1500 frames of audio read 448 text tokens",
       {"h16_q77_b8_k1024", "h128_q77_b8_k1024", "h16_q1024_b8_k77", "h128_q1024_b8_k77",
        "h16_q1500_b4_k448", "h128_q1500_b4_k448"},
       Measure::kTimes,
       /*apart=*/true},
      {"texts",
       "batch x length x heads x dtype x mask, uniform and log-normal lists, padded partners; only "
       "for auto (head_dim 64 and 128 have no MLA kernel, but mla_traditional measures them)",
       texts(), Measure::kTimes,
       /*apart=*/true},
  };
  const auto table = std::find_if(result.begin(), result.end(),
                                  [](const Suite& one) { return one.name == "table"; });
  result.push_back(
      {"choice",
       "shapes on which the chooser is checked: those of the table, little work, a few uneven "
       "lengths",
       joined(table->shapes, {"h128_q1_b1_k640", "h16_q4_k16384+8192+4096+2048_causal"})});
  Suite all{"all", "everything that is recorded, each shape once", {}};
  for (const bool quick : {true, false}) {  // what is soon done first
    for (const Suite& one : result) {
      const bool is_quick = one.measure == Measure::kPlans || one.measure == Measure::kErrors;
      if (!one.apart && is_quick == quick) all.shapes = joined(all.shapes, one.shapes);
    }
  }
  result.push_back(all);
  return result;
}

/// What is done with a shape of a suite: of "all", what the suite that it comes from does. Times
/// are more than plans or errors, energy is more than times.
Measure measure_of(const Suite& chosen, const std::string& shape) {
  if (chosen.name != "all") return chosen.measure;
  std::optional<Measure> most;
  const auto rank = [](Measure measure) {
    return measure == Measure::kEnergy ? 2 : measure == Measure::kTimes ? 1 : 0;
  };
  for (const Suite& one : suites()) {
    if (one.name == "all") continue;
    if (std::find(one.shapes.begin(), one.shapes.end(), shape) == one.shapes.end()) continue;
    if (!most || rank(one.measure) > rank(*most)) most = one.measure;
  }
  return most.value_or(Measure::kTimes);
}

}  // namespace

const std::vector<Suite>& suites() {
  static const std::vector<Suite> all = make_suites();
  return all;
}

const Suite* find_suite(std::string_view name) {
  const auto found = std::find_if(suites().begin(), suites().end(),
                                  [&](const Suite& one) { return one.name == name; });
  return found == suites().end() ? nullptr : &*found;
}

std::vector<std::string> suite_names() {
  std::vector<std::string> names;
  for (const Suite& one : suites()) names.push_back(one.name);
  return names;
}

std::string padded(const std::string& shape_name) {
  Shape shape;
  if (!parse_shape(shape_name, &shape).ok() || shape.spec.lengths.empty()) return shape_name;
  const size_t lengths = shape_name.find("_k");
  const size_t end = std::min(shape_name.find('_', lengths + 1), shape_name.size());
  const auto longest = std::max_element(shape.spec.lengths.begin(), shape.spec.lengths.end());
  return shape_name.substr(0, std::min(shape_name.find("_b"), lengths)) + "_b" +
         std::to_string(shape.spec.batch) + "_k" + std::to_string(*longest) +
         shape_name.substr(end);
}

Status select_shapes(std::string_view suite_name, const std::string& filter, DType dtype,
                     std::vector<Shape>* shapes) {
  const Suite* chosen_suite = find_suite(suite_name);
  if (chosen_suite == nullptr) {
    return {StatusCode::kInvalidArgument,
            fmt::format("suite '{}' is not one of {}", suite_name, fmt::join(suite_names(), ", "))};
  }
  const std::vector<std::string>& names = chosen_suite->shapes;
  std::vector<std::string> chosen = filter.empty() ? names : std::vector<std::string>{};
  std::istringstream items(filter);
  for (std::string item; std::getline(items, item, ',');) {
    Shape named;
    const Status status = parse_shape(item, &named);
    if (status.ok()) {
      chosen.push_back(item);
      continue;
    }
    if (status.code() == StatusCode::kOutOfMemory) return status;
    const size_t before = chosen.size();
    try {
      const std::regex pattern(item);
      std::copy_if(names.begin(), names.end(), std::back_inserter(chosen),
                   [&](const std::string& name) { return std::regex_search(name, pattern); });
    } catch (const std::regex_error& error) {
      return {StatusCode::kInvalidArgument,
              "'" + item + "' is neither a shape nor a regular expression: " + error.what()};
    }
    const bool begins_like_a_shape = std::regex_search(item, std::regex("^h\\d+(x\\d+)?_q\\d+_"));
    if (chosen.size() == before && begins_like_a_shape) return status;
    if (chosen.size() == before) {
      return {StatusCode::kInvalidArgument,
              fmt::format("no shape of suite '{}' matches '{}', and {}", suite_name, item,
                          status.message())};
    }
  }
  shapes->clear();
  for (std::string name : chosen) {
    const Measure measure = measure_of(*chosen_suite, name);
    if (dtype == DType::kFloat16 && !name.ends_with("_fp16")) {
      Shape bf16;
      const bool of_suite = std::find(names.begin(), names.end(), name) != names.end();
      if (of_suite && parse_shape(name, &bf16).ok() && has_tile_scales(bf16.spec.cache_format)) {
        continue;  // there is no such cache
      }
      name += "_fp16";
    }
    const bool known = std::any_of(shapes->begin(), shapes->end(),
                                   [&](const Shape& shape) { return shape.name == name; });
    if (known) continue;
    MLA_RETURN_IF_ERROR(parse_shape(name, &shapes->emplace_back()));
    shapes->back().measure = measure;
  }
  return {};
}

std::vector<Shape> every_shape() {
  std::vector<Shape> shapes;
  for (const Suite& suite : suites()) {
    if (suite.name != "all" && !suite.apart) continue;
    std::vector<Shape> some;
    static_cast<void>(
        select_shapes(suite.name, "", DType::kBFloat16, &some));  // suites' names parse
    for (Shape& shape : some) {
      const bool known = std::any_of(shapes.begin(), shapes.end(),
                                     [&](const Shape& one) { return one.name == shape.name; });
      if (!known) shapes.push_back(std::move(shape));
    }
  }
  return shapes;
}

}  // namespace mla::bench
