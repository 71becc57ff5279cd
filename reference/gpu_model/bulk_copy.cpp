// Bulk copies, of boxes of tensors and of consecutive bytes. A load lands when nothing else can
// run, or earlier; a store reads shared memory in the wait that covers it, or earlier, and writes
// when the block ends, or earlier.
#include "reference/gpu_model/bulk_copy.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "reference/gpu_model/multiprocessor.h"

namespace gpu_model::detail {
namespace {

constexpr size_t kGranule = sizeof(Granule);

size_t alignment_of(const TensorMap& map) {
  return map.swizzle_128b ? 1024 : map.swizzle_64b ? 512 : 128;
}

/// Calls function(granule of the box, global address, first byte that lies in the tensor, end of
/// them) for each chunk of 16 bytes of a box, the bytes counted from the chunk's first.
template <typename Function>
void for_each_chunk(const TensorMap& map, const Coordinates& coordinates, Function function) {
  const int64_t element_bytes = map.element_bytes;
  const size_t row_granules = map.row_bytes() / kGranule;
  const auto rank = static_cast<size_t>(map.rank);
  size_t rows = 1;
  for (size_t i = 1; i < rank; ++i) rows *= map.box[i];
  for (size_t row = 0; row < rows; ++row) {
    bool inside = true;
    std::byte* start = static_cast<std::byte*>(const_cast<void*>(map.address));
    size_t rest = row;
    for (size_t i = 1; i < rank; ++i) {
      const int64_t place = int64_t{coordinates.start[i]} + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      inside = inside && place >= 0 && place < static_cast<int64_t>(map.size[i]);
      if (inside) start += static_cast<uint64_t>(place) * map.stride_bytes[i];
    }
    for (size_t chunk = 0; chunk < row_granules; ++chunk) {
      const int64_t byte =
          coordinates.start[0] * element_bytes + static_cast<int64_t>(chunk * kGranule);
      const int64_t end = static_cast<int64_t>(map.size[0]) * element_bytes - byte;
      const int64_t count = int64_t{kGranule};
      const int64_t begin = inside ? std::clamp<int64_t>(-byte, 0, count) : 0;
      const int64_t last = inside ? std::clamp<int64_t>(end, 0, count) : 0;
      const size_t place = map.swizzle_128b  ? chunk ^ row % 8
                           : map.swizzle_64b ? chunk ^ row / 2 % 4
                                             : chunk;
      const size_t granule = row * row_granules + place;
      function(granule, start + byte, begin, std::max(begin, last));
    }
  }
}

/// Calls function(address, bytes) for what a copy reads or writes of global memory.
template <typename Function>
void for_each_source(const BulkCopy& copy, Function function) {
  if (!copy.tensor) {
    function(copy.global, copy.bytes);
    return;
  }
  for_each_chunk(copy.map, copy.coordinates,
                 [&](size_t, const std::byte* global, int64_t begin, int64_t last) {
                   if (begin < last) function(global + begin, static_cast<size_t>(last - begin));
                 });
}

/// Reads the source of a load.
void read_global(BulkCopy& copy) {
  copy.has_data = true;
  copy.data.resize(copy.bytes / kGranule);
  if (!copy.tensor) {
    for (size_t i = 0; i < copy.data.size(); ++i) {
      __builtin_memcpy(&copy.data[i], copy.global + i * kGranule, kGranule);
    }
    return;
  }
  for_each_chunk(copy.map, copy.coordinates,
                 [&](size_t granule, const std::byte* global, int64_t begin, int64_t last) {
                   std::byte bytes[kGranule] = {};
                   __builtin_memcpy(bytes + begin, global + begin,
                                    static_cast<size_t>(last - begin));
                   __builtin_memcpy(&copy.data[granule], bytes, kGranule);
                 });
}

}  // namespace

/// Reads what a load brings: global memory, or another block's shared memory.
void Multiprocessor::read_source(BulkCopy& copy) {
  if (copy.source == nullptr) {
    read_global(copy);
    return;
  }
  const Wait wait{copy.what, copy.file, copy.line};
  const size_t begin = copy.source_offset / kGranule;
  copy.has_data = true;
  copy.data.resize(copy.bytes / kGranule);
  for (size_t i = 0; i < copy.data.size(); ++i) {
    copy.source->check_async_access(begin + i, " reads, while it is under way,", wait);
    copy.data[i] = copy.source->async_.granules[begin + i];
  }
}

/// Faults here, in the thread that asks, and not when the copy is carried out, if the global memory
/// is not there.
void Multiprocessor::probe(const BulkCopy& copy) {
  const auto touch = [](const std::byte* byte) {
    static_cast<void>(*static_cast<const volatile std::byte*>(byte));
  };
  if (!copy.tensor) {
    for (size_t i = 0; i < copy.bytes; i += 4096) touch(copy.global + i);
    touch(copy.global + copy.bytes - 1);
    return;
  }
  for_each_chunk(copy.map, copy.coordinates,
                 [&](size_t, const std::byte* global, int64_t begin, int64_t last) {
                   if (begin >= last) return;
                   touch(global + begin);
                   touch(global + last - 1);
                 });
}

void Multiprocessor::count_bulk_copy(const BulkCopy& copy, AccessKind kind) {
  if (counters_ == nullptr) return;
  Counts& counts = counters_->bulk_copy(kind, copy.bytes, copy.what, copy.file, copy.line);
  if (copy.source != nullptr) return;  // another block's shared memory
  for_each_source(copy, [&](const std::byte* global, size_t bytes) {
    counters_->bulk_piece(counts, global, bytes);
  });
}

size_t Multiprocessor::check_load(BulkCopy copy, void* destination, uint64_t barrier_mark,
                                  const Wait& wait) {
  const size_t alignment = copy.tensor ? alignment_of(copy.map) : kGranule;
  copy.offset = shared_offset(destination, copy.bytes, alignment, " writes", wait);
  copy.barrier = static_cast<size_t>(wait.mbarrier);
  copy.what = wait.what;
  copy.file = wait.file;
  copy.line = wait.line;
  copy.thread = self().number;
  const MbarrierState& barrier = mbarrier(barrier_mark, wait);
  if (!barrier.fenced) {
    fail([&] {
      return detail::describe(wait) +
             ": the thread that initialised the barrier has not called fence_mbarrier_init, " +
             place(self().number);
    });
  }
  probe(copy);
  use_async_view();
  const size_t begin = copy.offset / kGranule, end = begin + copy.bytes / kGranule;
  for (size_t i = begin; i < end; ++i) {
    check_async_access(i, " writes", wait);
    check_no_reader(i, wait);
    if (i == copy.barrier / kGranule) {
      fail([&] {
        return detail::describe(wait) + " writes over its own barrier, " + place(self().number);
      });
    }
  }
  if (races_ != nullptr) {
    races_->issue_load(self().number, *races_, copy.offset, copy.bytes, Landing::kBulk,
                       slot_of(barrier), static_cast<Time>(barrier.phase + 1), wait);
    note_source(copy, *this, barrier, wait);
  }
  count_bulk_copy(copy, AccessKind::kBulkLoad);
  mark_landing(begin, end, self().number, 0, wait);
  if (recording_ != nullptr) recording_->copy(*this, *this, copy, false);
  return add_load(std::move(copy)).bytes;
}

void Multiprocessor::note_source(const BulkCopy& copy, const Multiprocessor& target,
                                 const MbarrierState& barrier, const Wait& wait) {
  for_each_source(copy, [&](const std::byte* global, size_t bytes) {
    races_->read_global(self().number, *target.races_, global, bytes, target.slot_of(barrier),
                        static_cast<Time>(barrier.phase + 1), wait);
  });
}

void Multiprocessor::mark_landing(size_t begin, size_t end, unsigned thread, uint8_t issuer,
                                  const Wait& wait) {
  for (size_t i = begin; i < end; ++i) {
    GranuleMark& mark = marks_[i];
    mark.state = GranuleMark::State::kLanding;
    mark.file = wait.file;
    mark.line = wait.line;
    mark.thread = static_cast<uint16_t>(thread);
    mark.issuer = issuer;
    async_.granules[i] = ~Granule{};
  }
  marks_used_ = true;
}

void poison(void* memory, size_t bytes) {
  std::memset(memory, 0xff, bytes);
}

BulkCopy& Multiprocessor::add_load(BulkCopy copy) {
  if (free_load_places_.empty()) free_load_places_.push_back(&load_places_.emplace_back());
  loads_.push_back(free_load_places_.back());
  free_load_places_.pop_back();
  return *loads_.back() = std::move(copy);
}

void Multiprocessor::begin_load() {
  BulkCopy& load = *loads_.back();
  load.begun = true;
  if (launch_->seed != 0 && async_random_.next() % 2 == 0) read_global(load);
  if (pace_ == Pace::kEarly && async_random_.next() % 2 == 0) land(loads_.size() - 1);
}

void Multiprocessor::land_loads_early() {
  const unsigned odds = pace_ == Pace::kLate ? 0 : pace_ == Pace::kNowAndThen ? 16 : 4;
  if (odds != 0 && async_random_.next() % odds == 0) land_load();
}

bool Multiprocessor::land_load() {
  // One that a thread is about to begin is the last.
  const size_t begun = loads_.size() - (!loads_.empty() && !loads_.back()->begun);
  if (begun == 0) return false;
  land(launch_->seed == 0 ? 0 : async_random_.next() % begun);
  return true;
}

void Multiprocessor::land(size_t index) {
  landing_ = std::move(*loads_[index]);  // not a local: a GPU thread that fails destroys nothing
  free_load_places_.push_back(loads_[index]);
  BulkCopy& load = landing_;
  loads_.erase(loads_.begin() + static_cast<ptrdiff_t>(index));
  Wait wait{load.what, load.file, load.line};
  wait.mbarrier = static_cast<int>(load.barrier);
  const auto by = [&] {
    return ", issued by " + (load.issuer != nullptr ? load.issuer : this)->place(load.thread);
  };
  if (load.kind != BulkCopy::Kind::kBulk) {
    land_value(load);
    if (!error_.empty()) return;
  } else if (!load.has_data) {
    read_source(load);
  }
  if (load.source != nullptr) {
    const size_t source = load.source_offset / kGranule;
    for (size_t i = 0; i < load.bytes / kGranule; ++i) --load.source->async_.readers[source + i];
  }
  const size_t begin = load.offset / kGranule;
  for (size_t i = 0; i < load.data.size(); ++i) {
    Granule& generic = generic_granules()[begin + i];
    if (!equal(generic, ~Granule{})) {
      if (error_.empty()) {
        error_ = detail::describe(wait) + " writes shared memory at byte " +
                 std::to_string((begin + i) * kGranule) +
                 ", where an ordinary store wrote while the copy was under way" + by();
      }
      return;
    }
    generic = load.data[i];
    async_.granules[begin + i] = load.data[i];
    marks_[begin + i].state = GranuleMark::State::kIdle;
  }
  MbarrierState* barrier = find_mbarrier(load.barrier);
  barrier->landed = barrier->phase + 1;
  barrier->what = load.what;
  barrier->file = load.file;
  barrier->line = load.line;
  if (recording_ != nullptr) {
    recording_->land(*this, load, barrier->phase, barrier->pending,
                     barrier->bytes - static_cast<int64_t>(load.bytes));
  }
  mbarrier_update(*barrier, 0, static_cast<int64_t>(load.bytes), wait);
}

void Multiprocessor::store(BulkCopy copy, const void* source, const Wait& wait) {
  const size_t alignment = copy.tensor ? alignment_of(copy.map) : kGranule;
  copy.offset = shared_offset(source, copy.bytes, alignment, " reads", wait);
  copy.what = wait.what;
  copy.file = wait.file;
  copy.line = wait.line;
  copy.thread = self().number;
  probe(copy);
  use_async_view();
  const size_t begin = copy.offset / kGranule, end = begin + copy.bytes / kGranule;
  for (size_t i = begin; i < end; ++i) check_async_access(i, " reads", wait);
  if (races_ != nullptr) {
    races_->issue_store(self().number, copy.offset, copy.bytes, wait);
    for_each_source(copy, [&](const std::byte* global, size_t bytes) {
      races_->write_global(self().number, global, bytes, wait);
    });
  }
  count_bulk_copy(copy, AccessKind::kBulkStore);
  for (size_t i = begin; i < end; ++i) ++async_.readers[i];
  if (recording_ != nullptr) recording_->copy(*this, *this, copy, true);
  StoreQueue& queue = self().stores;
  queue.stores.push_back(std::move(copy));
  if (pace_ == Pace::kEarly && async_random_.next() % 2 == 0) read_store(queue.stores.back());
}

void Multiprocessor::read_store(BulkCopy& store) {
  if (store.has_data) return;
  const Wait wait{store.what, store.file, store.line};
  store.has_data = true;
  const size_t begin = store.offset / kGranule, count = store.bytes / kGranule;
  store.data.resize(count);
  for (size_t i = 0; i < count; ++i) {
    check_async_access(begin + i, " reads", wait);
    store.data[i] = async_.granules[begin + i];
  }
}

void Multiprocessor::write_global(BulkCopy& store) {
  if (recording_ != nullptr) recording_->land(*this, store, 0, 0, 0);
  if (!store.tensor) {
    for (size_t i = 0; i < store.data.size(); ++i) {
      __builtin_memcpy(store.global + i * kGranule, &store.data[i], kGranule);
    }
    return;
  }
  // Whole chunks, as on a GPU: what pads the end of a row to 16 bytes is overwritten.
  for_each_chunk(store.map, store.coordinates,
                 [&](size_t granule, std::byte* global, int64_t begin, int64_t last) {
                   if (begin < last) __builtin_memcpy(global, &store.data[granule], kGranule);
                 });
}

void Multiprocessor::commit_stores(const Wait& wait) {
  StoreQueue& queue = self().stores;
  queue.group_ends.push_back(queue.stores.size());
  if (recording_ != nullptr) recording_->commit(*this, wait, Recording::Group::kStores);
}

void Multiprocessor::wait_stores(size_t pending, const Wait& wait) {
  StoreQueue& queue = self().stores;
  const size_t groups = queue.group_ends.size() - std::min(pending, queue.group_ends.size());
  const size_t end = groups == 0 ? 0 : queue.group_ends[groups - 1];
  if (recording_ != nullptr) {
    recording_->settle(*this, wait, Recording::Group::kStores, pending, end);
  }
  if (groups == 0) return;
  for (size_t i = 0; i < end; ++i) {
    BulkCopy& store = queue.stores[i];
    read_store(store);
    if (races_ != nullptr) {
      races_->finish_store(self().number, store.offset, store.bytes,
                           {store.what, store.file, store.line});
    }
    const size_t begin = store.offset / kGranule, count = store.bytes / kGranule;
    for (size_t j = begin; j < begin + count; ++j) --async_.readers[j];
    if (launch_->seed == 0 || async_random_.next() % 2 == 0) {
      write_global(store);
    } else {
      writes_.push_back(std::move(store));
    }
  }
  queue.stores.erase(queue.stores.begin(), queue.stores.begin() + static_cast<ptrdiff_t>(end));
  queue.group_ends.erase(queue.group_ends.begin(),
                         queue.group_ends.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& group_end : queue.group_ends) group_end -= end;
}

std::string Multiprocessor::reader(size_t index) {
  const auto at = [](const char* what, const char* file, int line) {
    return std::string(what) + " at " + std::string(relative_path(file)) + ":" +
           std::to_string(line);
  };
  for (unsigned number = 0; number < count_; ++number) {
    for (const BulkCopy& store : threads_[number]->stores.stores) {
      const size_t begin = store.offset / kGranule;
      if (index >= begin && index < begin + store.bytes / kGranule) {
        return at(store.what, store.file, store.line);
      }
    }
  }
  for (unsigned warp = 0; warp < warp_count_; ++warp) {
    for (const WarpProduct& product : products_[warp].queue) {
      const uint16_t* end = product.granules + product.granule_count;
      if (std::find(product.granules, end, index) != end) {
        return at(product.product.what, product.product.file, product.product.line) + " of warp " +
               std::to_string(warp);
      }
    }
  }
  if (const BulkCopy* copy = find_cluster_reader(index, index); copy != nullptr) {
    return at(copy->what, copy->file, copy->line);
  }
  return "an operation under way";
}

// What ptx_sm90.h calls.

namespace {

/// The box that a copy takes, or else an error if the map is not valid.
BulkCopy box(const TensorMap* map, const Coordinates& coordinates, const Wait& wait) {
  check_tensor_map(wait.what, map, coordinates.rank, wait.file, wait.line);
  const int per_granule = static_cast<int>(kGranule) / map->element_bytes;
  if (coordinates.start[0] % per_granule != 0) {
    Multiprocessor& multiprocessor = Multiprocessor::here();
    multiprocessor.fail([&] {
      return describe(wait) + ": the box begins at column " + std::to_string(coordinates.start[0]) +
             ", which must be a multiple of " + std::to_string(per_granule) +
             " (16 bytes): elsewhere it is an illegal instruction, " +
             multiprocessor.place(multiprocessor.self().number);
    });
  }
  BulkCopy copy;
  copy.tensor = true;
  copy.map = *map;
  copy.coordinates = coordinates;
  copy.bytes = static_cast<size_t>(map->element_bytes);
  for (int i = 0; i < map->rank; ++i) copy.bytes *= map->box[i];
  return copy;
}

void check_bytes(int bytes, const void* global, const Wait& wait) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  if (bytes > 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0) return;
  multiprocessor.fail([&] {
    return describe(wait) + ": bytes = " + std::to_string(bytes) +
           ", and the global address lies " +
           std::to_string(reinterpret_cast<uintptr_t>(global) % 16) +
           " bytes past a multiple of 16: both must be multiples of 16, " +
           multiprocessor.place(multiprocessor.self().number);
  });
}

void check_policy(uint64_t policy, const Wait& wait) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  if (policy == kEvictFirst || policy == kEvictLast) return;
  multiprocessor.fail([&] {
    return describe(wait) +
           ": the cache policy is not one that createpolicy_evict_first or _last made, " +
           multiprocessor.place(multiprocessor.self().number);
  });
}

}  // namespace

void check_tensor_map(const char* what, const TensorMap* map, int rank, const char* file,
                      int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  const auto require = [&](bool holds, const char* why) {
    if (holds) return;
    multiprocessor.fail([&] {
      return describe({what, file, line}) + ": " + why + ", " +
             multiprocessor.place(multiprocessor.self().number);
    });
  };
  require(map != nullptr, "the tensor map is null");
  require(reinterpret_cast<uintptr_t>(map) % 64 == 0, "the tensor map is not aligned to 64 bytes");
  require(rank != 4 || map->rank == 4, "the tensor map must have rank 4");
  require(rank != 5 || map->rank == 5, "the tensor map must have rank 5");
  if (!gpu_model::check_tensor_map(*map).empty()) {
    multiprocessor.fail([&] {
      return describe({what, file, line}) + ": " + gpu_model::check_tensor_map(*map) + ", " +
             multiprocessor.place(multiprocessor.self().number);
    });
  }
  require(!map->swizzle_128b || map->row_bytes() == 128,
          "tensor map: with a 128-byte swizzle box[0] must be 64");
  require(!map->swizzle_64b || map->row_bytes() == 64,
          "tensor map: with a 64-byte swizzle box[0] must be 32");
}

size_t check_tensor_load(const char* what, void* destination, const TensorMap* map,
                         const Coordinates& coordinates, const ptx::Mbarrier* barrier,
                         uint64_t mark, uint64_t policy, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  Wait wait{what, file, line};
  check_policy(policy, wait);
  wait.mbarrier =
      static_cast<int>(multiprocessor.shared_offset(barrier, sizeof *barrier, 8, " uses", wait));
  return multiprocessor.check_load(box(map, coordinates, wait), destination, mark, wait);
}

size_t check_linear_load(void* destination, const void* source, int bytes,
                         const ptx::Mbarrier* barrier, uint64_t mark, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  Wait wait{"cp_async_bulk", file, line};
  check_bytes(bytes, source, wait);
  wait.mbarrier =
      static_cast<int>(multiprocessor.shared_offset(barrier, sizeof *barrier, 8, " uses", wait));
  BulkCopy copy;
  copy.global = static_cast<std::byte*>(const_cast<void*>(source));
  copy.bytes = static_cast<size_t>(bytes);
  return multiprocessor.check_load(std::move(copy), destination, mark, wait);
}

size_t check_multicast(void* destination, const TensorMap* map, const Coordinates& coordinates,
                       const ptx::Mbarrier* barrier, uint64_t mark, uint64_t policy,
                       const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  const Wait wait{"cp_async_bulk_tensor_4d_multicast", file, line};
  check_policy(policy, wait);
  BulkCopy copy = box(map, coordinates, wait);
  const size_t bytes = copy.bytes, alignment = alignment_of(*map);
  multiprocessor.check_cluster_load(std::move(copy), destination, barrier, mark, alignment, wait);
  return bytes;
}

size_t check_cluster_copy(void* destination, const void* source, int bytes,
                          const ptx::Mbarrier* barrier, uint64_t mark, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  const Wait wait{"cp_async_bulk_cluster", file, line};
  check_bytes(bytes, nullptr, wait);
  BulkCopy copy;
  copy.bytes = static_cast<size_t>(bytes);
  copy.source = &multiprocessor;
  copy.source_offset = multiprocessor.shared_offset(source, copy.bytes, kGranule, " reads", wait);
  multiprocessor.check_cluster_load(std::move(copy), destination, barrier, mark, kGranule, wait);
  return static_cast<size_t>(bytes);
}

void begin_load() {
  Multiprocessor::here().begin_load();
}

void tensor_store(const TensorMap* map, const Coordinates& coordinates, const void* source,
                  const char* file, int line) {
  const Wait wait{"cp_async_bulk_tensor_4d_store", file, line};
  Multiprocessor::here().store(box(map, coordinates, wait), source, wait);
}

void linear_store(void* destination, const void* source, int bytes, const char* file, int line) {
  const Wait wait{"cp_async_bulk_store", file, line};
  check_bytes(bytes, destination, wait);
  BulkCopy copy;
  copy.global = static_cast<std::byte*>(destination);
  copy.bytes = static_cast<size_t>(bytes);
  Multiprocessor::here().store(std::move(copy), source, wait);
}

void commit_stores(const char* file, int line) {
  Multiprocessor::here().commit_stores({"cp_async_bulk_commit_group", file, line});
}

void wait_stores(int pending, const char* file, int line) {
  Multiprocessor::here().wait_stores(static_cast<size_t>(pending),
                                     {"cp_async_bulk_wait_group_read", file, line});
}

}  // namespace gpu_model::detail
