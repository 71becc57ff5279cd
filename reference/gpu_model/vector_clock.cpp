#include "reference/gpu_model/vector_clock.h"

#include <algorithm>

namespace gpu_model::detail {
namespace {

void raise_all(std::vector<Time>& times, const std::vector<Time>& by) {
  if (times.size() < by.size()) times.resize(by.size());
  Time* to = times.data();
  const Time* from = by.data();
  for (size_t i = 0; i < by.size(); ++i) to[i] = to[i] > from[i] ? to[i] : from[i];
}

}  // namespace

void VectorClock::raise(std::vector<Time>& times, Slot slot, Time time) {
  if (times.size() <= slot) times.resize(slot + 1);
  times[slot] = std::max(times[slot], time);
}

const VectorClock* VectorClock::of(uint32_t other_block) const {
  if (other_block == block) return this;
  for (const auto& other : others) {
    if (other->block == other_block) return other.get();
  }
  return nullptr;
}

void VectorClock::join(const VectorClock& other) {
  known_below = std::max(known_below, other.known_below);
  const auto add = [this](const VectorClock& from) {
    if (from.block == block) {
      raise_all(seen, from.seen);
      raise_all(published, from.published);
      return;
    }
    for (auto& mine : others) {
      if (mine->block != from.block) continue;
      const auto joined = std::make_shared<VectorClock>(*mine);
      raise_all(joined->seen, from.seen);
      raise_all(joined->published, from.published);
      mine = joined;
      return;
    }
    const auto copy = std::make_shared<VectorClock>();
    copy->block = from.block;
    copy->seen = from.seen;
    copy->published = from.published;
    others.push_back(copy);
  };
  add(other);
  for (const auto& third : other.others) add(*third);
}

}  // namespace gpu_model::detail
