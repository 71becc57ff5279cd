namespace mla { extern int mutant; }
#include "reference/gpu_model/vector_clock.h"

#include <algorithm>
#include <array>
#include <utility>

namespace gpu_model::detail {
namespace {

void raise_all(std::vector<Time>& times, const std::vector<Time>& by) {
  if (times.size() < by.size()) times.resize(by.size());
  Time* to = times.data();
  const Time* from = by.data();
  for (size_t i = 0; i < by.size(); ++i) to[i] = to[i] > from[i] ? to[i] : from[i];
}

bool all_below(const std::vector<Time>& times, const std::vector<Time>& limits) {
  const size_t both = std::min(times.size(), limits.size());
  bool above = false;
  for (size_t i = 0; i < both; ++i) above |= times[i] > limits[i];
  for (size_t i = both; i < times.size(); ++i) above |= times[i] > 0;
  return !above;
}

auto position(const std::vector<std::shared_ptr<const VectorClock>>& clocks, uint32_t block) {
  return std::lower_bound(clocks.begin(), clocks.end(), block,
                          [](const auto& clock, uint32_t number) { return clock->block < number; });
}

/// Numbers parts. The detector runs on one OS thread at a time.
uint64_t next_part = 1;

/// Whether one part covers another, of pairs that were compared lately: threads of one block compare the
/// same parts of all others.
struct Compared {
  uint64_t a = 0, b = 0;
  bool covers = false;
};
std::array<Compared, 1 << 14> compared;

}  // namespace

void VectorClock::raise(std::vector<Time>& times, Slot slot, Time time) {
  if (times.size() <= slot) times.resize(slot + 1);
  times[slot] = std::max(times[slot], time);
}

const VectorClock* VectorClock::of(uint32_t other_block) const {
  if (other_block == block) return this;
  const auto found = position(others, other_block);
  return found != others.end() && (*found)->block == other_block ? found->get() : nullptr;
}

std::shared_ptr<const VectorClock> VectorClock::own_part() const {
  auto part = std::make_shared<VectorClock>();
  part->block = block;
  part->raise_to(*this);
  part->number = next_part++;
  return part;
}

void VectorClock::raise_to(const VectorClock& part) {
  release = std::max(release, part.release);
  raise_all(seen, part.seen);
  raise_all(published, part.published);
  raise_all(inits, part.inits);
}

bool VectorClock::covers(const VectorClock& part) const {
  if (release < part.release) return false;
  const auto compare = [&] {
    return all_below(part.seen, seen) && all_below(part.published, published) &&
           all_below(part.inits, inits);
  };
  if (number == 0 || part.number == 0) return compare();
  Compared& known = compared[(number * 31 + part.number) % compared.size()];
  if (known.a != number || known.b != part.number) known = {number, part.number, compare()};
  return known.covers;
}

template <typename Share>
void VectorClock::add(const VectorClock& part, Share share) {
  if (part.block == block) {
    raise_to(part);
    return;
  }
  if (part.block < known_below) return;
  const auto found = others.begin() + (position(others, part.block) - others.cbegin());
  if (found == others.end() || (*found)->block != part.block) {
    others.insert(found, share());
  } else if (found->get() == &part) {
    return;
  } else if (part.covers(**found)) {  // also if they are equal, so that next time they are the same
    *found = share();
  } else if (!(*found)->covers(part)) {
    const auto joined = std::make_shared<VectorClock>(**found);
    joined->raise_to(part);
    joined->number = next_part++;
    *found = joined;
  }
}

void VectorClock::add(const std::shared_ptr<const VectorClock>& part) {
  add(*part, [&] { return part; });
}

void VectorClock::join(const VectorClock& other) {
  known_below = std::max(known_below, other.known_below);
  add(other, [&] { return other.own_part(); });
  { if (::mla::mutant == 592) {  } else { for (const auto& third : other.others) add(third); } }
}

}  // namespace gpu_model::detail
