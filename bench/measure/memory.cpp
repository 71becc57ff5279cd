#include "bench/measure/memory.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>

namespace mla::bench {
namespace {

namespace fs = std::filesystem;

constexpr double kUnlimited = std::numeric_limits<double>::infinity();

/// The number behind `key` in a file of lines "key number", or of a file of one number if the key is
/// empty; `otherwise` if there is none ("max").
double number_in(const fs::path& file, const std::string& key, double otherwise) {
  std::ifstream stream(file);
  std::string word;
  double value = 0;
  if (key.empty()) return stream >> value ? value : otherwise;
  while (stream >> word) {
    if (word == key) return stream >> value ? value : otherwise;
  }
  return otherwise;
}

/// What the control groups from `group` up to `root` leave, the tightest of them. Pages of files
/// that were not used lately make room.
double left_in_groups(const fs::path& root, const fs::path& group, const char* limit,
                      const char* usage, const char* inactive) {
  double left = kUnlimited;
  fs::path folder = root / group.relative_path();
  while (true) {
    const double most = number_in(folder / limit, "", kUnlimited);
    const double used =
        number_in(folder / usage, "", 0) - number_in(folder / "memory.stat", inactive, 0);
    left = std::min(left, most - std::max(0.0, used));
    if (folder == root || !folder.has_relative_path()) return left;
    folder = folder.parent_path();
  }
}

double left_in_control_group() {
  double left = kUnlimited;
  std::ifstream groups("/proc/self/cgroup");  // "4:memory:/path" of version 1, "0::/path" of 2
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const fs::path group = line.substr(second + 1);
    if (controllers.empty()) {
      left = std::min(left, left_in_groups("/sys/fs/cgroup", group, "memory.max", "memory.current",
                                           "inactive_file"));
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      left = std::min(left, left_in_groups("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes",
                                           "memory.usage_in_bytes", "total_inactive_file"));
    }
  }
  return left;
}

/// What limits of the process (ulimit -v) leave.
double left_in_process() {
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kUnlimited;
  const double pages = number_in("/proc/self/statm", "", 0);
  return static_cast<double>(limit.rlim_cur) - pages * static_cast<double>(sysconf(_SC_PAGESIZE));
}

std::string bytes_text(double bytes) {
  const char* const units[] = {"bytes", "kB", "MB", "GB", "TB", "PB", "EB"};
  size_t unit = 0;
  for (; bytes >= 1000 && unit + 1 < std::size(units); ++unit) bytes /= 1000;
  return unit == 0 ? fmt::format("{:.0f} bytes", bytes)
                   : fmt::format("{:.{}f} {}", bytes,
                                 bytes < 10    ? 2
                                 : bytes < 100 ? 1
                                               : 0,
                                 units[unit]);
}

/// By sizes, as doubles.
Footprint footprint(double batch, double seqlen_q, double heads_q, double heads_kv, double pages,
                    double page_size, double pages_per_seq, CacheFormat format) {
  const auto row_bytes = static_cast<double>(Problem{.cache_format = format}.cache_row_bytes());
  constexpr double kPatternBytes = 2, kFloatBytes = 4, kDoubleBytes = 8, kIdBytes = 4;
  const double rows = batch * seqlen_q * heads_q;
  return {.tables = kIdBytes * (batch * (pages_per_seq + 2) + 3 * pages),
          .inputs = kPatternBytes * kHeadDimQK * rows + row_bytes * pages * page_size * heads_kv,
          .outputs = rows * (kPatternBytes * kHeadDimV + kFloatBytes),
          .expected = kDoubleBytes * rows * (kHeadDimV + 1)};
}

}  // namespace

double host_memory_there() {
  const double free = 1024 * number_in("/proc/meminfo", "MemAvailable:", kUnlimited);
  return std::max(0.0, std::min({free, left_in_control_group(), left_in_process()}));
}

Status check_memory(const std::string& what, double needed, double there, const char* whose) {
  if (needed <= there) return {};
  return {StatusCode::kOutOfMemory, fmt::format("{} needs {} of {}; {} are there", what,
                                                bytes_text(needed), whose, bytes_text(there))};
}

Footprint footprint(const Problem& problem) {
  return footprint(problem.batch, problem.seqlen_q, problem.num_heads_q, problem.num_heads_kv,
                   problem.num_pages, problem.page_size, problem.max_pages_per_seq,
                   problem.cache_format);
}

Footprint footprint(const DecodeCase& spec) {
  const int page_size = is_page_size(spec.page_size) ? spec.page_size : kMinPageSize;
  double pages = 0, longest = 0;
  for (const int32_t length : spec.lengths) {
    const auto own = static_cast<double>(pages_for(std::max(length, 0), page_size));
    pages += own;
    longest = std::max(longest, own);
  }
  const double batch = spec.lengths.empty() ? spec.batch : double(spec.lengths.size());
  if (spec.lengths.empty()) {
    longest = static_cast<double>(pages_for(std::max(spec.seqlen_k, 0), page_size));
    pages = batch * longest;
  }
  return footprint(batch, spec.seqlen_q, spec.num_heads_q, spec.num_heads_kv, pages + kSparePages,
                   page_size, longest + 1, spec.cache_format);
}

Status check_tables_fit(const std::string& what, const Footprint& one) {
  return check_memory(what, one.tables, host_memory_there(), "host memory");
}

Status check_fits(const std::string& what, const Footprint& one, const Machine* machine,
                  int host_copies) {
  const double on_machine = one.tables + one.inputs + one.outputs;
  double host = one.tables + host_copies * one.inputs + one.expected;
  const bool model = machine != nullptr && machine->kind() == MachineKind::kModel;
  if (machine != nullptr) host += one.outputs;  // of a stage, fetched
  if (model) host += on_machine;
  MLA_RETURN_IF_ERROR(check_memory(what, host, host_memory_there(), "host memory"));
  if (machine == nullptr || model) return {};
  const auto there = static_cast<double>(machine->free_memory());
  return check_memory(what, on_machine, there, "GPU memory");
}

}  // namespace mla::bench
