#include "bench/profile/profile.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <tuple>

#include "bench/measure/table.h"
#include "reference/gpu_model/source_line.h"

namespace mla::bench {
namespace {

using gpu_model::AccessKind;
using gpu_model::Counts;
using gpu_model::detail::SourceFrame;

struct KindName {
  AccessKind kind;
  const char *title, *key;
};
constexpr KindName kGlobalKinds[] = {{AccessKind::kLoad, "global loads", "loads"},
                                     {AccessKind::kStore, "global stores", "stores"},
                                     {AccessKind::kAtomic, "global atomics", "atomics"},
                                     {AccessKind::kAsyncCopy, "cp.async", "async_copies"},
                                     {AccessKind::kBulkLoad, "bulk loads", "bulk_loads"},
                                     {AccessKind::kBulkStore, "bulk stores", "bulk_stores"}};
constexpr KindName kSharedKinds[] = {{AccessKind::kLoad, "shared loads", "loads"},
                                     {AccessKind::kStore, "shared stores", "stores"},
                                     {AccessKind::kAtomic, "shared atomics", "atomics"},
                                     {AccessKind::kMatrixLoad, "ldmatrix", "matrix_loads"},
                                     {AccessKind::kMatrixStore, "stmatrix", "matrix_stores"},
                                     {AccessKind::kAsyncCopy, "cp.async", "async_copies"},
                                     {AccessKind::kBulkLoad, "bulk loads", "bulk_loads"},
                                     {AccessKind::kBulkStore, "bulk stores", "bulk_stores"},
                                     {AccessKind::kProduct, "wgmma", "products"}};

std::string count(uint64_t value) {
  return std::to_string(value);
}

/// "3.25", "2"
std::string per(uint64_t value, uint64_t of) {
  return of == 0 ? "-" : fmt::format("{:.4g}", double(value) / double(of));
}

/// "scores" of "void mla::model::naive::scores<Eigen::bfloat16, 1>(mla::Problem, int)".
std::string kernel_name(const std::string& function) {
  std::string name;
  int depth = 0;
  for (size_t i = 0; i < function.size(); ++i) {
    const char c = function[i];
    if (c == '<') ++depth;
    if (depth == 0 && c == '(' && function.compare(i, 11, "(anonymous ") != 0) break;
    if (depth == 0) name += c;
    if (c == '>') --depth;
  }
  return name.substr(name.find_last_of(": ") + 1);
}

std::string place(const SourceFrame& frame) {
  return frame.file + ":" + std::to_string(frame.line);
}

const char* plain_name(AccessKind kind) {
  return kind == AccessKind::kLoad ? "load" : kind == AccessKind::kStore ? "store" : "atomic";
}

/// "stages/01_naive/kernel.cuh" of a path to it.
std::string below_root(const std::string& path) {
  for (const char* room : {"/stages/", "/tests/", "/reference/"}) {
    if (const size_t at = path.rfind(room); at != std::string::npos) return path.substr(at + 1);
  }
  return path;
}

std::string blocks_text(uint64_t blocks) {
  return std::to_string(blocks) + (blocks == 1 ? " block" : " blocks");
}

/// How a kernel uses a multiprocessor, in words.
std::string residency_text(const KernelProfile& kernel) {
  const gpu_model::Residency& room = kernel.residency;
  const unsigned warps = (kernel.threads + 31) / 32;
  std::string why = room.blocks == room.by_threads         ? "threads"
                    : room.blocks == room.by_shared_memory ? "shared memory"
                                                           : "registers";
  if (room.blocks == 32) why = "the limit of 32";
  return fmt::format(
      "room for {}{} at once on a multiprocessor by {}: {} of 64 warps{}",
      kernel.registers == 0 ? "at most " : "", blocks_text(room.blocks), why, room.blocks * warps,
      kernel.registers == 0 ? "; registers not known"
                            : fmt::format("; {} registers per thread", kernel.registers));
}

}  // namespace

Counts KernelProfile::of(AccessKind kind) const {
  Counts sum;
  for (const LineProfile& line : lines) {
    if (line.kind == kind) sum += line.counts;
  }
  return sum;
}

std::map<std::string, uint64_t> KernelProfile::executed() const {
  std::map<std::string, uint64_t> result;
  for (const LineProfile& line : lines) {
    // What meets a warp is counted there, apart from what its lanes bring.
    const bool counted_twice =
        line.kind == AccessKind::kMatrixLoad || line.kind == AccessKind::kMatrixStore;
    if (!counted_twice && line.counts.executed > 0) result[line.what] += line.counts.executed;
  }
  for (const char* plain : {"load", "store", "atomic"}) result.erase(plain);
  return result;
}

uint64_t KernelProfile::flop() const {
  uint64_t sum = 0;
  for (const LineProfile& line : lines) sum += line.counts.flop;
  return sum;
}

std::vector<KernelProfile> profile_kernels(const gpu_model::Profile& profile,
                                           const std::map<std::string, unsigned>& registers) {
  // All that addr2line is to be asked, by number. Of a function the address behind its first byte.
  std::vector<const void*> codes;
  for (const gpu_model::CountedLaunch& launch : profile.launches) {
    codes.push_back(static_cast<const char*>(launch.kernel) + 1);
    for (const auto& instruction : launch.instructions) codes.push_back(instruction.code);
  }
  const std::vector<std::vector<SourceFrame>> frames = gpu_model::detail::source_frames(codes);

  std::vector<KernelProfile> kernels;
  size_t next = 0, number = 0;
  for (const gpu_model::CountedLaunch& launch : profile.launches) {
    ++number;
    const std::vector<SourceFrame>& function = frames[next++];
    const std::string name = launch.kernel == nullptr || function.empty()
                                 ? "launch " + std::to_string(number)
                                 : kernel_name(function.back().function);
    auto kernel = std::find_if(kernels.begin(), kernels.end(),
                               [&](const KernelProfile& one) { return one.name == name; });
    if (kernel == kernels.end()) {
      kernel = kernels.insert(kernels.end(), KernelProfile{});
      kernel->name = name;
    }
    ++kernel->launches;
    kernel->blocks += uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
    kernel->threads =
        std::max(kernel->threads, launch.block[0] * launch.block[1] * launch.block[2]);
    kernel->shared_bytes = std::max(kernel->shared_bytes, launch.shared_bytes);
    kernel->cluster = std::max(kernel->cluster, launch.cluster);
    for (const gpu_model::CountedInstruction& instruction : launch.instructions) {
      const std::vector<SourceFrame>& chain = frames[next++];
      LineProfile line;
      line.kind = instruction.kind;
      line.what = instruction.what != nullptr ? instruction.what : plain_name(instruction.kind);
      if (instruction.file != nullptr) {
        line.file = below_root(instruction.file);
        line.line = instruction.line;
      } else if (!chain.empty()) {
        line.file = chain.front().file;
        line.line = chain.front().line;
        for (size_t i = 1; i < chain.size(); ++i) line.callers.push_back(place(chain[i]));
      }
      const auto same = [&](const LineProfile& other) {
        return other.kind == line.kind && other.line == line.line && other.file == line.file &&
               other.what == line.what && other.callers == line.callers;
      };
      auto found = std::find_if(kernel->lines.begin(), kernel->lines.end(), same);
      if (found == kernel->lines.end()) found = kernel->lines.insert(kernel->lines.end(), line);
      found->counts += instruction.counts;
    }
  }
  for (KernelProfile& kernel : kernels) {
    if (const auto found = registers.find(kernel.name); found != registers.end()) {
      kernel.registers = found->second;
    }
    kernel.residency = gpu_model::residency(kernel.threads, kernel.shared_bytes, kernel.registers);
    std::stable_sort(kernel.lines.begin(), kernel.lines.end(),
                     [](const LineProfile& a, const LineProfile& b) {
                       return std::tie(a.file, a.line, a.kind, a.what, a.callers) <
                              std::tie(b.file, b.line, b.kind, b.what, b.callers);
                     });
  }
  return kernels;
}

std::string profile_table(const std::vector<KernelProfile>& kernels) {
  std::string text;
  for (const KernelProfile& kernel : kernels) {
    text += fmt::format(
        "\n{}: {} of {} of {} threads{}, {} bytes of shared memory; {}\n", kernel.name,
        kernel.launches == 1 ? "a launch" : std::to_string(kernel.launches) + " launches",
        blocks_text(kernel.blocks), kernel.threads,
        kernel.cluster > 1 ? fmt::format(", {} to a cluster", kernel.cluster) : "",
        kernel.shared_bytes, residency_text(kernel));
    Table global({"", "requests", "sectors", "sectors per request", "of bytes fetched used",
                  "L2: kB at least", "kB at most"});
    bool any = false;
    for (const KindName& name : kGlobalKinds) {
      const Counts counts = kernel.of(name.kind);
      if (counts.global_requests == 0) continue;
      any = true;
      global.add({name.title, count(counts.global_requests), count(counts.global_sectors),
                  per(counts.global_sectors, counts.global_requests),
                  percent(double(counts.global_bytes) / double(32 * counts.global_sectors)),
                  fmt::format("{:.1f}", 0.032 * double(counts.l2_sectors)),
                  fmt::format("{:.1f}", 0.032 * double(counts.global_sectors))});
    }
    if (any) text += global.to_string();
    Table shared({"", "requests", "wavefronts", "wavefronts per request", "bank conflicts"});
    any = false;
    for (const KindName& name : kSharedKinds) {
      const Counts counts = kernel.of(name.kind);
      if (counts.shared_requests == 0) continue;
      any = true;
      shared.add({name.title, count(counts.shared_requests), count(counts.shared_wavefronts),
                  per(counts.shared_wavefronts, counts.shared_requests),
                  count(counts.shared_conflicts)});
    }
    if (any) text += shared.to_string();
    std::string executed;
    for (const auto& [what, times] : kernel.executed()) {
      executed += fmt::format("{}{} {}", executed.empty() ? "" : ", ", what, times);
    }
    if (!executed.empty()) text += "executed by warps: " + executed + "\n";
    if (kernel.flop() > 0) {
      text += fmt::format("tensor cores: {} FLOP\n", number(double(kernel.flop()), 4));
    }
  }
  return text;
}

std::string profile_listing(const std::vector<KernelProfile>& kernels, const std::string& root) {
  std::map<std::string, std::map<int, Counts>> files;
  for (const KernelProfile& kernel : kernels) {
    for (const LineProfile& line : kernel.lines) {
      if (line.file.empty()) continue;
      Counts counts = line.counts;
      // A warp function's execution is counted apart from its lanes' accesses.
      if (line.kind == AccessKind::kMatrixLoad || line.kind == AccessKind::kMatrixStore) {
        counts.executed = 0;
      }
      files[line.file][line.line] += counts;
    }
  }
  std::string text;
  for (const auto& [file, lines] : files) {
    const bool whole = file.ends_with("/kernel.cuh");
    text += fmt::format("\n{}\n{:>10} {:>9} {:>7} {:>10} {:>9}\n", file, "executed", "sectors",
                        "per req", "wavefronts", "conflicts");
    std::ifstream source(root + "/" + file);
    std::string code;
    int number = 0, last = 0;
    while (std::getline(source, code)) {
      ++number;
      const auto found = lines.find(number);
      if (found == lines.end() && !whole) continue;
      if (!whole && last != 0 && number != last + 1) text += "...\n";
      last = number;
      std::string cells(49, ' ');
      if (found != lines.end()) {
        const Counts& counts = found->second;
        const auto cell = [](uint64_t value, bool shown) { return shown ? count(value) : "-"; };
        const bool global = counts.global_requests > 0, shared = counts.shared_requests > 0;
        cells = fmt::format("{:>10} {:>9} {:>7} {:>10} {:>9}", count(counts.executed),
                            cell(counts.global_sectors, global),
                            global ? per(counts.global_sectors, counts.global_requests) : "-",
                            cell(counts.shared_wavefronts, shared),
                            cell(counts.shared_conflicts, shared));
      }
      text += fmt::format("{} {:>4}  {}\n", cells, number, code);
    }
    if (number == 0) {
      for (const auto& [line, counts] : lines) {
        text +=
            fmt::format("{:>10} {:>9} {:>7} {:>10} {:>9} {:>4}\n", counts.executed,
                        counts.global_sectors, per(counts.global_sectors, counts.global_requests),
                        counts.shared_wavefronts, counts.shared_conflicts, line);
      }
    }
  }
  return text;
}

namespace {

nlohmann::ordered_json global_json(const Counts& counts) {
  return {{"requests", counts.global_requests},
          {"sectors", counts.global_sectors},
          {"lines", counts.global_lines},
          {"bytes", counts.global_bytes},
          {"l2_sectors", counts.l2_sectors}};
}

nlohmann::ordered_json shared_json(const Counts& counts) {
  return {{"requests", counts.shared_requests},
          {"wavefronts", counts.shared_wavefronts},
          {"conflicts", counts.shared_conflicts},
          {"bytes", counts.shared_bytes}};
}

}  // namespace

nlohmann::ordered_json profile_json(const std::vector<KernelProfile>& kernels) {
  nlohmann::ordered_json all = nlohmann::ordered_json::array();
  for (const KernelProfile& kernel : kernels) {
    nlohmann::ordered_json json{{"name", kernel.name},
                                {"launches", kernel.launches},
                                {"blocks", kernel.blocks},
                                {"threads", kernel.threads},
                                {"shared_bytes", kernel.shared_bytes},
                                {"cluster", kernel.cluster}};
    if (kernel.registers > 0) json["registers"] = kernel.registers;
    json["active_blocks"] = {{"by_threads", kernel.residency.by_threads},
                             {"by_shared_memory", kernel.residency.by_shared_memory},
                             {"blocks", kernel.residency.blocks}};
    if (kernel.registers > 0) json["active_blocks"]["by_registers"] = kernel.residency.by_registers;
    json["active_warps"] = kernel.residency.blocks * ((kernel.threads + 31) / 32);
    json["flop"] = kernel.flop();
    json["executed"] = kernel.executed();
    for (const KindName& name : kGlobalKinds) {
      const Counts counts = kernel.of(name.kind);
      if (counts.global_requests > 0) json["global"][name.key] = global_json(counts);
    }
    for (const KindName& name : kSharedKinds) {
      const Counts counts = kernel.of(name.kind);
      if (counts.shared_requests > 0) json["shared"][name.key] = shared_json(counts);
    }
    json["lines"] = nlohmann::ordered_json::array();
    for (const LineProfile& line : kernel.lines) {
      nlohmann::ordered_json entry{{"file", line.file},
                                   {"line", line.line},
                                   {"what", line.what},
                                   {"executed", line.counts.executed},
                                   {"threads", line.counts.threads}};
      if (!line.callers.empty()) entry["called_from"] = line.callers;
      if (line.counts.flop > 0) entry["flop"] = line.counts.flop;
      if (line.counts.global_requests > 0) entry["global"] = global_json(line.counts);
      if (line.counts.shared_requests > 0) entry["shared"] = shared_json(line.counts);
      json["lines"].push_back(std::move(entry));
    }
    all.push_back(std::move(json));
  }
  return all;
}

}  // namespace mla::bench
