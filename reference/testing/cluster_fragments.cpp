#include "reference/testing/cluster_fragments.h"

#include <cstddef>
#include <utility>

#include "stages/common/machine/machine.h"

namespace mla {
namespace {

/// One part of what both blocks saw, as an observation: row r is block r's.
template <size_t kWords, typename Documented>
Observation observation(const char* name, const ClusterOutput (&out)[2],
                        uint32_t (ClusterOutput::*part)[kWords], Documented documented) {
  Observation o{name, Kept::kWords, "block", "word", kWords, {}, {}, {}, {}};
  for (uint32_t rank = 0; rank < 2; ++rank) {
    for (uint32_t i = 0; i < kWords; ++i) {
      o.words.push_back((out[rank].*part)[i]);
      o.documented.push_back(documented(rank, i));
    }
  }
  return o;
}

}  // namespace

Status record_cluster_fragments(Machine& machine, std::vector<Observation>* result) {
  const ClusterFragments run = MLA_ON_MACHINE(machine, cluster_fragments)();
  uint16_t tensor[8 * 64];
  for (uint16_t i = 0; i < 8 * 64; ++i) tensor[i] = i;
  DeviceBuffer in, out;
  MLA_RETURN_IF_ERROR(in.allocate(machine, sizeof tensor));
  MLA_RETURN_IF_ERROR(machine.copy_to_device(in.data(), tensor, sizeof tensor));
  ClusterOutput seen[2];
  MLA_RETURN_IF_ERROR(out.allocate(machine, sizeof seen));
  MLA_RETURN_IF_ERROR(run(in.data(), out.as<ClusterOutput>()));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  MLA_RETURN_IF_ERROR(machine.copy_to_host(seen, out.data(), sizeof seen));

  result->push_back(observation("cluster_rank", seen, &ClusterOutput::rank,
                                [](uint32_t rank, uint32_t i) { return i == 0 ? rank : 2; }));
  result->push_back(observation("cluster_mapa_load", seen, &ClusterOutput::read,
                                [](uint32_t rank, uint32_t i) { return 1000 * (1 - rank) + i; }));
  result->push_back(observation("cluster_mapa_store_and_arrival", seen, &ClusterOutput::stored,
                                [](uint32_t rank, uint32_t i) { return 2000 * (2 - rank) + i; }));
  result->push_back(observation(
      "cluster_st_async", seen, &ClusterOutput::sent,
      [](uint32_t rank, uint32_t i) { return i == 3 ? 12 - rank : 3000 + 1000 * i + 1 - rank; }));
  result->push_back(observation("cluster_bulk", seen, &ClusterOutput::copied,
                                [](uint32_t rank, uint32_t i) { return 6000 * (1 - rank) + i; }));
  result->push_back(
      observation("cluster_multicast", seen, &ClusterOutput::box, [](uint32_t, uint32_t word) {
        const uint32_t row = word / 32, chunk = (word / 4 % 8) ^ row % 8;
        const uint32_t element = row * 64 + chunk * 8 + word % 4 * 2;
        return (element + 1) << 16 | element;
      }));
  return {};
}

}  // namespace mla
