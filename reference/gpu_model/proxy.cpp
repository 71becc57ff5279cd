// Shared memory under the two proxies. Ordinary stores change the generic view at once; bulk copies
// change both views; the asynchronous view gets ordinary stores at a fence. Stores by cp.async and
// stmatrix are known, so only their own thread's fence publishes them. Other stores are not seen:
// a fence publishes whatever differs and is not known to be another's. To compare all of shared
// memory takes microseconds, so it is done once for all fences of a warp's lanes that run in a row,
// when the last of them has run. Where it is cheap it is done at every fence, and so it is under
// some seeds where it is not.
#include "reference/gpu_model/proxy.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "reference/gpu_model/multiprocessor.h"

namespace gpu_model::detail {
namespace {

constexpr size_t kExactBytes = 32 * 1024;
constexpr uint64_t kExactSeeds = 8;  // one seed in so many

}  // namespace

size_t Multiprocessor::shared_offset(const void* address, size_t bytes, size_t alignment,
                                     const char* does, const Wait& wait) {
  const auto offset = static_cast<const std::byte*>(address) - shared_.data();
  if (offset < 0 || static_cast<size_t>(offset) + bytes > shared_.bytes()) {
    fail([&] {
      return detail::describe(wait) + does + " " + std::to_string(bytes) +
             " bytes that are not in the block's dynamic shared memory" +
             (shared_.contains(address) ? ": " + shared_.describe(address) : "") + ", " +
             place(self().number);
    });
  }
  if (static_cast<size_t>(offset) % alignment != 0) {
    fail([&] {
      return detail::describe(wait) + does + " a misaligned address, " +
             std::to_string(static_cast<size_t>(offset) % alignment) +
             " bytes past a multiple of " + std::to_string(alignment) + ", " + place(self().number);
    });
  }
  return static_cast<size_t>(offset);
}

std::string Multiprocessor::writer(const GranuleMark& mark) const {
  if (mark.state == GranuleMark::State::kLanding && mark.issuer != 0) {
    return cluster_->blocks[mark.issuer - 1u]->place(mark.thread) + " at " +
           std::string(relative_path(mark.file)) + ":" + std::to_string(mark.line);
  }
  const uint3 index = threads_[mark.thread]->index;
  return "thread (" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ") at " + std::string(relative_path(mark.file)) + ":" +
         std::to_string(mark.line);
}

std::string Multiprocessor::pending_write(const GranuleMark& mark) const {
  return mark.state == GranuleMark::State::kCopying
             ? "cp.async of " + writer(mark) + " still writes: the thread has not waited for it"
             : "a bulk copy of " + writer(mark) + " still writes: it has not arrived";
}

GranuleMark& Multiprocessor::granule(const char* does, const void* address, const Wait& wait) {
  const size_t offset = shared_offset(address, sizeof(Granule), sizeof(Granule), does, wait);
  GranuleMark& mark = marks_[offset / sizeof(Granule)];
  if (mark.state == GranuleMark::State::kCopying || mark.state == GranuleMark::State::kLanding) {
    fail([&] {
      return detail::describe(wait) + does + " shared memory that " + pending_write(mark) + ", " +
             place(self().number);
    });
  }
  return mark;
}

GranuleMark& Multiprocessor::granule_to_write(const void* address, const Wait& wait) {
  GranuleMark& mark = granule(" writes", address, wait);
  if (async_.used) check_no_reader(static_cast<size_t>(&mark - marks_.data()), wait);
  return mark;
}

void Multiprocessor::check_no_reader(size_t index, const Wait& wait) {
  if (async_.readers[index] == 0) return;
  fail([&] {
    return detail::describe(wait) + " writes shared memory at byte " +
           std::to_string(index * sizeof(Granule)) + " that " + reader(index) + " still reads, " +
           place(self().number);
  });
}

void Multiprocessor::reject_async_access(size_t index, const char* does, const Wait& wait) {
  if (async_.fenced) {
    publish_stores();
    if (marks_[index].state == GranuleMark::State::kIdle &&
        equal(generic_granules()[index], async_.granules[index])) {
      return;
    }
  }
  reject([&] {
    const GranuleMark& mark = marks_[index];
    std::string why = "was written by ordinary stores, with no fence_proxy_async since";
    if (mark.state == GranuleMark::State::kWritten) {
      why = "was written by " + writer(mark) + ", which has not called fence_proxy_async since";
    } else if (mark.state != GranuleMark::State::kIdle) {
      why = pending_write(mark);
    }
    return detail::describe(wait) + does + " shared memory at byte " +
           std::to_string(index * sizeof(Granule)) + " that " + why +
           (running_ != nullptr ? ", " + place(self().number) : "");
  });
}

void Multiprocessor::mark_written(size_t index, const char* file, int line) {
  GranuleMark& mark = marks_[index];
  if (file != nullptr) {
    mark.file = file;
    mark.line = line;
  }
  mark.thread = static_cast<uint16_t>(self().number);
  mark.state = GranuleMark::State::kWritten;
  marks_used_ = true;
  if (mark.listed == mark.thread + 1) return;
  mark.listed = static_cast<uint16_t>(mark.thread + 1);
  self().written.push_back(static_cast<uint32_t>(index));
}

void Multiprocessor::use_async_view() {
  if (async_.used) return;
  async_.used = true;
  if (async_.granules.size() != marks_.size()) {
    async_.granules.resize(marks_.size());
    async_.readers.resize(marks_.size());
  }
  for (size_t i = 0; i < async_.granules.size(); ++i) async_.granules[i] = ~Granule{};
  for (uint16_t& readers : async_.readers) readers = 0;
}

void Multiprocessor::fence_proxy_async(const Wait& wait) {
  if (recording_ != nullptr) recording_->run(*this, wait);
  if (races_ != nullptr) races_->fence_proxy(self().number);
  use_async_view();
  Thread& thread = self();
  for (const uint32_t index : thread.written) {
    GranuleMark& mark = marks_[index];
    if (mark.listed == thread.number + 1) mark.listed = 0;
    if (mark.state != GranuleMark::State::kWritten || mark.thread != thread.number) continue;
    mark.state = GranuleMark::State::kIdle;
    async_.granules[index] = generic_granules()[index];
  }
  thread.written.clear();
  if (shared_.bytes() <= kExactBytes || launch_->seed % kExactSeeds == kExactSeeds - 1) {
    publish_stores();
  } else {
    async_.fenced = true;
  }
}

void Multiprocessor::publish_stores() {
  async_.fenced = false;
  const Granule* from = generic_granules();
  Granule* to = async_.granules.data();
  const auto publish = [&](size_t index) {
    if (marks_[index].state != GranuleMark::State::kIdle || equal(from[index], to[index])) return;
    // The views agreed when the reader came: it was stored to since. By whom is not known.
    if (async_.readers[index] != 0 && error_.empty()) {
      error_ = "ordinary stores wrote shared memory at byte " +
               std::to_string(index * sizeof(Granule)) + " that " + reader(index) +
               " still read, block (" + std::to_string(block_index_.x) + "," +
               std::to_string(block_index_.y) + "," + std::to_string(block_index_.z) + ")";
    }
    to[index] = from[index];
  };
  constexpr size_t kAtOnce = 32;  // most are equal, and memcmp sees that soonest
  for (size_t begin = 0; begin < marks_.size(); begin += kAtOnce) {
    const size_t end = std::min(begin + kAtOnce, marks_.size());
    if (std::memcmp(from + begin, to + begin, (end - begin) * sizeof(Granule)) == 0) continue;
    for (size_t index = begin; index < end; ++index) publish(index);
  }
}

void Multiprocessor::reset_async() {
  if (marks_used_) {
    for (GranuleMark& mark : marks_) mark = {};
    for (const auto& thread : threads_) thread->written.clear();
    marks_used_ = false;
  }
  mbarriers_.clear();
  free_load_places_.insert(free_load_places_.end(), loads_.begin(), loads_.end());
  loads_.clear();
  writes_.clear();
  if (async_.used) {
    for (const auto& thread : threads_) {  // of the last launch there may have been more
      thread->stores.stores.clear();
      thread->stores.group_ends.clear();
      thread->registers.clear();
    }
  }
  async_.used = false;
  async_.fenced = false;
  for (WarpProducts& products : products_) {
    if (products.first == 0 && products.instructions == 0 && products.queue.empty()) continue;
    products = {};
  }
  for (Warpgroup& warpgroup : warpgroups_) {
    warpgroup.instructions.clear();
    warpgroup.first = 0;
  }
  async_random_.state = random_.state ^ 0xa5a5a5a5a5a5a5a5;
  pace_ = launch_->seed == 0 ? Pace::kLate : static_cast<Pace>(async_random_.next() % 3);
}

void Multiprocessor::check_async_end() {
  const auto block = [&] {
    return ", block (" + std::to_string(block_index_.x) + "," + std::to_string(block_index_.y) +
           "," + std::to_string(block_index_.z) + ")";
  };
  const auto under_way = [&](const char* what, const char* file, int line) {
    if (error_.empty()) {
      error_ = std::string("the block ended while ") + what + " at " +
               std::string(relative_path(file)) + ":" + std::to_string(line) + " was under way" +
               block();
    }
  };
  for (const BulkCopy* load : loads_) under_way(load->what, load->file, load->line);
  for (const MbarrierState& barrier : mbarriers_) {  // landed early, but that was luck
    if (barrier.landed > barrier.observed) under_way(barrier.what, barrier.file, barrier.line);
  }
  if (async_.used) {
    if (const BulkCopy* copy = find_cluster_reader(0, SIZE_MAX); copy != nullptr) {
      under_way(copy->what, copy->file, copy->line);
    }
    for (unsigned number = 0; number < count_; ++number) {
      for (const BulkCopy& store : threads_[number]->stores.stores) {
        under_way(store.what, store.file, store.line);
      }
    }
  }
  for (const WarpProducts& products : products_) {
    if (products.queue.empty()) continue;
    const Product& product = products.queue.front().product;
    under_way(product.what, product.file, product.line);
  }
  for (const Warpgroup& warpgroup : warpgroups_) {
    if (warpgroup.instructions.empty() || !error_.empty()) continue;
    const WarpgroupInstruction& instruction = warpgroup.instructions.front();
    error_ = std::string(instruction.what) + " at " + std::string(relative_path(instruction.file)) +
             ":" + std::to_string(instruction.line) + " was executed by " +
             std::to_string(instruction.warps) + " of the 4 warps of a warpgroup, first by warp " +
             std::to_string(instruction.first) + block();
  }
  for (BulkCopy& write : writes_) write_global(write);
  writes_.clear();
}

// What ptx_sm90.h calls.

void fence_proxy_async(const char* file, int line) {
  Multiprocessor::here().fence_proxy_async({"fence_proxy_async", file, line});
}

void check_matrix_row_to_write(const char* what, const void* row, const char* file, int line) {
  const Wait wait{what, file, line};
  Multiprocessor& multiprocessor = Multiprocessor::here();
  multiprocessor.granule_to_write(row, wait);
  multiprocessor.count_access(row, sizeof(Granule), AccessKind::kMatrixStore, wait);
  multiprocessor.record_access(row, true);
}

void wrote(const char* what, const void* granule, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  const auto offset = static_cast<const std::byte*>(granule) -
                      reinterpret_cast<std::byte*>(multiprocessor.generic_granules());
  multiprocessor.mark_written(static_cast<size_t>(offset) / sizeof(Granule), file, line);
  multiprocessor.note_access(granule, sizeof(Granule), RaceDetector::Kind::kWrite,
                             {what, file, line});
}

void store_matrices(void* const* lanes) {
  for (size_t lane = 0; lane < 32; ++lane) {
    auto* operands = static_cast<StoredMatrices*>(lanes[lane]);
    const size_t matrix = lane / 8, row = lane % 8;
    for (size_t i = 0; i < 4; ++i) {
      operands->row[i] = static_cast<const StoredMatrices*>(lanes[row * 4 + i])->r[matrix];
    }
  }
}

void store_transposed_matrices(void* const* lanes) {
  const auto element = [&](size_t matrix, size_t row, size_t column) {
    const uint32_t* r = static_cast<const StoredMatrices*>(lanes[row * 4 + column / 2])->r;
    return r[matrix] >> column % 2 * 16 & 0xffff;
  };
  for (size_t lane = 0; lane < 16; ++lane) {
    auto* operands = static_cast<StoredMatrices*>(lanes[lane]);
    const size_t matrix = lane / 8, column = lane % 8;
    for (size_t i = 0; i < 4; ++i) {
      operands->row[i] = element(matrix, 2 * i, column) | element(matrix, 2 * i + 1, column) << 16;
    }
  }
}

}  // namespace gpu_model::detail
