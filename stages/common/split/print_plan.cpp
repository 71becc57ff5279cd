#include <algorithm>
#include <climits>
#include <cstdio>

#include "stages/common/split/plan.h"

namespace mla {

std::vector<std::vector<Piece>> pieces_of(const HostPlan& plan) {
  const int piece_grains =
      plan.header.fixed_split_tokens > 0 ? plan.header.fixed_split_tokens / kGrainTokens : INT_MAX;
  const auto grains_in = [&](int sequence) {
    const int64_t length = plan.seqlens_k[static_cast<size_t>(sequence)];
    return static_cast<int>(std::max<int64_t>(1, grains_for(length)));
  };
  std::vector<std::vector<Piece>> workers(static_cast<size_t>(plan.header.workers));
  for (size_t w = 0; w < workers.size(); ++w) {
    WorkerBegin at = plan.worker_begin[w];
    const WorkerBegin end = plan.worker_begin[w + 1];
    while (at.sequence < end.sequence || (at.sequence == end.sequence && at.grain < end.grain)) {
      const auto sequence = static_cast<size_t>(at.sequence);
      const int grains = grains_in(at.sequence);
      const int limit = at.sequence == end.sequence ? end.grain : grains;
      const int until = at.grain + std::min(limit - at.grain, piece_grains);
      const bool split = plan.slot_begin[sequence + 1] > plan.slot_begin[sequence];
      workers[w].push_back(
          {at.sequence, at.grain, until, split ? plan.slot_begin[sequence] + at.split : -1});
      at = until < grains ? WorkerBegin{at.sequence, until, at.split + 1, 0}
                          : WorkerBegin{at.sequence + 1, 0, 0, 0};
    }
  }
  return workers;
}

std::string describe_plan(const HostPlan& plan, int max_lines) {
  max_lines = std::max(1, max_lines);
  constexpr int kBar = 24, kPieces = 4;
  const auto workers = pieces_of(plan);
  std::vector<int64_t> loads;
  int64_t largest = 1, sum = 0;
  for (const auto& pieces : workers) {
    int64_t load = 0;
    for (const Piece& piece : pieces) {
      load += piece.grain_end - piece.grain_begin + plan.header.fixed_grains;
    }
    loads.push_back(load);
    largest = std::max(largest, load);
    sum += load;
  }
  std::string text;
  char line[160];
  const int count = static_cast<int>(workers.size());
  for (int w = 0; w < count; ++w) {
    if (count > max_lines && w == max_lines / 2) {
      const int skipped = count - max_lines;
      std::snprintf(line, sizeof line, "  ...     %d more workers\n", skipped);
      text += line;
      w += skipped;
    }
    const auto& pieces = workers[static_cast<size_t>(w)];
    const int64_t load = loads[static_cast<size_t>(w)];
    const auto bar = static_cast<size_t>((load * kBar + largest - 1) / largest);
    std::snprintf(line, sizeof line, "worker %3d %6lld %s%s", w, static_cast<long long>(load),
                  std::string(bar, '#').c_str(), std::string(kBar - bar, '.').c_str());
    text += line;
    for (size_t i = 0; i < pieces.size(); ++i) {
      if (i == kPieces && pieces.size() > kPieces + 1) {
        text += ", and " + std::to_string(pieces.size() - i) + " more";
        break;
      }
      const Piece& piece = pieces[i];
      const int64_t length = plan.seqlens_k[static_cast<size_t>(piece.sequence)];
      const int64_t end = std::min<int64_t>(length, int64_t{piece.grain_end} * kGrainTokens);
      text += (i == 0 ? "  " : ", ") + std::to_string(piece.sequence) + ":" +
              std::to_string(int64_t{piece.grain_begin} * kGrainTokens) + "-" + std::to_string(end);
      if (piece.slot >= 0) text += " (slot " + std::to_string(piece.slot) + ")";
    }
    text += "\n";
  }
  const double mean = static_cast<double>(sum) / std::max(1, count);
  std::snprintf(line, sizeof line,
                "load in grains of 64 tokens, %d for beginning a piece: mean %.1f, largest %lld "
                "(%.0f%% of the mean)\n",
                plan.header.fixed_grains, mean, static_cast<long long>(largest),
                100 * static_cast<double>(largest) / std::max(mean, 1e-9));
  text += line;
  std::snprintf(line, sizeof line, "%d of %d sequences split, into %d pieces\n",
                plan.header.num_split_sequences, plan.header.batch, plan.header.num_slots);
  return text + line;
}

}  // namespace mla
