/// @file
/// An instrument for kernels of several warpgroups: who does what when, inside one launch. A kernel
/// says where it is; bench/mla_timeline, which compiles it with MLA_TIMELINE defined, draws that. In
/// every other build the calls are empty and leave no instruction. See docs/timeline.md.
#pragma once

#include <cstdint>

#include "stages/common/machine/device.h"
#include "stages/common/machine/machine.h"

#ifdef MLA_TIMELINE
#include <vector>
#ifdef __CUDACC__
#include "stages/common/machine/cuda_status.h"
#include "stages/common/ptx/ptx.h"
#else
#include <atomic>
#endif
#endif

namespace mla::timeline {

/// Who acts. Each has a lane of its own in the picture.
enum class Track { kWarpgroup0, kWarpgroup1, kTma };
inline constexpr int kTracks = 3;

/// What a track does, from enter() on until the next.
enum class Phase {
  kIdle,
  kWaitCopy,   ///< For tiles that TMA brings.
  kQk,         ///< S = Q K^T, from the first wgmma to the end of the wait for the last.
  kSoftmax,    ///< Maximum, exponentials, sum; P on its way.
  kPv,         ///< O += P V, from the first wgmma to the end of the wait for the last.
  kWaitOther,  ///< For the other warpgroup.
  kRescale,    ///< O times exp(old maximum - new).
  kWriteOut,
  kIssueCopy,
  kWaitSlot,  ///< For a buffer that nobody reads any more.
};
inline constexpr int kPhases = 10;

/// What one track of one block left in device memory, which was all zeros before.
struct Record {
  static constexpr int kCapacity = 4096;  ///< Events; those after the last that fits are lost.
  uint64_t begin_ns, begin_clock;         ///< %globaltimer and clock64 at the same moment,
  uint64_t end_ns, end_clock;             ///< and at the end.
  uint64_t multiprocessor;
  uint64_t count;              ///< Events, lost ones included. By end().
  uint64_t events[kCapacity];  ///< clock << 8 | product in flight << 7 | phase
};

/// Where the kernels of one source file record: `records` holds kTracks for each of the first
/// `blocks` blocks of a grid. Null: nowhere.
struct Recording {
  Record* records;
  unsigned blocks;
};

#ifdef MLA_TIMELINE
/// Sets the Recording of every source file of one machine's kernels.
using Attach = Status (*)(const Recording&);
inline std::vector<Attach>& attachments(MachineKind machine) {
  static std::vector<Attach> of_gpu, of_model;
  return machine == MachineKind::kGpu ? of_gpu : of_model;
}
#endif

}  // namespace mla::timeline

namespace mla::MLA_MACHINE::timeline {

using mla::timeline::Phase;
using mla::timeline::Track;

#ifndef MLA_TIMELINE

/// What a launch asks for on top of sizeof(Smem).
inline constexpr size_t kSharedBytes = 0;
/// Once a track, before its first enter(). As enter(), called by every thread of a warpgroup, or by
/// the one thread that issues copies.
__device__ __forceinline__ void begin(Track /*track*/) {}
/// From here on `track` is in `phase`. `in_flight`: a product that it issued, and will wait for later,
/// is under way meanwhile.
__device__ __forceinline__ void enter(Track /*track*/, Phase /*phase*/,
                                      bool /*in_flight*/ = false) {}
/// Once a track, after which it does nothing.
__device__ __forceinline__ void end(Track /*track*/) {}

#elif defined(__CUDACC__)

// Where a track's count of events lives: the last bytes of dynamic shared memory, since a register for
// it could make the kernel spill, and one in global memory would make every event wait longer.
inline constexpr size_t kSharedBytes = 16;

static __constant__ mla::timeline::Recording recording;  // one for each source file

static Status attach(const mla::timeline::Recording& value) {
  return cuda_status(cudaMemcpyToSymbol(recording, &value, sizeof(value)), "timeline");
}
[[maybe_unused]] static const bool attachable =
    (mla::timeline::attachments(MachineKind::kGpu).push_back(attach), true);

__device__ __forceinline__ bool records(Track track) {
  return blockIdx.x < recording.blocks && (track == Track::kTma || threadIdx.x % 128 == 0);
}
__device__ __forceinline__ mla::timeline::Record* record_of(Track track) {
  return recording.records + blockIdx.x * mla::timeline::kTracks + static_cast<int>(track);
}
__device__ __forceinline__ unsigned counter_address(Track track) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  unsigned bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return ptx::shared_address(dynamic_shared_memory) + bytes - static_cast<unsigned>(kSharedBytes) +
         4 * static_cast<unsigned>(track);
}
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
  return value;
}

__device__ __forceinline__ void begin(Track track) {
  if (!records(track)) return;
  mla::timeline::Record* record = record_of(track);
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(counter_address(track)), "r"(0) : "memory");
  unsigned multiprocessor;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  record->multiprocessor = multiprocessor;
  record->begin_ns = nanoseconds();
  record->begin_clock = static_cast<uint64_t>(clock64());
}

// One piece of assembly with predicates and no branch, so that it may be between a wgmma and the wait
// for it. The clock is read first: what recording costs counts towards the new phase.
__device__ __forceinline__ void enter(Track track, Phase phase, bool in_flight = false) {
  asm volatile(
      "{\n"
      ".reg .pred mine, fits;\n"
      ".reg .u32 n;\n"
      ".reg .u64 now, place;\n"
      "mov.u64 now, %%clock64;\n"
      "setp.ne.u32 mine, %0, 0;\n"
      "mov.u32 n, 0;\n"
      "@mine ld.shared.u32 n, [%1];\n"
      "setp.lt.and.u32 fits, n, %4, mine;\n"
      "shl.b64 now, now, 8;\n"
      "or.b64 now, now, %3;\n"
      "mad.wide.u32 place, n, 8, %2;\n"
      "@fits st.global.u64 [place], now;\n"
      "add.u32 n, n, 1;\n"
      "@mine st.shared.u32 [%1], n;\n"
      "}"
      :
      : "r"(static_cast<unsigned>(records(track))), "r"(counter_address(track)),
        "l"(__cvta_generic_to_global(record_of(track)->events)),
        "l"(static_cast<uint64_t>(phase) | uint64_t{in_flight} << 7),
        "n"(mla::timeline::Record::kCapacity)
      : "memory");
}

__device__ __forceinline__ void end(Track track) {
  enter(track, Phase::kIdle);
  if (!records(track)) return;
  mla::timeline::Record* record = record_of(track);
  unsigned count;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(count) : "r"(counter_address(track)) : "memory");
  record->count = count;
  record->end_ns = nanoseconds();
  record->end_clock = static_cast<uint64_t>(clock64());
}

#else

// The model has no clock: time is the number of events so far, of all blocks. It tells the order and
// nothing else.
inline constexpr size_t kSharedBytes = 0;

static mla::timeline::Recording recording;
inline std::atomic<uint64_t> events_so_far{0};

static Status attach(const mla::timeline::Recording& value) {
  recording = value;
  return {};
}
[[maybe_unused]] static const bool attachable =
    (mla::timeline::attachments(MachineKind::kModel).push_back(attach), true);

inline mla::timeline::Record* record_of(Track track) {
  if (blockIdx.x >= recording.blocks) return nullptr;
  if (track != Track::kTma && threadIdx.x % 128 != 0) return nullptr;
  return recording.records + blockIdx.x * mla::timeline::kTracks + static_cast<int>(track);
}
inline void begin(Track track) {
  mla::timeline::Record* record = record_of(track);
  if (record == nullptr) return;
  record->count = 0;
  record->begin_clock = events_so_far++;
  record->begin_ns = 1000 * record->begin_clock;
}
inline void enter(Track track, Phase phase, bool in_flight = false) {
  mla::timeline::Record* record = record_of(track);
  if (record == nullptr) return;
  const uint64_t now = events_so_far++;
  if (record->count < mla::timeline::Record::kCapacity) {
    record->events[record->count] =
        now << 8 | uint64_t{in_flight} << 7 | static_cast<uint64_t>(phase);
  }
  ++record->count;
}
inline void end(Track track) {
  enter(track, Phase::kIdle);
  mla::timeline::Record* record = record_of(track);
  if (record == nullptr) return;
  record->end_clock = events_so_far++;
  record->end_ns = 1000 * record->end_clock;
}

#endif

}  // namespace mla::MLA_MACHINE::timeline
