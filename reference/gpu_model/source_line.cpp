#include "reference/gpu_model/source_line.h"

#include <dlfcn.h>

#include <array>
#include <cinttypes>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string_view>

namespace gpu_model::detail {

std::string source_line(const void* code) {
  Dl_info file = {};
  if (dladdr(code, &file) == 0) return "an unknown place";
  const auto offset =
      reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(file.dli_fbase) - 1;
  std::array<char, 4352> command;
  std::snprintf(command.data(), command.size(), "addr2line -i -e '%s' 0x%" PRIxPTR " 2> /dev/null",
                file.dli_fname, offset);
  // The innermost function first, each with the line of the call of the one before.
  const std::unique_ptr<FILE, int (*)(FILE*)> output(popen(command.data(), "r"), pclose);
  std::array<char, 4096> line;
  while (output != nullptr && std::fgets(line.data(), line.size(), output.get()) != nullptr) {
    std::string_view text = line.data();
    if (const size_t end = text.find_first_of(" \n"); end != text.npos) text = text.substr(0, end);
    if (text.starts_with('?')) break;
    std::string path = std::filesystem::path(text).lexically_normal();
    // The part below the tree's root, whatever tree the compiler, or its cache, found the file in.
    for (size_t at = path.find('/'); at != path.npos; at = path.find('/', at + 1)) {
      const std::string below = path.substr(at + 1, path.rfind(':') - at - 1);
      if (!std::filesystem::is_regular_file(GPU_MODEL_SOURCE_ROOT + below)) continue;
      path.erase(0, at + 1);
      break;
    }
    if (!path.starts_with("reference/gpu_model/") && !path.starts_with("/usr/")) return path;
  }
  std::snprintf(line.data(), line.size(), "%s+0x%" PRIxPTR, file.dli_fname, offset);
  return line.data();
}

}  // namespace gpu_model::detail
