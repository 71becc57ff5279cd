/// @file
/// What the race detector remembers of memory: of every 4 bytes the last write, and who has read them
/// since.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "reference/gpu_model/vector_clock.h"

namespace gpu_model::detail {

/// An access, as its maker's slot will be known to others.
struct Epoch {
  uint32_t block = 0;
  Time time = 0;  ///< 0: there was no access.
  Slot slot = 0;
  uint32_t place : 31 = 0;  ///< Index of a Place.
  uint32_t atomic : 1 = 0;
};

/// Reads of a cell by lanes of one warp at one time, or by another slot. Or, if the epoch's block is 0, by
/// many blocks of the grid whose first is the epoch's slot: after its release number `time`, the
/// first of them at its place.
struct Reads {
  Epoch epoch;  ///< Its slot: of lane 0 of the warp, or the reader's own.
  /// The lanes; 0 for a slot that is no thread. Of many blocks: their numbers, modulo 32.
  uint32_t lanes = 0;
  uint32_t bytes = 15;  ///< Which of the four bytes, as bits.
  uint32_t next = 0;    ///< Index of the next reads of the cell; 0: none.
};

/// Four bytes of memory. All zeros: nobody has touched them.
struct Cell {
  Epoch write;
  uint32_t reads = 0;  ///< Index of the first of the reads since; 0: none.
  uint32_t parts = 0;  ///< Index of four cells, one per byte, that stand for this one; 0: none.
};

/// Cells and what belongs to them. Their memory is given as zeros, and costs only where it is touched.
class ShadowMemory {
 public:
  ShadowMemory() = default;
  /// Of `bytes` bytes of a block's shared memory, or, without a block, of global memory. Throws std::bad_alloc.
  explicit ShadowMemory(size_t bytes, uint32_t block = 0);
  ~ShadowMemory();
  ShadowMemory(ShadowMemory&& other) noexcept;
  ShadowMemory& operator=(ShadowMemory&& other) noexcept;

  size_t bytes() const { return bytes_; }
  /// Whose shared memory it is; 0: global memory.
  uint32_t block() const { return block_; }
  /// Forgets every access. From now on it is this block's memory.
  void clear(uint32_t block = 0);

  /// Calls function(cell, bytes of it) for the cells of `bytes` bytes from `offset`. A cell of which only
  /// a part is written becomes four, one per byte, until a write is to all of them.
  template <bool kWrites, typename Function>
  void for_each(size_t offset, size_t bytes, Function function);

  Reads& reads(uint32_t index) { return reads_[index]; }
  /// Adds reads to the front of the cell's.
  void add_reads(Cell& cell, const Reads& added);
  /// The cell has no reads any more.
  void drop_reads(Cell& cell);
  /// Drops the reads that `index` names: the cell's own, or the next of others.
  void drop_reads_at(uint32_t& index);

 private:
  void split(Cell& cell);
  void unite(Cell& cell);

  Cell* cells_ = nullptr;
  size_t bytes_ = 0;
  uint32_t block_ = 0;
  std::vector<Reads> reads_ = std::vector<Reads>(1);  // index 0 is none
  uint32_t free_reads_ = 0;
  std::vector<Cell> parts_ = std::vector<Cell>(4);
  uint32_t free_parts_ = 0;
};

template <bool kWrites, typename Function>
void ShadowMemory::for_each(size_t offset, size_t bytes, Function function) {
  for (size_t end = offset + bytes; offset < end;) {
    Cell& cell = cells_[offset / 4];
    const size_t first = offset % 4, last = offset / 4 == (end - 1) / 4 ? (end - 1) % 4 : 3;
    offset += last + 1 - first;
    const bool whole = first == 0 && last == 3;
    if (cell.parts == 0 && (whole || !kWrites)) [[likely]] {
      function(cell, (2u << last) - (1u << first));
      continue;
    }
    if (cell.parts == 0) split(cell);
    const uint32_t parts = cell.parts;
    for (size_t i = first; i <= last; ++i) {
      Cell part = parts_[parts + i];  // a copy: the vector may grow
      function(part, 15u);
      parts_[parts + i] = part;
    }
    if (whole && kWrites) unite(cell);
  }
}

}  // namespace gpu_model::detail
