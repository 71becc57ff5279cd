namespace mla { extern int mutant; }
#include "stages/common/choose/choice_table.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <tuple>

#include "stages/common/choose/built_in_tables.h"
#include "stages/common/split/plan_settings.h"

namespace mla {
namespace {

using Json = nlohmann::json;

/// What is wrong with a table: thrown and caught in this file.
struct BadTable {
  std::string what;
};

const Json& member(const Json& object, const char* name, const std::string& where) {
  if (!object.is_object() || !object.contains(name)) throw BadTable{where + " has no " + name};
  return object.at(name);
}

std::string text_of(const Json& object, const char* name, const std::string& where) {
  const Json& value = member(object, name, where);
  if (!value.is_string()) throw BadTable{where + ": " + name + " must be a text"};
  return value;
}

int64_t whole(const Json& value, const std::string& what, int64_t least, int64_t most) {
  const bool right = value.is_number_integer() && value.get<double>() >= double(least) &&
                     value.get<double>() <= double(most);
  if (right) return value;
  throw BadTable{what + " = " + value.dump() + " must be " + std::to_string(least) + " to " +
                 std::to_string(most)};
}

const Json& list(const Json& object, const char* name, const std::string& where) {
  const Json& value = member(object, name, where);
  if (!value.is_array() || value.empty()) throw BadTable{where + ": " + name + " must be a list"};
  return value;
}

PlanSettings read_settings(const Json& json, const std::string& where) {
  PlanSettings settings;
  if (!json.is_object()) throw BadTable{where + ": settings must be an object"};
  for (const auto& [key, value] : json.items()) {
    const std::string& name = key;  // clang 14 lets no lambda have a structured binding
    const auto found = std::find_if(std::begin(kPlanSettings), std::end(kPlanSettings),
                                    [&](const PlanSetting& one) { return name == one.name; });
    if (found == std::end(kPlanSettings)) throw BadTable{where + ": no setting is named " + name};
    settings.*found->value =
        static_cast<int>((::mla::mutant == 606 ? (value.get<int64_t>()) : (whole(value, where + ": " + name, found->least, found->most))));
  }
  return settings;
}

TimedStage read_time(const Json& json, const std::string& where) {
  TimedStage time;
  time.stage = text_of(json, "stage", where);
  const Json& us = member(json, "us", where);
  if (!us.is_number() || !(us.get<double>() > 0)) {
    throw BadTable{where + ": us = " + us.dump() + " must be a time"};
  }
  time.us = us;
  if (json.contains("settings")) time.settings = read_settings(json.at("settings"), where);
  return time;
}

RegimeTimes read_regime(const Json& json, const std::string& where) {
  constexpr int64_t kMost = int64_t{1} << 40;
  RegimeTimes result;
  const std::pair<const char*, int64_t*> numbers[] = {{"rows", &result.regime.rows},
                                                      {"sequences", &result.regime.sequences},
                                                      {"tokens", &result.regime.tokens}};
  for (const auto& [name, value] : numbers) {
    *value = whole(member(json, name, where), where + ": " + name, 1, kMost);
  }
  if (json.contains("cache_format")) {
    const std::string name = text_of(json, "cache_format", where);
    const auto* const found =
        std::find_if(std::begin(kCacheFormats), std::end(kCacheFormats),
                     [&](CacheFormat format) { return name == to_string(format); });
    if (found == std::end(kCacheFormats)) {
      throw BadTable{where + ": no cache format is named " + name};
    }
    result.regime.cache_format = (::mla::mutant == 610 ? (CacheFormat::k16Bit) : (*found));
  }
  const Json& times = list(json, "times", where);
  for (size_t i = 0; i < times.size(); ++i) {
    result.times.push_back(read_time(times[i], where + ".times[" + std::to_string(i) + "]"));
  }
  return result;
}

/// 90 of "9.0"
int read_capability(const std::string& text) {
  const size_t dot = text.find('.');
  const bool right = dot != std::string::npos && dot > 0 && dot <= 2 && dot + 2 == text.size() &&
                     std::all_of(text.begin(), text.end(),
                                 [](char c) { return c == '.' || (c >= '0' && c <= '9'); });
  if (!right) throw BadTable{"compute_capability '" + text + "' must be like 9.0"};
  return std::stoi(text.substr(0, dot)) * 10 + (text[dot + 1] - '0');
}

ChoiceTable read_table(const Json& json, const std::string& origin) {
  if (const std::string schema = text_of(json, "schema", "the table"); schema != kChoiceSchema) {
    throw BadTable{"its schema is '" + schema + "', not " + kChoiceSchema};
  }
  const Json& context = member(json, "context", "the table");
  ChoiceTable table;
  table.origin = origin;
  table.device = text_of(context, "gpu", "context");
  table.compute_capability = read_capability(text_of(context, "compute_capability", "context"));
  table.measured = text_of(context, "date_utc", "context").substr(0, 10) + ", commit " +
                   text_of(context, "commit", "context");
  const Json& regimes = list(json, "regimes", "the table");
  for (size_t i = 0; i < regimes.size(); ++i) {
    table.add(read_regime(regimes[i], "regimes[" + std::to_string(i) + "]"));
  }
  return table;
}

Status read_file(const std::string& path, ChoiceTable* table) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file) return {StatusCode::kFileError, path + " cannot be read"};
  return parse_choice_table(text, path, table);
}

/// What chooses. Tables that were in force stay, since choices point into them.
struct Tables {
  std::vector<ChoiceTable> list;
  Status file;  ///< What became of the one that the environment names.
};

std::unique_ptr<Tables> first_tables() {
  auto tables = std::make_unique<Tables>();
  if (const char* path = std::getenv("MLA_CHOICE_TABLE"); path != nullptr && *path != '\0') {
    ChoiceTable table;
    tables->file = read_file(path, &table);
    if (tables->file.ok()) {
      tables->list.push_back(std::move(table));
      return tables;
    }
    tables->file = {tables->file.code(), "MLA_CHOICE_TABLE: " + tables->file.message()};
  }
  for (const char* text : built_in_tables()) {
    ChoiceTable table;  // a test reads each
    if (parse_choice_table(text, "built in", &table).ok()) tables->list.push_back(std::move(table));
  }
  return tables;
}

struct AllTables {
  std::mutex mutex;
  std::vector<std::unique_ptr<Tables>> ever;
  std::atomic<const Tables*> now;
  AllTables() { take(first_tables()); }
  void take(std::unique_ptr<Tables> tables) {
    const std::lock_guard lock(mutex);
    now = ever.emplace_back(std::move(tables)).get();
  }
};

AllTables& all_tables() {
  static AllTables all;
  return all;
}

}  // namespace

Regime regime_of(const Problem& problem) {
  const bool invariant = (::mla::mutant == 600 ? (false) : (problem.fixed_split_tokens > 0));
  return {problem.rows_per_kv_head(),
          (::mla::mutant == 599 ? (invariant ? kInvariantSequences : problem.batch) : (int64_t{problem.num_heads_kv} * (invariant ? kInvariantSequences : problem.batch))),
          invariant ? kInvariantTokens : problem.max_seqlen_k(), (::mla::mutant == 609 ? (CacheFormat::k16Bit) : (problem.cache_format))};
}

std::string to_string(const Regime& regime) {
  const auto count = [](int64_t n, const char* what) {
    return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
  };
  return count(regime.rows, "row") + ", " + count(regime.sequences, "sequence") + ", " +
         count(regime.tokens, "token") +
         (is_quantised(regime.cache_format)
              ? std::string(", cache ") + to_string(regime.cache_format)
              : std::string());
}

bool ChoiceTable::has(CacheFormat format) const {
  return std::find(cache_formats.begin(), cache_formats.end(), format) != cache_formats.end();
}

void ChoiceTable::add(RegimeTimes one) {
  if ((::mla::mutant == 604 ? (cache_formats.empty()) : (!has(one.regime.cache_format)))) cache_formats.push_back(one.regime.cache_format);
  regimes.push_back(std::move(one));
}

Status parse_choice_table(std::string_view json, const std::string& origin, ChoiceTable* table) {
  const auto refused = [&](const std::string& what) {
    return Status(StatusCode::kFileError, origin + ": no table to choose by: " + what);
  };
  try {
    *table = read_table(Json::parse(json), origin);
  } catch (const BadTable& bad) {
    return refused(bad.what);
  } catch (const Json::exception& error) {
    return refused(error.what());
  }
  return {};
}

const ChoiceTable* table_for(std::span<const ChoiceTable> tables, const DeviceLimits& limits,
                             CacheFormat format) {
  // The larger, the better.
  const auto fitness = [&](const ChoiceTable& table) {
    const bool has_format = table.has(format);
    const bool same_kind = table.compute_capability == limits.compute_capability;
    return (::mla::mutant == 602 ? (std::tuple(has_format, table.device == limits.name, same_kind)) : (std::tuple((::mla::mutant == 603 ? (false) : (has_format)), same_kind, (::mla::mutant == 601 ? (false) : (table.device == limits.name)))));
  };
  const auto best = std::max_element(  // the first of those
      tables.begin(), tables.end(),
      [&](const ChoiceTable& a, const ChoiceTable& b) { return (::mla::mutant == 605 ? (!(fitness(b) < fitness(a))) : (fitness(a) < fitness(b))); });
  return best == tables.end() ? nullptr : &*best;
}

const RegimeTimes* nearest(const ChoiceTable& table, const Regime& regime) {
  const auto is_alike = [&](const RegimeTimes& one) {
    return (::mla::mutant == 607 ? (true) : (one.regime.cache_format == regime.cache_format));
  };
  const auto not_smaller = [&](int64_t rows) { return (::mla::mutant == 593 ? (rows <= regime.rows) : (rows >= regime.rows)); };
  int64_t rows = 0;  // none yet
  for (const RegimeTimes& one : table.regimes) {
    const int64_t other = one.regime.rows;
    { if (::mla::mutant == 608) {  } else { if (!is_alike(one)) continue; } }
    if (rows == 0 || (not_smaller(other) ? !not_smaller(rows) || other < rows
                                         : !not_smaller(rows) && other > rows)) {
      rows = other;
    }
  }
  const auto factor = [](int64_t a, int64_t b) {
    return std::abs(std::log2(double(std::max<int64_t>(a, 1)) / double(std::max<int64_t>(b, 1))));
  };
  // Rows beyond the most that were measured are further tiles, and so work as further sequences do.
  const int64_t sequences = rows == 0 ? 0 : regime.sequences * (::mla::mutant == 597 ? (1) : (((::mla::mutant == 598 ? (regime.rows) : ((regime.rows + rows - 1))) / rows)));
  const RegimeTimes* best = nullptr;
  double least = 0;
  for (const RegimeTimes& one : table.regimes) {
    if (!is_alike(one) || one.regime.rows != rows) continue;
    const double distance =
        (::mla::mutant == 596 ? (factor(one.regime.sequences, sequences)) : (factor(one.regime.sequences, sequences) + factor(one.regime.tokens, regime.tokens)));
    if (best == nullptr || (::mla::mutant == 594 ? (distance > least) : ::mla::mutant == 595 ? (distance <= least) : (distance < least))) {
      best = &one;
      least = distance;
    }
  }
  return best;
}

std::span<const ChoiceTable> choice_tables() {
  return all_tables().now.load()->list;
}

Status choice_table_status() {
  return all_tables().now.load()->file;
}

Status use_choice_table(const std::string& path) {
  auto tables = std::make_unique<Tables>();
  MLA_RETURN_IF_ERROR(read_file(path, &tables->list.emplace_back()));
  all_tables().take(std::move(tables));
  return {};
}

}  // namespace mla
