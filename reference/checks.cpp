#include "reference/checks.h"

#include <cstdint>
#include <cstdio>
#include <string>

#include "reference/paging.h"

namespace mla {

Status check_at_least_one(const char* name, int value) {
  if (value >= 1) return {};
  return {StatusCode::kInvalidArgument,
          std::string(name) + " = " + std::to_string(value) + " must be at least 1"};
}

Status check_page_size(int page_size) {
  if (is_page_size(page_size)) return {};
  return {StatusCode::kInvalidArgument,
          "page_size = " + std::to_string(page_size) + " must be 16, 32, 64, 128 or 256"};
}

Status check_pointer(const char* name, const void* pointer, int alignment) {
  if (pointer == nullptr) return {StatusCode::kInvalidArgument, std::string(name) + " is null"};
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) == 0) return {};
  char address[32];
  std::snprintf(address, sizeof address, "%p", pointer);
  return {StatusCode::kInvalidArgument, std::string(name) + " = " + address +
                                            " is not aligned to " + std::to_string(alignment) +
                                            " bytes"};
}

}  // namespace mla
