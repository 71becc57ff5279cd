// In the place of the real source_line.cpp: places are numbers, of the table that places.py wrote.
#include "reference/gpu_model/source_line.h"

extern const char* const kPlaces[];

namespace gpu_model::detail {

std::vector<std::vector<SourceFrame>> source_frames(const std::vector<const void*>& codes) {
  return std::vector<std::vector<SourceFrame>>(codes.size());
}

std::string source_line(const void* code) {
  return kPlaces[reinterpret_cast<uintptr_t>(code)];
}

}  // namespace gpu_model::detail
