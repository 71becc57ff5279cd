/// @file
/// How a kernel walks its worker's pieces of a plan (plan.h):
///
///     for (PieceCursor at(problem, tensors, split, worker); at.more(); at.next()) {
///       ... tokens at.token_begin() to at.token_end() of sequence at.sequence ...
///     }
#pragma once

#include "stages/common/machine/device.h"
#include "stages/common/split/workspace.h"

namespace mla::MLA_MACHINE {

/// Whether the plan is one for this problem: its memory may hold anything.
__device__ __forceinline__ bool is_planned(const SplitWorkspace& split) {
  const int4 state = *reinterpret_cast<const int4*>(split.header);
  return static_cast<uint32_t>(state.x) == kPlanMade &&
         static_cast<uint32_t>(state.y) == split.shape;
}

/// What a piece is of a sequence that has exactly two, and no other has more: its first half is the last piece of a worker, its
/// second half the first piece of the next one.
enum class Half { kNone, kFirst, kSecond };

/// The piece that a worker is at; the same in every thread. Kernels are short of registers, so what
/// the plan says is read again at every step.
class PieceCursor {
 public:
  int sequence;
  int seqlen_k = 0;  ///< Of the sequence, clamped.

  __device__ __forceinline__ PieceCursor(const Problem& problem, const Tensors& tensors,
                                         const SplitWorkspace& split, unsigned worker)
      : problem_(problem), tensors_(tensors), split_(split), worker_(worker) {
    const bool planned = is_planned(split);  // first, so that all three loads are under way at once
    const int4 begin = worker_begin(worker);
    sequence = begin.x;
    grain_ = begin.y;
    find_end([&] { return begin.w; });
    if (!planned) {  // whatever is there instead, nothing is done
      grain_end_ = grain_;
      // By all threads: a branch for one makes the compiler expect warps to diverge, in the loops, too.
      atomicExch(&split.header->state.refused, 1u);
    }
  }

  __device__ __forceinline__ bool more() const { return grain_ < grain_end_; }

  __device__ __forceinline__ void next() {
    if (grain_end_ < grains()) {
      grain_ = grain_end_;
    } else {
      ++sequence;
      grain_ = 0;
    }
    find_end([&] { return clamped_length(problem_, tensors_.seqlens_k[sequence]); });
  }

  __device__ __forceinline__ int token_begin() const { return grain_ * kGrainTokens; }
  /// Past the last; token_begin() or less for an empty sequence.
  __device__ __forceinline__ int token_end() const {
    return min(seqlen_k, grain_end_ * kGrainTokens);
  }

  /// Where partial results go; -1 if the piece is the whole sequence and its results are final.
  __device__ __forceinline__ int slot() const {
    if (grain_ == 0 && grain_end_ == grains()) return -1;
    const int4 begin = worker_begin(worker_);
    int index = sequence == begin.x ? begin.z : 0;  // pieces of the sequence before this one
    if (problem_.fixed_split_tokens > 0) index = token_begin() / problem_.fixed_split_tokens;
    return split_.slot_begin[sequence] + index;
  }

  /// By the plan's numbers alone, whatever the lengths are now: a worker that waits for a second half must
  /// know that it comes. Not with fixed_split_tokens.
  __device__ __forceinline__ Half half() const {
    const int4 begin = worker_begin(worker_), end = worker_begin(worker_ + 1);
    const bool is_first = grain_ == 0 && sequence == end.x && end.y > 0;
    const bool is_second = grain_ > 0 && sequence == begin.x;
    const int32_t* slots = split_.slot_begin + sequence;
    if (!(is_first || is_second) || slots[1] - slots[0] != 2) return Half::kNone;
    if (!split_.header->cuts_in_halves()) return Half::kNone;
    return is_first ? Half::kFirst : Half::kSecond;
  }
  /// Where the partial results of the sequence's second half go.
  __device__ __forceinline__ int second_half_slot() const {
    return split_.slot_begin[sequence] + 1;
  }

 private:
  __device__ __forceinline__ int4 worker_begin(unsigned worker) const {
    return reinterpret_cast<const int4*>(split_.worker_begin)[worker];
  }
  __device__ __forceinline__ int grains() const {
    return max(1, static_cast<int>(grains_for(seqlen_k)));
  }
  // Of the piece that begins at grain_; grain_ if the worker is done.
  template <typename Length>
  __device__ __forceinline__ void find_end(const Length& length) {
    const int4 end = worker_begin(worker_ + 1);
    grain_end_ = grain_;
    if (sequence > end.x || (sequence == end.x && grain_ >= end.y)) return;
    seqlen_k = length();
    grain_end_ = sequence == end.x ? min(grains(), end.y) : grains();
    if (problem_.fixed_split_tokens > 0) {
      grain_end_ = min(grain_end_, grain_ + problem_.fixed_split_tokens / kGrainTokens);
    }
  }

  const Problem& problem_;
  const Tensors& tensors_;
  const SplitWorkspace& split_;
  const unsigned worker_;
  int grain_, grain_end_;
};

}  // namespace mla::MLA_MACHINE
