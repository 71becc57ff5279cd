#include "reference/gpu_model/async_copy.h"

#include <string>

#include "reference/gpu_model/multiprocessor.h"

namespace gpu_model::detail {

size_t CopyQueue::covered(size_t pending) const {
  return group_ends_.size() <= pending ? 0 : group_ends_[group_ends_.size() - pending - 1];
}

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

bool Multiprocessor::issue_copy(const Copy& copy, int source_bytes, Wait wait) {
  const auto reject = [&](auto&& why) {
    fail([&] { return detail::describe(wait) + why() + ", " + place(self().number); });
  };
  if (source_bytes != 0 && source_bytes != 16) {
    reject([&] { return ": source_bytes = " + std::to_string(source_bytes) + " must be 0 or 16"; });
  }
  if (const auto past = reinterpret_cast<uintptr_t>(copy.source) % sizeof(Granule); past != 0) {
    reject([&] {
      return " reads from a misaligned address, " + std::to_string(past) +
             " bytes past a multiple of 16";
    });
  }
  GranuleMark& mark = granule_to_write(copy.destination, wait);
  mark.state = GranuleMark::State::kCopying;
  mark.file = wait.file;
  mark.line = wait.line;
  mark.thread = static_cast<uint16_t>(self().number);
  marks_used_ = true;
  self().copies.issue(copy);
  if (races_ != nullptr) {
    races_->issue_copy(self().number, copy.destination, copy.source, wait);
  }
  if (counters_ != nullptr) {
    counters_->async_copy(self().number, copy.destination, copy.source, wait.what, wait.file,
                          wait.line);
  }
  if (recording_ != nullptr) {
    recording_->copy(*this, wait, static_cast<size_t>(&mark - marks_.data()) * sizeof(Granule));
  }
  return launch_->seed != 0 && random_.next() % 2 == 0;
}

bool Multiprocessor::take_copy(size_t pending, Copy& copy) {
  if (!self().copies.take(pending, copy)) return false;
  const auto offset = static_cast<const std::byte*>(copy.destination) - shared_.data();
  mark_written(static_cast<size_t>(offset) / sizeof(Granule));
  if (races_ != nullptr) {
    const GranuleMark& mark = marks_[static_cast<size_t>(offset) / sizeof(Granule)];
    races_->finish_copy(self().number, copy.destination, {"cp_async_16", mark.file, mark.line});
  }
  return true;
}

// What ptx.h calls.

void check_matrix_row(const char* what, const void* row, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  const Wait wait{what, file, line};
  multiprocessor.granule(" reads", row, wait);
  multiprocessor.record_access(row, false);
  multiprocessor.note_access(row, sizeof(Granule), RaceDetector::Kind::kRead, wait);
  multiprocessor.count_access(row, sizeof(Granule), AccessKind::kMatrixLoad, wait);
}

bool issue_copy(const Copy& copy, int source_bytes, const char* file, int line) {
  return Multiprocessor::here().issue_copy(copy, source_bytes, {"cp_async_16", file, line});
}

void commit_copies(const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  multiprocessor.self().copies.commit();
  if (Recording* recording = multiprocessor.recording(); recording != nullptr) {
    recording->commit(multiprocessor, {"cp_async_commit_group", file, line},
                      Recording::Group::kCopies);
  }
}

void count_instruction(const char* what, const char* file, int line) {
  if (Multiprocessor* multiprocessor = Multiprocessor::current(); multiprocessor != nullptr) {
    multiprocessor->count_access(nullptr, 0, AccessKind::kNone, {what, file, line});
  }
}

void wait_for_copies(int pending, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  if (Recording* recording = multiprocessor.recording(); recording != nullptr) {
    const auto allowed = static_cast<size_t>(pending);
    recording->settle(multiprocessor, {"cp_async_wait_group", file, line},
                      Recording::Group::kCopies, allowed,
                      multiprocessor.self().copies.covered(allowed));
  }
}

void wait_for_grids(const char* file, int line) {
  executed("griddepcontrol_wait", file, line);
  Multiprocessor& multiprocessor = Multiprocessor::here();
  if (RaceDetector* races = multiprocessor.races(); races != nullptr) {
    races->wait_for_grids(multiprocessor.self().number);
  }
}

bool take_copy(int pending, Copy& copy) {
  return Multiprocessor::here().take_copy(static_cast<size_t>(pending), copy);
}

}  // namespace gpu_model::detail
