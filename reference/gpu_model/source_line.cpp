#include "reference/gpu_model/source_line.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

#include <array>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <string_view>

namespace gpu_model::detail {
namespace {

uintptr_t offset_of(const void* code, const Dl_info& file) {
  return reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(file.dli_fbase) - 1;
}

/// The part of a path below the tree's root, whatever tree the compiler, or its cache, found the file in.
std::string below_root(std::string_view text) {
  std::string path = std::filesystem::path(text).lexically_normal();
  for (size_t at = path.find('/'); at != path.npos; at = path.find('/', at + 1)) {
    const std::string below = path.substr(at + 1);
    if (std::filesystem::is_regular_file(GPU_MODEL_SOURCE_ROOT + below)) return below;
  }
  return path;
}

/// Runs addr2line for addresses of one file; answers go to frames[which[i]].
void ask(const char* program, const std::vector<uintptr_t>& offsets,
         const std::vector<size_t>& which, std::vector<std::vector<SourceFrame>>& frames) {
  // The addresses are in a file: there may be more than a command line takes.
  char name[] = "/tmp/gpu_model.XXXXXX";
  const int descriptor = mkstemp(name);
  if (descriptor < 0) return;
  std::FILE* addresses = fdopen(descriptor, "w");
  for (const uintptr_t offset : offsets) std::fprintf(addresses, "0x%" PRIxPTR "\n", offset);
  std::fclose(addresses);
  std::array<char, 8192> command;
  std::snprintf(command.data(), command.size(), "addr2line -a -f -C -i -e '%s' < %s 2> /dev/null",
                program, name);
  {
    const std::unique_ptr<FILE, int (*)(FILE*)> output(popen(command.data(), "r"), pclose);
    // For each address itself, then pairs of lines: the function, and "file:line (more)".
    std::map<std::string, std::string, std::less<>> paths;
    std::string function;
    size_t next = 0;
    bool is_function = true;
    char* line = nullptr;
    size_t capacity = 0;
    while (output != nullptr && getline(&line, &capacity, output.get()) > 0) {
      std::string_view text = line;
      if (text.ends_with('\n')) text.remove_suffix(1);
      if (text.starts_with("0x") && is_function) {
        ++next;
        continue;
      }
      if (is_function) {
        function = text;
      } else if (const size_t colon = text.rfind(':'); next > 0 && colon != text.npos) {
        const std::string_view file = text.substr(0, colon);
        auto found = paths.find(file);
        if (found == paths.end()) found = paths.emplace(file, below_root(file)).first;
        const std::string& path = found->second;
        const int number = std::atoi(text.data() + colon + 1);
        if (number > 0 && !path.starts_with("reference/gpu_model/") && !path.starts_with("/usr/")) {
          frames[which[next - 1]].push_back({function, path, number});
        }
      }
      is_function = !is_function;
    }
    std::free(line);
  }
  unlink(name);
}

}  // namespace

std::vector<std::vector<SourceFrame>> source_frames(const std::vector<const void*>& codes) {
  struct Asked {
    std::vector<uintptr_t> offsets;
    std::vector<size_t> which;
  };
  std::map<std::string, Asked> by_file;
  // The name that dladdr has of the program itself is what it was called by, which may be another's.
  Dl_info self = {};
  dladdr(reinterpret_cast<const void*>(&offset_of), &self);
  std::error_code error;
  const std::string program = std::filesystem::read_symlink("/proc/self/exe", error);
  for (size_t i = 0; i < codes.size(); ++i) {
    Dl_info file = {};
    if (dladdr(codes[i], &file) == 0) continue;
    const bool in_program = file.dli_fbase == self.dli_fbase && !program.empty();
    Asked& asked = by_file[in_program ? program : file.dli_fname];
    asked.offsets.push_back(offset_of(codes[i], file));
    asked.which.push_back(i);
  }
  std::vector<std::vector<SourceFrame>> frames(codes.size());
  for (const auto& [file, asked] : by_file) ask(file.c_str(), asked.offsets, asked.which, frames);
  return frames;
}

std::string source_line(const void* code) {
  const std::vector<SourceFrame> frames = source_frames({code}).front();
  if (!frames.empty()) return frames.front().file + ":" + std::to_string(frames.front().line);
  Dl_info file = {};
  if (dladdr(code, &file) == 0) return "an unknown place";
  std::array<char, 4096> text;
  std::snprintf(text.data(), text.size(), "%s+0x%" PRIxPTR, file.dli_fname, offset_of(code, file));
  return text.data();
}

}  // namespace gpu_model::detail
