// mbarriers: phases of arrivals and bytes.
#include "reference/gpu_model/mbarrier.h"

#include <string>

#include "reference/gpu_model/multiprocessor.h"

namespace gpu_model::detail {
namespace {

constexpr int64_t kMaxBytes = (1 << 20) - 1;  // the PTX ISA's limits
constexpr unsigned kMaxArrivals = (1 << 20) - 1;

}  // namespace

MbarrierState* Multiprocessor::find_mbarrier(size_t offset) {
  for (MbarrierState& state : mbarriers_) {
    if (state.offset == offset) return &state;
  }
  return nullptr;
}

uint64_t Multiprocessor::mbarrier_init(const ptx::Mbarrier* barrier, int count,
                                       const Wait& place_of) {
  Wait wait = place_of;
  const size_t offset = shared_offset(barrier, sizeof *barrier, 8, " uses", wait);
  wait.mbarrier = static_cast<int>(offset);
  if (count < 1 || static_cast<unsigned>(count) > kMaxArrivals) {
    fail([&] {
      return detail::describe(wait) + ": count = " + std::to_string(count) +
             " must be 1 to 1048575, " + place(self().number);
    });
  }
  for (unsigned number = 0; number < count_; ++number) {
    const Wait& other = threads_[number]->wait;
    if (other.what == nullptr || other.mbarrier != static_cast<int>(offset)) continue;
    fail([&] {
      return detail::describe(wait) + " while " + describe(*threads_[number]) + ", " +
             place(self().number);
    });
  }
  for (const BulkCopy* load : loads_) {
    if (load->barrier != offset) continue;
    fail([&] {
      return detail::describe(wait) + " while " + load->what + " at " +
             std::string(relative_path(load->file)) + ":" + std::to_string(load->line) +
             " has yet to complete on it, " + place(self().number);
    });
  }
  MbarrierState* state = find_mbarrier(offset);
  if (state == nullptr) state = &mbarriers_.emplace_back();
  *state = {};
  state->offset = offset;
  state->count = state->pending = static_cast<unsigned>(count);
  state->thread = self().number;
  if (recording_ != nullptr) recording_->mbarrier(*this, wait, count);
  return state->mark();
}

void Multiprocessor::fence_mbarrier_init(const Wait& wait) {
  if (recording_ != nullptr) recording_->run(*this, wait);
  for (MbarrierState& state : mbarriers_) {
    if (state.thread == self().number) state.fenced = true;
  }
  if (races_ != nullptr) races_->fence_inits(self().number);
}

MbarrierState& Multiprocessor::mbarrier(uint64_t mark, const Wait& wait) {
  MbarrierState* state = find_mbarrier(static_cast<size_t>(wait.mbarrier));
  if (state == nullptr || mark != state->mark()) {
    fail([&] {
      return detail::describe(wait) + ": the barrier " +
             (state == nullptr ? "is not initialised" : "was overwritten by ordinary stores") +
             ", " + place(self().number);
    });
  }
  return *state;
}

void Multiprocessor::mbarrier_update(MbarrierState& state, unsigned arrivals, int64_t bytes,
                                     const Wait& wait) {
  const auto where = [&] { return running_ != nullptr ? ", " + place(self().number) : ""; };
  if (arrivals > state.pending) {
    reject([&] {
      return detail::describe(wait) + ": too many arrivals: phase " + std::to_string(state.phase) +
             " takes " + std::to_string(state.count) + " and still waits for " +
             std::to_string(state.bytes) + " bytes" + where();
    });
    return;
  }
  state.pending -= arrivals;
  state.bytes -= bytes;
  if (state.bytes > kMaxBytes || state.bytes < -kMaxBytes) {
    reject([&] {
      return detail::describe(wait) + ": phase " + std::to_string(state.phase) + " wants " +
             std::to_string(state.bytes) + " bytes, which must be -1048575 to 1048575" + where();
    });
    return;
  }
  if (state.pending != 0 || state.bytes > 0) return;
  if (state.bytes < 0) {
    reject([&] {
      return detail::describe(wait) + ": " + std::to_string(-state.bytes) +
             " bytes more than were expected in phase " + std::to_string(state.phase) + where();
    });
    return;
  }
  ++state.phase;
  state.pending = state.count;
  if (races_ != nullptr) {
    races_->complete_phase(state.clock, slot_of(state), static_cast<Time>(state.phase));
  }
  size_t released = 0;
  for (unsigned number = 0; number < count_; ++number) {
    Thread& thread = *threads_[number];
    if (thread.wait.what != nullptr && thread.wait.mbarrier == static_cast<int>(state.offset)) {
      wake(thread);
      ++released;
    }
  }
  if (recording_ != nullptr) recording_->phase(*this, state, released);
  draw_priorities();
}

void Multiprocessor::mbarrier_wait(uint64_t mark, bool cluster, const Wait& wait) {
  if (wait.parity != 0 && wait.parity != 1) {
    fail([&] {
      return detail::describe(wait) + ": parity must be 0 or 1, " + place(self().number);
    });
  }
  MbarrierState& state = mbarrier(mark, wait);
  if (static_cast<int>(state.phase % 2) == wait.parity) {
    const uint64_t phase = state.phase;
    if (recording_ != nullptr) recording_->wait(*this, wait, phase);
    suspend(wait);
    // Others may have initialised barriers meanwhile.
    const MbarrierState* now = find_mbarrier(static_cast<size_t>(wait.mbarrier));
    if (now->phase != phase + 1) {
      fail([&] {
        return detail::describe(wait) + ": phases " + std::to_string(phase) + " and " +
               std::to_string(phase + 1) +
               " both ended before this thread looked again: on a GPU it may see neither, and wait "
               "for ever, " +
               place(self().number);
      });
    }
  } else if (recording_ != nullptr) {
    recording_->pass(*this, wait, state.phase);
  }
  MbarrierState* now = find_mbarrier(static_cast<size_t>(wait.mbarrier));
  now->observed = now->phase;
  if (races_ != nullptr) races_->wait(now->clock, self().number, cluster);
}

std::string Multiprocessor::phase(const Wait& wait) const {
  if (wait.mbarrier < 0) return {};
  for (const MbarrierState& state : mbarriers_) {
    if (state.offset != static_cast<size_t>(wait.mbarrier)) continue;
    return ": phase " + std::to_string(state.phase) + " wants " + std::to_string(state.pending) +
           " of " + std::to_string(state.count) + " arrivals and " + std::to_string(state.bytes) +
           " bytes";
  }
  return {};
}

// What ptx_sm90.h calls.

namespace {

Wait at_barrier(const char* what, const ptx::Mbarrier* barrier, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  Wait wait{what, file, line};
  wait.mbarrier =
      static_cast<int>(multiprocessor.shared_offset(barrier, sizeof *barrier, 8, " uses", wait));
  multiprocessor.note_access(barrier, sizeof *barrier, RaceDetector::Kind::kBarrier, wait);
  return wait;
}

}  // namespace

uint64_t mbarrier_init(const ptx::Mbarrier* barrier, int count, const char* file, int line) {
  const Wait wait{"mbarrier_init", file, line};
  Multiprocessor& multiprocessor = Multiprocessor::here();
  const uint64_t mark = multiprocessor.mbarrier_init(barrier, count, wait);
  multiprocessor.note_access(barrier, sizeof *barrier, RaceDetector::Kind::kWrite, wait);
  return mark;
}

void fence_mbarrier_init(const char* file, int line) {
  Multiprocessor::here().fence_mbarrier_init({"fence_mbarrier_init", file, line});
}

void check_mbarrier(const char* what, const ptx::Mbarrier* barrier, const char* file, int line) {
  at_barrier(what, barrier, file, line);
}

void mbarrier_arrive(const char* what, const ptx::Mbarrier* barrier, uint64_t mark, int bytes,
                     const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  const Wait wait = at_barrier(what, barrier, file, line);
  MbarrierState& state = multiprocessor.mbarrier(mark, wait);
  if (bytes < 0) {
    multiprocessor.fail([&] {
      return describe(wait) + ": bytes = " + std::to_string(bytes) + " must be at least 0, " +
             multiprocessor.place(multiprocessor.self().number);
    });
  }
  const uint64_t phase = state.phase;
  if (RaceDetector* races = multiprocessor.races(); races != nullptr) {
    races->arrive(state.clock, multiprocessor.self().number);
  }
  if (Recording* recording = multiprocessor.recording(); recording != nullptr) {
    recording->arrive(multiprocessor, wait, multiprocessor, state, bytes);
  }
  multiprocessor.mbarrier_update(state, 1, -int64_t{bytes}, wait);
  multiprocessor.count_access(nullptr, 0, AccessKind::kNone, wait);
  if (state.phase != phase) multiprocessor.let_others_overtake();
}

void mbarrier_wait(const char* what, const ptx::Mbarrier* barrier, uint64_t mark, int parity,
                   bool cluster, const char* file, int line) {
  Wait wait = at_barrier(what, barrier, file, line);
  wait.parity = parity;
  Multiprocessor& multiprocessor = Multiprocessor::here();
  multiprocessor.count_access(nullptr, 0, AccessKind::kNone, wait);
  multiprocessor.mbarrier_wait(mark, cluster, wait);
}

}  // namespace gpu_model::detail
