#include "bench/measure/recorded.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bench/measure/shapes.h"

namespace mla::bench {
namespace {

using Json = nlohmann::json;

/// Whether these are results of mla_bench.
bool is_results(const Json& file) {
  return file.is_object() && file.contains("context") && file["context"].is_object() &&
         file["context"].value("schema", "") == kResultsSchema;
}

double number_in(const std::map<std::string, std::string>& context, const std::string& key,
                 double unit) {
  const auto found = context.find(key);
  if (found == context.end()) return kUnknown;
  char* end = nullptr;
  const double value = std::strtod(found->second.c_str(), &end);
  return end == found->second.c_str() ? kUnknown : value * unit;
}

Ceilings ceilings_of(const std::map<std::string, std::string>& context) {
  Ceilings ceilings;
  ceilings.read = number_in(context, "ceiling_read_gbps", 1e9);
  ceilings.read_302mb = number_in(context, "ceiling_read_302mb_gbps", 1e9);
  ceilings.fp32 = number_in(context, "ceiling_fp32_tflops", 1e12);
  ceilings.matrix_cold = number_in(context, "ceiling_matrix_cold_tflops", 1e12);
  ceilings.matrix_sustained = number_in(context, "ceiling_matrix_sustained_tflops", 1e12);
  ceilings.shared = number_in(context, "ceiling_shared_tbps", 1e12);
  ceilings.shared_bytes_per_clock = number_in(context, "ceiling_shared_bytes_per_clock", 1);
  ceilings.launch = number_in(context, "ceiling_launch_us", 1e-6);
  return ceilings;
}

/// False if it is no entry stage/shape/mode with a time.
bool read_entry(const Json& json, RecordedEntry* entry) {
  if (json.value("error_occurred", false) || json.contains("skipped")) return false;
  std::string name = json.value("name", "");
  std::string* parts[] = {&entry->stage, &entry->shape, &entry->mode};
  for (std::string* part : parts) {
    const size_t slash = name.find('/');
    *part = name.substr(0, slash);
    name = slash == std::string::npos ? "" : name.substr(slash + 1);
  }
  entry->us = json.value("real_time", 0.0);
  for (const auto& [key, value] : json.items()) {
    if (value.is_number()) entry->counters[key] = value.get<double>();
  }
  return !entry->mode.empty() && entry->us > 0;
}

/// Of Google Benchmark's rows of a benchmark the one over all its samples counts, or the only one.
void add(const std::string& aggregate, RecordedEntry entry, Recorded* recorded) {
  if (!aggregate.empty() && aggregate != "samples") return;
  for (RecordedEntry& known : recorded->entries) {
    if (known.stage != entry.stage || known.shape != entry.shape || known.mode != entry.mode) {
      continue;
    }
    if (!aggregate.empty()) known = std::move(entry);
    return;
  }
  recorded->entries.push_back(std::move(entry));
}

Status unreadable(const std::string& path, const std::string& why) {
  return {StatusCode::kFileError, path + ": " + why};
}

std::string where(const std::string& folder) {
  return folder.empty() ? MLA_RESULTS_FOLDER : folder;
}

}  // namespace

const RecordedEntry* Recorded::find(const std::string& stage, const std::string& shape,
                                    const std::string& mode) const {
  const auto found = std::find_if(entries.begin(), entries.end(), [&](const RecordedEntry& entry) {
    return entry.stage == stage && entry.shape == shape && entry.mode == mode;
  });
  return found == entries.end() ? nullptr : &*found;
}

std::string Recorded::origin() const {
  const auto get = [&](const char* key) {
    const auto found = context.find(key);
    return found == context.end() ? std::string("unknown") : found->second;
  };
  return get("gpu") + ", commit " + get("commit") + ", " + get("date_utc").substr(0, 10);
}

Status load_recorded(const std::string& path, Recorded* recorded) {
  std::ifstream stream(path);
  if (!stream) return unreadable(path, "cannot be read");
  try {
    const Json file = Json::parse(stream);
    if (!is_results(file)) return unreadable(path, "not a results file of mla_bench");
    Recorded result;
    result.file = path;
    for (const auto& [key, value] : file["context"].items()) {
      if (value.is_string()) result.context[key] = value.get<std::string>();
    }
    result.ceilings = ceilings_of(result.context);
    const double multiprocessors = number_in(result.context, "multiprocessors", 1);
    if (multiprocessors > 0) result.multiprocessors = static_cast<int>(multiprocessors);
    for (const Json& json : file.value("benchmarks", Json::array())) {
      RecordedEntry entry;
      if (read_entry(json, &entry))
        add(json.value("aggregate_name", ""), std::move(entry), &result);
    }
    *recorded = std::move(result);
  } catch (const Json::exception& error) {
    return unreadable(path, error.what());
  }
  return {};
}

std::vector<Recorded> load_all_recorded(const std::string& folder) {
  std::vector<Recorded> all;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(where(folder), error)) {
    Recorded one;
    if (file.path().extension() == ".json" && load_recorded(file.path().string(), &one).ok() &&
        one.context["machine"] == "gpu") {
      all.push_back(std::move(one));
    }
  }
  std::sort(all.begin(), all.end(), [](Recorded& a, Recorded& b) {
    return std::pair(a.context["date_utc"], a.file) > std::pair(b.context["date_utc"], b.file);
  });
  return all;
}

Status load_newest_recorded(Recorded* recorded, const std::string& folder) {
  Recorded found;
  std::string lowest;  // rung that it has
  for (Recorded& one : load_all_recorded(folder)) {
    std::string rung;  // the lowest with a time of this shape
    for (const RecordedEntry& entry : one.entries) {
      const bool counts = entry.shape == "h128_q1_b64_k4096" && entry.mode == "cold" &&
                          std::isdigit(static_cast<unsigned char>(entry.stage[0])) != 0;
      if (counts && (rung.empty() || entry.stage < rung)) rung = entry.stage;
    }
    if (rung.empty() || (!lowest.empty() && rung >= lowest)) continue;
    found = std::move(one);
    lowest = rung;
  }
  if (lowest.empty()) return unreadable(where(folder), "no recorded results of a GPU");
  *recorded = std::move(found);
  return {};
}

Status load_newest_recorded_of(CacheFormat format, Recorded* recorded, const std::string& folder) {
  for (Recorded& one : load_all_recorded(folder)) {
    const bool has_format =
        std::any_of(one.entries.begin(), one.entries.end(), [&](const RecordedEntry& entry) {
          Shape shape;
          return parse_shape(entry.shape, &shape).ok() && shape.spec.cache_format == format;
        });
    if (!has_format) continue;
    *recorded = std::move(one);
    return {};
  }
  return unreadable(where(folder), std::string("no recorded results of a GPU with a cache of ") +
                                       to_string(format));
}

}  // namespace mla::bench
