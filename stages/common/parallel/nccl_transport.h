/// @file
/// Ranks that are processes with a GPU each, connected by NCCL.
#pragma once

#include <memory>

#include "stages/common/parallel/nccl_api.h"
#include "stages/common/parallel/rendezvous.h"
#include "stages/common/parallel/transport.h"

namespace mla {

/// A rank's end of a group over NCCL, of the current CUDA device. Calls only enqueue, on a stream of the
/// transport's own. Work that hangs because another rank has failed ends in wait(), which aborts the
/// communicator: synchronise by nothing else. While a CUDA graph is replayed nothing is announced, so a rank that
/// replays another shape is found by the time limit alone.
///
/// A program whose own call fails, such as a graph's launch, says so by fail(): the others wait for its replay. A launch
/// that finds the device's queue full waits until there is room. Where the group fails meanwhile, a thread of the
/// transport hears of it and aborts what is under way; for a rank that lives and does not come, nothing does. So a
/// program has few decodes under way before it waits.
///
/// Graphs that hold its calls should be destroyed before it. When it is destroyed it waits for its own last exchange, as
/// wait() does, and leaves none behind that would keep the device from freeing memory. Outside a graph a call costs the
/// host tens of microseconds, because NCCL takes it on a thread of its own: that is the price of one that can be given
/// up.
///
/// Every rank makes its own, together. The rendezvous is the transport's from then on: it announces every call,
/// and gives its time limit.
/// @return kUnavailable as make_nccl_api(); the rendezvous's failure; kRankFailed if the ranks' communicators
///         are not connected within the time limit
Status make_nccl_transport(std::unique_ptr<Rendezvous> rendezvous,
                           std::unique_ptr<Transport>* transport);

/// The same over what a test puts in NCCL's place.
Status make_nccl_transport(std::unique_ptr<Rendezvous> rendezvous, std::unique_ptr<NcclApi> api,
                           std::unique_ptr<Transport>* transport);

}  // namespace mla
