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

/// The piece that a worker is at; the same in every thread. Kernels are short of registers, so what
/// the plan says is read again at every step.
class PieceCursor {
 public:
  int sequence;
  int seqlen_k = 0;  ///< Of the sequence.

  __device__ __forceinline__ PieceCursor(const Problem& problem, const Tensors& tensors,
                                         const SplitWorkspace& split, unsigned worker)
      : problem_(problem), tensors_(tensors), split_(split), worker_(worker) {
    const int4 begin = worker_begin(worker);
    sequence = begin.x;
    page_ = begin.y;
    find_end([&] { return begin.w; });
  }

  __device__ __forceinline__ bool more() const { return page_ < page_end_; }

  __device__ __forceinline__ void next() {
    if (page_end_ < pages()) {
      page_ = page_end_;
    } else {
      ++sequence;
      page_ = 0;
    }
    find_end([&] { return tensors_.seqlens_k[sequence]; });
  }

  __device__ __forceinline__ int token_begin() const { return page_ * kPageSize; }
  /// Past the last; token_begin() or less for an empty sequence.
  __device__ __forceinline__ int token_end() const { return min(seqlen_k, page_end_ * kPageSize); }

  /// Where partial results go; -1 if the piece is the whole sequence and its results are final.
  __device__ __forceinline__ int slot() const {
    if (page_ == 0 && page_end_ == pages()) return -1;
    const int4 begin = worker_begin(worker_);
    int index = sequence == begin.x ? begin.z : 0;  // pieces of the sequence before this one
    if (problem_.fixed_split_tokens > 0) index = token_begin() / problem_.fixed_split_tokens;
    return split_.slot_begin[sequence] + index;
  }

 private:
  __device__ __forceinline__ int4 worker_begin(unsigned worker) const {
    return reinterpret_cast<const int4*>(split_.worker_begin)[worker];
  }
  __device__ __forceinline__ int pages() const {
    return max(1, static_cast<int>(pages_for(seqlen_k)));
  }
  // Of the piece that begins at page_; page_ if the worker is done.
  template <typename Length>
  __device__ __forceinline__ void find_end(const Length& length) {
    const int4 end = worker_begin(worker_ + 1);
    page_end_ = page_;
    if (sequence > end.x || (sequence == end.x && page_ >= end.y)) return;
    seqlen_k = length();
    page_end_ = sequence == end.x ? min(pages(), end.y) : pages();
    if (problem_.fixed_split_tokens > 0) {
      page_end_ = min(page_end_, page_ + problem_.fixed_split_tokens / kPageSize);
    }
  }

  const Problem& problem_;
  const Tensors& tensors_;
  const SplitWorkspace& split_;
  const unsigned worker_;
  int page_, page_end_;
};

}  // namespace mla::MLA_MACHINE
