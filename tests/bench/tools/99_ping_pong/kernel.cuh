// For the tests of the timeline: two warpgroups take turns, and the first thread of a third plays TMA. It computes nothing.
#pragma once

#include "stages/common/ptx/ptx.h"
#include "stages/common/timeline.h"

namespace mla::MLA_MACHINE::ping_pong {

constexpr int kThreads = 288;
constexpr int kTiles = 3;

struct Smem {
  int turns[2];
};

__global__ void __launch_bounds__(kThreads) decode(float* out) {
  using timeline::Phase;
  using timeline::Track;
  Smem& smem = shared_memory<Smem>();
  const unsigned warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    if (threadIdx.x % 128 != 0) return;
    timeline::begin(Track::kTma);
    timeline::enter(Track::kTma, Phase::kIssueCopy);
    timeline::end(Track::kTma);
    return;
  }
  const Track track = warpgroup == 0 ? Track::kWarpgroup0 : Track::kWarpgroup1;
  timeline::begin(track);
  for (int tile = 0; tile < kTiles; ++tile) {
    for (unsigned turn = 0; turn < 2; ++turn) {
      if (turn == warpgroup) {
        timeline::enter(track, Phase::kQk);
        if (threadIdx.x % 128 == 0) smem.turns[warpgroup] = tile;
      }
      timeline::enter(track, turn == warpgroup ? Phase::kSoftmax : Phase::kWaitOther);
      ptx::barrier_sync(1, 256);  // the turn is over
    }
  }
  if (threadIdx.x % 128 == 0) out[2 * blockIdx.x + warpgroup] = float(smem.turns[warpgroup]);
  timeline::end(track);
}

}  // namespace mla::MLA_MACHINE::ping_pong
