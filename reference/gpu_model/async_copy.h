/// @file
/// cp.async on the model: the copies a GPU thread has issued.
#pragma once

#include <cstddef>
#include <vector>

#include "reference/gpu_model/ptx.h"

namespace gpu_model::detail {

/// The copies that one GPU thread has issued and not waited for, in that order.
class CopyQueue {
 public:
  /// Adds a copy.
  void issue(const Copy& copy) { copies_.push_back(copy); }
  /// Ends a group.
  void commit() { group_ends_.push_back(copies_.size()); }
  /// How many copies a wait for all but `pending` groups completes.
  size_t covered(size_t pending) const;
  /// See take_copy() in ptx.h.
  bool take(size_t pending, Copy& copy);

  /// Forgets everything.
  void clear();

 private:
  std::vector<Copy> copies_;
  std::vector<size_t> group_ends_;  // of each committed group: the number of copies up to its end
  size_t taken_ = 0;                // copies that the current wait has given out
};

}  // namespace gpu_model::detail
