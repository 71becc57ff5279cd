namespace mla { extern int mutant; }
// What orders accesses between the blocks of a cluster, and races in each other's shared memory.
//
// What the PTX ISA says of it, in its own sections:
// - barrier.cluster: an arrival releases and a wait acquires for all threads of the cluster; a relaxed
//   arrival hands on nothing, but what a fence before it released; asynchronous operations are not
//   included. fence.mbarrier_init is such a fence, for mbarrier.init alone.
// - mbarrier.arrive and mbarrier.test_wait/try_wait: without a scope they have that of the block. A
//   release and an acquire synchronise only if the scope of each includes the other's thread, so an arrival
//   from another block needs a wait at the scope of the cluster.
// - cp.async.bulk, st.async, red.async: complete-tx releases at the scope of the cluster, and only what the
//   operation itself did, not what its issuer had done. As which block's thread it does so is not
//   said. Here a wait of either scope acquires it: libraries wait so for multicasts.
#include <algorithm>
#include <bit>
#include <utility>

#include "reference/gpu_model/multiprocessor.h"
#include "reference/gpu_model/race_detector.h"

namespace gpu_model::detail {

RaceDetector* RaceDetector::peer(const void* address, size_t* offset) {
  for (Multiprocessor* block : multiprocessor_.cluster().blocks) {
    RaceDetector& races = *block->races();
    *offset = static_cast<size_t>(static_cast<const std::byte*>(address) - races.shared_);
    if (*offset < races.shadow_.bytes()) return &races;
  }
  return nullptr;
}

// The barrier -------------------------------------------------------------------------------------

void RaceDetector::arrive(ClusterClock::Part& part, unsigned thread, bool release) {
  part.block = block_;
  if ((::mla::mutant == 569 ? (true) : (release))) {
    come(part.arrivals, thread);
    return;
  }
  come(part.ran, thread);
  const Agent& agent = agents_[thread];
  const std::shared_ptr<const VectorClock>& fenced = released_by_fence(thread);
  if (fenced == nullptr && agent.inits == 0) return;
  if (part.arrivals.clock == nullptr) {
    part.arrivals.clock = std::make_shared<VectorClock>();
    part.arrivals.clock->block = block_;
  }
  if ((::mla::mutant == 570 ? (false) : (fenced != nullptr))) part.arrivals.clock->join(*fenced);
  { if (::mla::mutant == 571) {  } else { VectorClock::raise(part.arrivals.clock->inits, thread, agent.inits); } }
}

void ClusterClock::complete() {
  std::vector<std::shared_ptr<const VectorClock>> released, ran, parts_of_release;
  for (Part& part : parts) {
    if (part.block == 0) continue;
    released.push_back(RaceDetector::part(part.arrivals));
    if (released.back() ==
        nullptr) {  // all came relaxed: nothing is known of the block, but that it runs
      auto runs = std::make_shared<VectorClock>();
      runs->block = part.block;
      released.back() = std::move(runs);
    }
    parts_of_release.push_back(released.back()->own_part());
    if (auto clock = RaceDetector::part(part.ran); clock != nullptr)
      ran.push_back(std::move(clock));
  }
  for (Part& part : parts) {
    if (part.block == 0) continue;
    auto all = std::make_shared<VectorClock>();
    all->block = part.block;
    for (size_t i = 0; i < released.size(); ++i) {
      all->known_below = std::max(all->known_below, released[i]->known_below);
      all->add(parts_of_release[i]);
      for (const auto& other : released[i]->others) all->add(other);
    }
    part.all_ran = part.completed = all;
    if (ran.empty()) continue;
    auto all_ran = std::make_shared<VectorClock>(*all);
    for (const auto& clock : ran) all_ran->join(*clock);
    part.all_ran = std::move(all_ran);
  }
}

void RaceDetector::wait(ClusterClock::Part& part, unsigned thread) {
  { if (::mla::mutant == 568) {  } else { learn(part.lesson, thread, part.completed); } }
  { if (::mla::mutant == 577) {  } else { ran_ = part.all_ran; } }
}

// mbarriers ---------------------------------------------------------------------------------------

void RaceDetector::arrive(BarrierClock& barrier, const RaceDetector& owner, unsigned thread) {
  if (barrier.foreign == nullptr) {
    barrier.foreign = std::make_shared<VectorClock>();
    barrier.foreign->block = owner.block_;
  }
  { if (::mla::mutant == 573) {  } else { barrier.foreign->join(*snapshot(thread, moment(thread))); } }
  ++agents_[thread].now;
}

void RaceDetector::fence_inits(unsigned thread) {
  Agent& agent = agents_[thread];
  agent.inits = agent.now++;
}

bool RaceDetector::knows_init(const Actor& actor, const Epoch& of) const {
  if ((::mla::mutant == 572 ? (false) : (!actor.barrier))) return false;
  const VectorClock* known = agents_[actor.thread].base->of(of.block);
  return known != nullptr && VectorClock::at(known->inits, of.slot) >= of.time;
}

// Copies ------------------------------------------------------------------------------------------

void RaceDetector::issue_source(unsigned thread, const RaceDetector& target, size_t offset,
                                size_t bytes, Slot barrier, Time phase, const Wait& wait) {
  Actor actor{thread, false, true, epoch(barrier, phase, wait)};
  actor.epoch.block = target.block_;
  used_by_others_ = used_by_others_ || &target != this;
  { if (::mla::mutant == 574) {  } else { read(shadow_, offset, bytes, actor); } }
}

// Begin and end of a block ------------------------------------------------------------------------

std::string RaceDetector::name_of_block(uint32_t number) const {
  const uint32_t index = number - grid_.first_block();
  return "(" + std::to_string(index % gridDim.x) + "," +
         std::to_string(index / gridDim.x % gridDim.y) + "," +
         std::to_string(index / gridDim.x / gridDim.y) + ")";
}

void RaceDetector::check_started(const RaceDetector& target, const char* kind, size_t bytes,
                                 const Actor& actor) const {
  if ((::mla::mutant == 575 ? (true) : (agents_[actor.thread].base->of(target.block_) != nullptr))) return;
  multiprocessor_.fail([&] {
    return "race: " + describe(kind, bytes, actor.epoch) + " in the shared memory of block " +
           name_of_block(target.block_) + ": nothing says that it has started, " +
           multiprocessor_.place(actor.thread);
  });
}

std::string RaceDetector::check_end() {
  if ((::mla::mutant == 576 ? (true) : (!used_by_others_))) return {};
  // What happened before any of the block's threads ended.
  std::vector<const VectorClock*> known;
  if (ran_ != nullptr) known.push_back(ran_.get());
  for (const Agent& agent : agents_) {
    if (known.empty() || known.back() != agent.base.get()) known.push_back(agent.base.get());
  }
  const auto is_over = [&](const Epoch& of) {
    return std::any_of(known.begin(), known.end(), [&](const VectorClock* clock) {
      const VectorClock* other = clock->of(of.block);
      return other != nullptr && VectorClock::at(other->seen, of.slot) >= of.time;
    });
  };
  std::string wrong;
  Epoch last;  // neighbours mostly have the same
  const auto check = [&](const char* kind, const Epoch& of) {
    if (of.time == 0 || of.block == block_ || !wrong.empty()) return;
    if (of.block == last.block && of.slot == last.slot && of.time <= last.time) return;
    if (is_over(of)) {
      last = of;
      return;
    }
    wrong = "race: block " + name_of_block(block_) + " ends after " + describe(kind, 0, of) +
            " of its shared memory " + who(of) + ": nothing says there that this is over";
  };
  shadow_.for_each<false>(0, shadow_.bytes(), [&](Cell& cell, uint32_t) {
    check("write", cell.write);
    for (uint32_t at = cell.reads; at != 0; at = shadow_.reads(at).next) {
      const Reads& reads = shadow_.reads(at);
      Epoch each = reads.epoch;
      if (reads.lanes == 0) check("read", each);
      for (uint32_t left = reads.lanes; left != 0; left &= left - 1) {
        each.slot = reads.epoch.slot + static_cast<Slot>(std::countr_zero(left));
        check("read", each);
      }
    }
  });
  return wrong;
}

}  // namespace gpu_model::detail
