#include "reference/gpu_model/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "reference/gpu_model/gpu_model.h"
#include "reference/gpu_model/sanitizer.h"

namespace gpu_model {
namespace detail {
namespace {

constexpr size_t kAlignment = 16;

size_t round_up(size_t value, size_t unit) {
  return (value + unit - 1) / unit * unit;
}
size_t page_bytes() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

GuardedMemory::GuardedMemory(size_t bytes, Place place) : bytes_(bytes) {
  const size_t inside = round_up(bytes, page_bytes());
  map_bytes_ = inside + 2 * kGuardBytes;
  void* map = mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return;
  auto* first = static_cast<std::byte*>(map) + kGuardBytes;
  if (inside > 0 && mprotect(first, inside, PROT_READ | PROT_WRITE) != 0) {
    munmap(map, map_bytes_);
    return;
  }
  map_ = static_cast<std::byte*>(map);
  data_ = place == Place::kAtStart ? first : first + inside - round_up(bytes, kAlignment);
}

GuardedMemory::GuardedMemory(GuardedMemory&& other) noexcept {
  *this = std::move(other);
}

GuardedMemory& GuardedMemory::operator=(GuardedMemory&& other) noexcept {
  std::swap(map_, other.map_);
  std::swap(map_bytes_, other.map_bytes_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

GuardedMemory::~GuardedMemory() {
  if (map_ == nullptr) return;
  asan_unpoison(map_, map_bytes_);  // the next mapping at this address is somebody else's
  munmap(map_, map_bytes_);
}

void GuardedMemory::protect(bool accessible) {
  const size_t inside = map_bytes_ - 2 * kGuardBytes;
  if (inside == 0) return;
  mprotect(map_ + kGuardBytes, inside, accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void GuardedMemory::poison() {
  std::byte* first = map_ + kGuardBytes;
  const size_t inside = map_bytes_ - 2 * kGuardBytes;
  asan_unpoison(first, inside);
  std::memset(first, 0xff, inside);
  asan_poison(first, static_cast<size_t>(data_ - first));
  asan_poison(data_ + bytes_, static_cast<size_t>(first + inside - (data_ + bytes_)));
}

ptrdiff_t GuardedMemory::damage() const {
  const auto damaged = [](const std::byte* byte) { return *byte != std::byte{0xff}; };
  const std::byte* last = map_ + map_bytes_ - kGuardBytes;
  for (const std::byte* byte = data_ + bytes_; byte < last; ++byte) {
    if (damaged(byte)) return byte - data_;
  }
  for (const std::byte* byte = data_ - 1; byte >= map_ + kGuardBytes; --byte) {
    if (damaged(byte)) return byte - data_;
  }
  return 0;
}

bool GuardedMemory::contains(const void* address) const {
  return map_ != nullptr && address >= map_ && address < map_ + map_bytes_;
}

std::string GuardedMemory::describe(const void* address) const {
  const ptrdiff_t offset = static_cast<const std::byte*>(address) - data_;
  const std::string where = offset < 0 ? std::to_string(-offset) + " bytes before the start of "
                                       : std::to_string(offset - static_cast<ptrdiff_t>(bytes_)) +
                                             " bytes past the end of ";
  return where + std::to_string(bytes_) + " bytes";
}

namespace {

// Everything gpu_model::allocate gave out, by address. Never destroyed: destructors of statics may
// still deallocate.
constinit std::mutex allocations_mutex;
std::map<const void*, GuardedMemory>& allocations() {
  static auto* all = new std::map<const void*, GuardedMemory>;
  return *all;
}
size_t allocated_bytes = 0;

}  // namespace

const std::byte* find_allocation(const void* address, size_t* bytes) {
  const std::scoped_lock lock(allocations_mutex);
  auto after = allocations().upper_bound(address);
  if (after == allocations().begin()) return nullptr;
  const GuardedMemory& memory = std::prev(after)->second;
  const auto offset = static_cast<size_t>(static_cast<const std::byte*>(address) - memory.data());
  if (offset >= memory.bytes()) return nullptr;
  *bytes = memory.bytes();
  return memory.data();
}

std::string describe_global(const void* address, const char* access) {
  const std::scoped_lock lock(allocations_mutex);
  for (const auto& [start, memory] : allocations()) {
    if (memory.contains(address)) {
      return std::string("out-of-bounds global memory ") + access + ": " + memory.describe(address);
    }
  }
  return {};
}

std::string describe_place(const void* address) {
  size_t bytes = 0;
  if (const std::byte* begin = find_allocation(address, &bytes); begin != nullptr) {
    return "byte " + std::to_string(static_cast<const std::byte*>(address) - begin) +
           " of an allocation of " + std::to_string(bytes) + " bytes";
  }
  char text[32];
  std::snprintf(text, sizeof text, "address %p", address);
  return text;
}

}  // namespace detail

void* allocate(size_t bytes) {
  if (bytes > free_memory()) return nullptr;
  const auto place = schedule().profile == nullptr ? detail::GuardedMemory::Place::kAtEnd
                                                   : detail::GuardedMemory::Place::kAtStart;
  detail::GuardedMemory memory(bytes, place);
  if (!memory.valid()) return nullptr;
  memory.poison();
  void* data = memory.data();
  const std::scoped_lock lock(detail::allocations_mutex);
  detail::allocations().emplace(data, std::move(memory));
  detail::allocated_bytes += bytes;
  return data;
}

void deallocate(void* pointer) {
  const std::scoped_lock lock(detail::allocations_mutex);
  const auto found = detail::allocations().find(pointer);
  if (found == detail::allocations().end()) return;
  detail::allocated_bytes -= found->second.bytes();
  detail::allocations().erase(found);
}

size_t free_memory() {
  const size_t machine = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * detail::page_bytes();
  const std::scoped_lock lock(detail::allocations_mutex);
  return machine > detail::allocated_bytes ? machine - detail::allocated_bytes : 0;
}

}  // namespace gpu_model
