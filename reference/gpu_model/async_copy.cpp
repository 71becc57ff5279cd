#include "reference/gpu_model/async_copy.h"

#include <string>

#include "reference/gpu_model/multiprocessor.h"

namespace gpu_model::detail {

bool CopyQueue::take(size_t pending, Copy& copy) {
  if (group_ends_.size() <= pending) return false;
  const size_t groups = group_ends_.size() - pending;
  const size_t end = group_ends_[groups - 1];
  if (taken_ < end) {
    copy = copies_[taken_++];
    return true;
  }
  copies_.erase(copies_.begin(), copies_.begin() + static_cast<ptrdiff_t>(end));
  group_ends_.erase(group_ends_.begin(), group_ends_.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& group_end : group_ends_) group_end -= end;
  taken_ = 0;
  return false;
}

void CopyQueue::clear() {
  copies_.clear();
  group_ends_.clear();
  taken_ = 0;
}

PendingCopy& Multiprocessor::granule(const char* does, const void* address, Wait wait) {
  const auto offset = static_cast<const std::byte*>(address) - shared_.data();
  const auto reject = [&](auto&& why) {
    fail([&] { return detail::describe(wait) + does + why() + ", " + place(self().number); });
  };
  if (offset < 0 || static_cast<size_t>(offset) + sizeof(Granule) > shared_.bytes()) {
    reject([&] {
      return " 16 bytes that are not in the block's dynamic shared memory" +
             (shared_.contains(address) ? ": " + shared_.describe(address) : "");
    });
  }
  if (offset % sizeof(Granule) != 0) {
    reject([&] {
      return " a misaligned address, " + std::to_string(offset % sizeof(Granule)) +
             " bytes past a multiple of 16";
    });
  }
  PendingCopy& pending = pending_[static_cast<size_t>(offset) / sizeof(Granule)];
  if (pending.file != nullptr) {
    reject([&] {
      const uint3 writer = threads_[pending.thread]->index;
      return " shared memory that cp.async of thread (" + std::to_string(writer.x) + "," +
             std::to_string(writer.y) + "," + std::to_string(writer.z) + ") at " +
             std::string(relative_path(pending.file)) + ":" + std::to_string(pending.line) +
             " writes and has not waited for";
    });
  }
  return pending;
}

bool Multiprocessor::issue_copy(const Copy& copy, int source_bytes, Wait wait) {
  const auto reject = [&](auto&& why) {
    fail([&] { return detail::describe(wait) + why() + ", " + place(self().number); });
  };
  if (source_bytes != 0 && source_bytes != 16) {
    reject([&] {
      return " copies " + std::to_string(source_bytes) + " bytes; this project's are 16 or 0";
    });
  }
  if (const auto past = reinterpret_cast<uintptr_t>(copy.source) % sizeof(Granule); past != 0) {
    reject([&] {
      return " reads from a misaligned address, " + std::to_string(past) +
             " bytes past a multiple of 16";
    });
  }
  granule(" writes", copy.destination, wait) = {wait.file, wait.line, self().number};
  self().copies.issue(copy);
  return launch_->seed != 0 && random_.next() % 2 == 0;
}

bool Multiprocessor::take_copy(size_t pending, Copy& copy) {
  if (!self().copies.take(pending, copy)) return false;
  release(copy);
  return true;
}

void Multiprocessor::release(const Copy& copy) {
  const auto offset = static_cast<const std::byte*>(copy.destination) - shared_.data();
  pending_[static_cast<size_t>(offset) / sizeof(Granule)] = {};
}

// What ptx.h calls.

void check_matrix_row(const char* what, const void* row, const char* file, int line) {
  Multiprocessor::here().granule(" reads", row, {what, file, line});
}

bool issue_copy(const Copy& copy, int source_bytes, const char* file, int line) {
  return Multiprocessor::here().issue_copy(copy, source_bytes, {"cp_async_16", file, line});
}

void commit_copies() {
  Multiprocessor::here().self().copies.commit();
}

bool take_copy(int pending, Copy& copy) {
  return Multiprocessor::here().take_copy(static_cast<size_t>(pending), copy);
}

}  // namespace gpu_model::detail
