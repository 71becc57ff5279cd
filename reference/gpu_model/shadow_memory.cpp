#include "reference/gpu_model/shadow_memory.h"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace gpu_model::detail {
namespace {

size_t cell_bytes(size_t bytes) {
  return (bytes + 3) / 4 * sizeof(Cell);
}

bool same(const Epoch& a, const Epoch& b) {
  return a.block == b.block && a.time == b.time && a.slot == b.slot && a.place == b.place &&
         a.atomic == b.atomic;
}

}  // namespace

ShadowMemory::ShadowMemory(size_t bytes, uint32_t block) : bytes_(bytes), block_(block) {
  if (bytes == 0) return;
  void* map = mmap(nullptr, cell_bytes(bytes), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  cells_ = static_cast<Cell*>(map);
}

ShadowMemory::~ShadowMemory() {
  if (cells_ != nullptr) munmap(cells_, cell_bytes(bytes_));
}

ShadowMemory::ShadowMemory(ShadowMemory&& other) noexcept {
  *this = std::move(other);
}

ShadowMemory& ShadowMemory::operator=(ShadowMemory&& other) noexcept {
  std::swap(cells_, other.cells_);
  std::swap(bytes_, other.bytes_);
  std::swap(block_, other.block_);
  std::swap(reads_, other.reads_);
  std::swap(free_reads_, other.free_reads_);
  std::swap(parts_, other.parts_);
  std::swap(free_parts_, other.free_parts_);
  return *this;
}

void ShadowMemory::clear(uint32_t block) {
  block_ = block;
  if (cells_ != nullptr) madvise(cells_, cell_bytes(bytes_), MADV_DONTNEED);
  reads_.resize(1);
  free_reads_ = 0;
  parts_.resize(4);
  free_parts_ = 0;
}

void ShadowMemory::add_reads(Cell& cell, const Reads& added) {
  uint32_t index = free_reads_;
  if (index != 0) {
    free_reads_ = reads_[index].next;
  } else {
    index = static_cast<uint32_t>(reads_.size());
    reads_.emplace_back();
  }
  reads_[index] = added;
  reads_[index].next = cell.reads;
  cell.reads = index;
}

void ShadowMemory::drop_reads_at(uint32_t& index) {
  const uint32_t dropped = index;
  index = reads_[dropped].next;
  reads_[dropped].next = free_reads_;
  free_reads_ = dropped;
}

void ShadowMemory::drop_reads(Cell& cell) {
  while (cell.reads != 0) drop_reads_at(cell.reads);
}

void ShadowMemory::split(Cell& cell) {
  uint32_t index = free_parts_;
  if (index != 0) {
    free_parts_ = parts_[index].parts;
  } else {
    index = static_cast<uint32_t>(parts_.size());
    parts_.resize(parts_.size() + 4);
  }
  for (size_t i = 0; i < 4; ++i) {
    Cell part;
    part.write = cell.write;
    for (uint32_t each = cell.reads; each != 0; each = reads_[each].next) {
      Reads copy = reads_[each];
      if ((copy.bytes >> i & 1) == 0) continue;
      copy.bytes = 15;
      add_reads(part, copy);
    }
    parts_[index + i] = part;
  }
  drop_reads(cell);
  cell.parts = index;
}

void ShadowMemory::unite(Cell& cell) {
  const uint32_t parts = cell.parts;
  for (size_t i = 0; i < 4; ++i) {
    // After a write all four are alike.
    if (!same(parts_[parts + i].write, parts_[parts].write) || parts_[parts + i].reads != 0) return;
  }
  cell.write = parts_[parts].write;
  cell.parts = 0;
  parts_[parts] = {};
  parts_[parts].parts = free_parts_;
  free_parts_ = parts;
}

}  // namespace gpu_model::detail
