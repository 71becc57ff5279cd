// The plan of a split decode: the device's equals the host's to the bit, every grain of every sequence
// has a worker, loads are as even as promised, and misuse of a plan is named. On the model, and on a GPU
// where there is one.
#include "stages/common/split/workspace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <set>

#ifdef MLA_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/device_data.h"
#include "stages/common/stage.h"
#include "tests/machine_test.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

// Everything a plan is made from.
struct Input {
  std::string name;
  Problem problem;
  PlanShape shape;
  std::vector<int32_t> lengths;
};

constexpr int kMaxLength = 1000000;
constexpr int kDistributions = 7;

std::vector<int32_t> draw_lengths(int distribution, int batch, std::mt19937_64& random) {
  constexpr int32_t kEdges[] = {63, 64, 65};
  std::vector<int32_t> lengths(static_cast<size_t>(batch));
  std::lognormal_distribution<double> log_normal(7, 1.5);
  for (int32_t& length : lengths) {
    switch (distribution) {
      case 0:
        length = 0;
        break;
      case 1:
        length = 1;
        break;
      case 2:
        length = static_cast<int32_t>(random() % (kMaxLength + 1));
        break;
      case 3:
        length = static_cast<int32_t>(std::min(log_normal(random), double{kMaxLength}));
        break;
      case 4:
        length = kEdges[random() % 3];
        break;
      case 5:  // one giant among tiny
        length = static_cast<int32_t>(random() % 3);
        break;
      default:  // half of them empty, some exactly as long as whole pieces
        length = random() % 2 == 0 ? 0 : static_cast<int32_t>(random() % 10) * 1024;
    }
  }
  if (distribution == 5) lengths[random() % lengths.size()] = kMaxLength;
  return lengths;
}

Input make_input(int batch, int distribution, int workers, int fixed_grains, int fixed_split_tokens,
                 std::mt19937_64& random) {
  Input input;
  input.lengths = draw_lengths(distribution, batch, random);
  input.shape = {.row_tiles = 1, .workers = workers, .fixed_grains = fixed_grains};
  input.shape.combine_grains = batch % 3 == 0 ? 6 : 1;
  input.shape.team = batch % 4 == 1 ? 8 : 1;
  Problem& problem = input.problem;
  problem.batch = batch;
  problem.num_heads_q = 1;
  problem.num_pages = 1;
  problem.softmax_scale = 1;
  problem.fixed_split_tokens = fixed_split_tokens;
  const int32_t longest = *std::max_element(input.lengths.begin(), input.lengths.end());
  problem.max_pages_per_seq =
      static_cast<int>(std::max<int64_t>(1, grains_for(longest)) + static_cast<int>(random() % 2));
  input.name = "batch " + std::to_string(batch) + ", lengths " + std::to_string(distribution) +
               ", workers " + std::to_string(workers) + ", fixed grains " +
               std::to_string(fixed_grains) + ", fixed splits " +
               std::to_string(fixed_split_tokens);
  return input;
}

// Batches around the planning kernel's tiles of 2048 sequences, with every distribution; then `drawn`
// random ones.
std::vector<Input> inputs(int drawn) {
  constexpr int kBatches[] = {1, 2, 3, 31, 2047, 2048, 2049, 4096, 8192};
  constexpr int kSplits[] = {0, 64, 1024, 4096};
  std::mt19937_64 random(42);
  const auto draw_workers = [&] {
    const auto count = static_cast<int>(random() % 300) + 1;
    return count % 64 == 1 ? 65535 : count % 16 == 2 ? 2000 : count;
  };
  std::vector<Input> list;
  for (const int batch : kBatches) {
    for (int distribution = 0; distribution < kDistributions; ++distribution) {
      list.push_back(make_input(batch, distribution, draw_workers(), static_cast<int>(random() % 9),
                                list.size() % 2 == 0 ? 0 : kSplits[random() % 4], random));
    }
  }
  for (int i = 0; i < drawn; ++i) {
    const double batch = std::exp(std::uniform_real_distribution<double>(0, 8.517)(random));
    list.push_back(make_input(std::clamp(static_cast<int>(batch), 1, 5000),
                              static_cast<int>(random() % kDistributions), draw_workers(),
                              static_cast<int>(random() % 9),
                              random() % 2 == 0 ? 0 : kSplits[random() % 4], random));
  }
  for (const int batch : {1, 2049}) {  // as many workers as there may be, with much to do
    list.push_back(make_input(batch, 2, 65535, 2, 0, random));
  }
  for (const int batch : {1, 2, 3000}) {  // a line of more than 2^32 grains
    Input input = make_input(batch, 0, draw_workers(), 3, 0, random);
    input.problem.max_pages_per_seq = kMaxTokensPerSeq / kDefaultPageSize;
    for (int32_t& length : input.lengths) {
      length = (1 << 30) - static_cast<int32_t>(random() % 100000);
    }
    input.name += ", of 2^30 tokens";
    list.push_back(input);
  }
  for (const int batch : {2, 70, 2050}) {  // every sequence can have equally many workers
    for (const int each : {3, 4}) {
      for (const int short_ones : {0, 1}) {  // even with a short one, if a piece costs much
        Input input = make_input(batch, 0, batch * each, 2 + 38 * short_ones, 0, random);
        input.problem.max_pages_per_seq = 50;
        for (int32_t& length : input.lengths) length = 50 * kGrainTokens;
        if (short_ones == 1) input.lengths[1] = 2 * kGrainTokens;
        input.name += ", alike but for " + std::to_string(short_ones);
        list.push_back(input);
      }
    }
  }
  // Equally many workers would be as even here, but whole sequences are as good.
  list.push_back(make_input(66, 0, 132, 2, 0, random));
  list.back().problem.max_pages_per_seq = 10;
  list.back().lengths.assign(66, 10 * kGrainTokens);
  return list;
}

HostPlan plan_of(const Input& input) {
  return make_plan_on_host(input.problem, input.shape, input.lengths);
}

int grains_in(int32_t length) {
  return std::max(1, static_cast<int>(grains_for(length)));
}

using Pieces = std::vector<std::vector<Piece>>;

/// @name Properties of a plan
/// @{

// Every grain of every sequence occurs once, in order. An empty sequence is one piece.
void expect_covered(const Input& input, const Pieces& workers) {
  int sequence = 0, grain = 0;
  ASSERT_EQ(workers.size(), static_cast<size_t>(input.shape.workers));
  for (const auto& pieces : workers) {
    for (const Piece& piece : pieces) {
      ASSERT_LT(sequence, input.problem.batch);
      ASSERT_EQ(piece.sequence, sequence);
      ASSERT_EQ(piece.grain_begin, grain);
      ASSERT_GT(piece.grain_end, piece.grain_begin);
      const int grains = grains_in(input.lengths[static_cast<size_t>(sequence)]);
      ASSERT_LE(piece.grain_end, grains);
      grain = piece.grain_end;
      if (grain < grains) continue;
      ++sequence;
      grain = 0;
    }
  }
  ASSERT_EQ(sequence, input.problem.batch);
}

// No worker has a larger load than promised: grains, and the fixed cost of each piece where it counts.
void expect_even(const Input& input, const HostPlan& plan, const Pieces& workers) {
  const int fixed = plan.header.fixed_grains;
  int64_t sum = 0, largest = 0, least = INT64_MAX;
  for (const auto& pieces : workers) {
    int64_t load = 0;
    for (const Piece& piece : pieces) load += piece.grain_end - piece.grain_begin + fixed;
    sum += load;
    largest = std::max(largest, load);
    least = std::min(least, load);
  }
  const double mean = static_cast<double>(sum) / input.shape.workers;
  const bool whole = std::none_of(workers.begin(), workers.end(), [](const auto& pieces) {
    return std::any_of(pieces.begin(), pieces.end(), [](const Piece& p) { return p.slot >= 0; });
  });
  const int granule = input.problem.fixed_split_tokens > 0
                          ? input.problem.fixed_split_tokens / kGrainTokens
                      : whole ? input.shape.combine_grains
                              : 1;
  ASSERT_LE(static_cast<double>(largest), mean + granule + fixed + 1e-6);
  if (input.problem.fixed_split_tokens > 0) return;
  // A single sequence goes to all workers alike. If there are no more grains than workers, no worker has
  // two, unless they are a whole sequence.
  int64_t total_grains = 0;
  for (const int32_t length : input.lengths) total_grains += grains_in(length);
  if (input.problem.batch == 1 && total_grains >= input.shape.workers) {
    ASSERT_LE(largest - least, 1);
  }
  if (total_grains <= input.shape.workers) {
    ASSERT_LE(largest, (whole ? 1 + input.shape.combine_grains : 1) + fixed);
  }
}

// Pieces of split sequences, and no others, have slots: 0, 1, 2, ..., in order.
void expect_slots(const Input& input, const HostPlan& plan, const Pieces& workers) {
  int next_slot = 0;
  std::vector<int> pieces_seen(static_cast<size_t>(input.problem.batch));
  for (const auto& pieces : workers) {
    for (const Piece& piece : pieces) {
      const auto sequence = static_cast<size_t>(piece.sequence);
      ++pieces_seen[sequence];
      const bool whole =
          piece.grain_begin == 0 && piece.grain_end == grains_in(input.lengths[sequence]);
      if (whole) {
        ASSERT_EQ(piece.slot, -1);
      } else {
        ASSERT_EQ(piece.slot, next_slot);
        ++next_slot;
      }
    }
  }
  std::vector<SplitSequence> split_sequences;
  std::vector<int32_t> slot_begin{0};
  for (size_t i = 0; i < pieces_seen.size(); ++i) {
    const bool split = pieces_seen[i] > 1;
    if (split) {
      split_sequences.push_back({static_cast<int32_t>(i), slot_begin.back(), pieces_seen[i], 0});
    }
    slot_begin.push_back(slot_begin.back() + (split ? pieces_seen[i] : 0));
  }
  ASSERT_TRUE(plan.split_sequences == split_sequences);
  ASSERT_EQ(plan.slot_begin, slot_begin);
  ASSERT_EQ(plan.header.num_slots, next_slot);
  ASSERT_EQ(plan.header.num_split_sequences, static_cast<int>(split_sequences.size()));
  ASSERT_LE(next_slot, max_slots(input.problem, input.shape));
  ASSERT_LE(plan.header.num_split_sequences, max_split_sequences(input.problem, input.shape));
}

// With fixed splits, the cuts depend on the sequence's length alone.
void expect_fixed_cuts(const Input& input, const Pieces& workers) {
  const int piece_grains = input.problem.fixed_split_tokens / kGrainTokens;
  for (const auto& pieces : workers) {
    for (const Piece& piece : pieces) {
      ASSERT_EQ(piece.grain_begin % piece_grains, 0);
      ASSERT_EQ(piece.grain_end,
                std::min(piece.grain_begin + piece_grains,
                         grains_in(input.lengths[static_cast<size_t>(piece.sequence)])));
    }
  }
}

void expect_header(const Input& input, const HostPlan& plan) {
  ASSERT_EQ(plan.header.state.made, kPlanMade);
  ASSERT_EQ(plan.header.state.refused, 0u);
  ASSERT_EQ(plan.header.batch, input.problem.batch);
  ASSERT_EQ(plan.header.workers, input.shape.workers);
  ASSERT_EQ(plan.header.fixed_split_tokens, input.problem.fixed_split_tokens);
  ASSERT_TRUE(plan.header.fixed_grains == input.shape.fixed_grains ||
              plan.header.fixed_grains == 0);
  ASSERT_EQ(plan.seqlens_k, input.lengths);
}
/// @}

TEST(SplitPlan, EveryPlanKeepsItsPromises) {
  int split = 0, all_slots = 0, all_splits = 0;
  for (const Input& input : inputs(400)) {
    SCOPED_TRACE(input.name);
    const HostPlan plan = plan_of(input);
    const Pieces workers = pieces_of(plan);
    expect_header(input, plan);
    expect_covered(input, workers);
    expect_even(input, plan, workers);
    expect_slots(input, plan, workers);
    if (input.problem.fixed_split_tokens > 0) expect_fixed_cuts(input, workers);
    if (HasFatalFailure()) return;
    split += plan.header.num_split_sequences > 0;
    all_slots += plan.header.num_slots == max_slots(input.problem, input.shape);
    all_splits +=
        input.problem.fixed_split_tokens == 0 && input.problem.batch >= input.shape.workers &&
        input.shape.workers > 1 &&
        plan.header.num_split_sequences == max_split_sequences(input.problem, input.shape);
  }
  EXPECT_GT(split, 100);
  EXPECT_GT(all_slots, 5) << "max_slots is more than any plan needs";
  EXPECT_GT(all_splits, 5) << "max_split_sequences is more than any plan needs";
}

// Sequences of 64 grains, with room for more, on 66 workers.
Input equal_sequences(int batch) {
  Input input;
  input.shape = {.row_tiles = 2, .workers = 66, .fixed_grains = 2};
  input.problem.batch = batch;
  input.problem.max_pages_per_seq = 80;
  input.lengths.assign(static_cast<size_t>(batch), 4096);
  return input;
}

// If the table is so short that nothing is ever cut, no memory for parts is asked for.
TEST(SplitPlan, AShortTableNeedsNoSlots) {
  Input input;
  input.shape = {.row_tiles = 1, .workers = 4, .combine_grains = 4};
  input.problem.batch = 4;
  input.problem.max_pages_per_seq = 6;
  input.lengths = {6 * 64, 1, 0, 64};  // of a mean of 9 / 4
  EXPECT_EQ(max_slots(input.problem, input.shape), 0);
  EXPECT_EQ(max_split_sequences(input.problem, input.shape), 0);
  EXPECT_EQ(plan_of(input).header.num_slots, 0);
  input.problem.max_pages_per_seq = 7;
  input.lengths[0] = 7 * 64;
  EXPECT_GT(plan_of(input).header.num_slots, 0);
  EXPECT_GE(max_slots(input.problem, input.shape), plan_of(input).header.num_slots);
}

// A team's least load gives each of its blocks a grain. No worker has a second round of grains if all fit
// into one.
TEST(SplitPlan, TeamsGetARoundOfGrains) {
  Input input;
  input.shape = {.row_tiles = 1,
                 .workers = 15,
                 .fixed_grains = 8,
                 .min_grains = 8,
                 .combine_grains = 4,
                 .team = 8};
  input.problem.batch = 1;
  for (const int grains : {13, 16, 17, 79, 120}) {
    input.problem.max_pages_per_seq = grains;
    input.lengths = {grains * 64};
    const Pieces workers = pieces_of(plan_of(input));
    for (const auto& pieces : workers) {
      if (!pieces.empty()) {
        EXPECT_LE(pieces[0].grain_end - pieces[0].grain_begin, 8) << grains;
      }
    }
  }
}

TEST(SplitPlan, NothingIsCutWhereAWorkerPerSequenceIsAsGood) {
  Input input = equal_sequences(64);  // the line would cut almost every one
  EXPECT_EQ(plan_of(input).header.num_slots, 0);
  input.lengths[5] = 65 * 64;  // mean + 1 at most: (64 * 66 + 1) / 66 + 1
  EXPECT_EQ(plan_of(input).header.num_slots, 0);
  input.lengths[5] = 66 * 64;
  EXPECT_GT(plan_of(input).header.num_slots, 0);
}

TEST(SplitPlan, NothingIsCutWhereThatCostsLessThanCombining) {
  Input input = equal_sequences(128);  // two sequences for each of 64 workers: load 132, mean 128
  EXPECT_GT(plan_of(input).header.num_slots, 0);
  input.shape.combine_grains = 2;
  const HostPlan plan = plan_of(input);
  EXPECT_EQ(plan.header.num_slots, 0);
  const Pieces workers = pieces_of(plan);
  for (size_t i = 0; i < 64; ++i) EXPECT_EQ(workers[i].size(), 2u);
  EXPECT_TRUE(workers[64].empty() && workers[65].empty());
  input.lengths[5] = 65 * 64;  // 134 against 128 + 2 + 2
  EXPECT_GT(plan_of(input).header.num_slots, 0);
}

TEST(SplitPlan, EverySequenceGetsAsManyWorkersWhereThatIsAsGood) {
  // 16 grains for each of 64 workers; the mean is (1024 + 32) / 66.
  Input input = equal_sequences(16);
  const Pieces workers = pieces_of(plan_of(input));
  for (int i = 0; i < 64; ++i) {
    const auto& pieces = workers[static_cast<size_t>(i)];
    ASSERT_EQ(pieces.size(), 1u) << i;
    EXPECT_EQ(pieces[0].sequence, i / 4);
    EXPECT_EQ(pieces[0].grain_begin, i % 4 * 16);
    EXPECT_EQ(pieces[0].grain_end, i % 4 * 16 + 16);
    EXPECT_EQ(pieces[0].slot, i);
  }
  EXPECT_TRUE(workers[64].empty() && workers[65].empty());
  input.lengths[5] = 65 * 64;  // 17 grains for one
  EXPECT_FALSE(pieces_of(plan_of(input))[65].empty());
}

TEST(SplitPlan, ShortSequencesHaveFewerPieces) {
  Input input = equal_sequences(16);
  input.shape.fixed_grains = 40;  // so that an even cut exceeds the mean by less
  input.lengths[3] = 2 * 64;
  input.lengths[4] = 0;
  const HostPlan plan = plan_of(input);
  const Pieces workers = pieces_of(plan);
  const size_t expected[] = {1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1};
  for (size_t i = 0; i < std::size(expected); ++i) {
    EXPECT_EQ(workers[8 + i].size(), expected[i]) << 8 + i;
  }
  EXPECT_EQ(workers[16].at(0).slot, -1);  // the empty one, whole
  EXPECT_EQ(plan.header.num_slots, 14 * 4 + 2);
}

// With a grain for every worker, all pay the fixed cost alike, so it does not count. With one grain more it does.
TEST(SplitPlan, FixedCostsCountWhereSomePayMore) {
  std::mt19937_64 random(4);
  Input input = make_input(8, 1, 8, 2, 0, random);
  EXPECT_EQ(plan_of(input).header.fixed_grains, 0);
  input.lengths[3] = 65;
  EXPECT_EQ(plan_of(input).header.fixed_grains, 2);
}

TEST(SplitPlan, LengthsOutsideTheTableAreClamped) {
  std::mt19937_64 random(3);
  for (const int fixed_split_tokens : {0, 64, 1024}) {
    Input input = make_input(40, 3, 7, 2, fixed_split_tokens, random);
    const auto most = static_cast<int32_t>(input.problem.max_seqlen_k());
    Input clamped = input;
    const int32_t bad[] = {-1, -64, INT_MIN, most + 1, most + 65, INT_MAX};
    for (size_t i = 0; i < std::size(bad); ++i) {
      input.lengths[3 * i] = bad[i];
      clamped.lengths[3 * i] = bad[i] < 0 ? 0 : most;
    }
    EXPECT_TRUE(plan_of(input) == plan_of(clamped));
  }
}

TEST(SplitPlan, WorkersFillTheDevice) {
  const auto use = [](int64_t blocks, int resident) {
    const int64_t waves = (blocks + resident - 1) / resident;
    return static_cast<double>(blocks) / static_cast<double>(waves * resident);
  };
  for (const int resident : {1, 2, 7, 108, 132, 148, 216, 264, 2000}) {
    for (int64_t tiles = 1; tiles <= 3000; tiles = tiles < 300 ? tiles + 1 : tiles * 7 / 6) {
      SCOPED_TRACE(std::to_string(tiles) + " tiles, " + std::to_string(resident) + " resident");
      const int workers = workers_for(tiles, resident);
      ASSERT_GE(workers, 1);
      ASSERT_LE(workers, 65535);
      if (4 * tiles <= resident) {  // a single wave, with no room for another worker
        ASSERT_LE(tiles * workers, resident);
        ASSERT_GT(tiles * (workers + 1), resident);
        continue;
      }
      ASSERT_LE(workers, 4);
      const double chosen = use(tiles * workers, resident);
      for (int other = 1; other <= 4; ++other) {
        ASSERT_GE(chosen, use(tiles * other, resident) - 0.1001) << other;
        if (other < workers) {
          ASSERT_GT(chosen, use(tiles * other, resident)) << other;
        }
      }
    }
  }
  // What the shapes of a Hopper GPU get.
  EXPECT_EQ(workers_for(1, 132), 132);
  EXPECT_EQ(workers_for(2, 132), 66);
  EXPECT_EQ(workers_for(8, 132), 16);
  EXPECT_EQ(workers_for(1, 264), 264);
  EXPECT_EQ(workers_for(132, 132), 1);
  EXPECT_EQ(workers_for(66, 132), 2);
  EXPECT_EQ(workers_for(1 << 24, 132), 1);
  EXPECT_EQ(workers_for(4096, 132), 1);  // three would leave 1% idle, not 3%
  EXPECT_EQ(workers_for(5, 0), 1);       // a workspace may be asked for where there is no GPU
  for (int64_t tiles = 1; tiles <= 12; ++tiles) {
    EXPECT_GE(static_cast<double>(tiles * workers_for(tiles, 132)), 0.9 * 132) << tiles;
  }
}

Input small_input() {
  Input input;
  input.problem.batch = 4;
  input.problem.num_heads_q = 1;
  input.problem.num_pages = 1;
  input.problem.softmax_scale = 1;
  input.problem.max_pages_per_seq = 20;
  input.shape = {.row_tiles = 1, .workers = 4, .fixed_grains = 1};
  input.lengths = {1000, 0, 65, 200};
  return input;
}

TEST(SplitPlan, ADescriptionShowsEveryPiece) {
  EXPECT_EQ(describe_plan(plan_of(small_input())),
            "worker   0      6 ##################......  0:0-320 (slot 0)\n"
            "worker   1      8 ########################  0:320-768 (slot 1)\n"
            "worker   2      7 #####################...  0:768-1000 (slot 2), 1:0-0\n"
            "worker   3      8 ########################  2:0-65, 3:0-200\n"
            "load in grains of 64 tokens, 1 for beginning a piece: mean 7.2, largest 8 "
            "(110% of the mean)\n"
            "1 of 4 sequences split, into 3 pieces\n");
}

TEST(SplitPlan, ALongDescriptionIsShortened) {
  Input input = small_input();
  input.problem.max_pages_per_seq = 400;
  input.shape.workers = 300;
  input.lengths = {20000, 0, 65, 1200};
  EXPECT_EQ(describe_plan(plan_of(input), 4),
            "worker   0      0 ........................\n"
            "worker   1      2 ################........  0:0-64 (slot 0)\n"
            "  ...     296 more workers\n"
            "worker 298      2 ################........  3:1024-1088 (slot 293)\n"
            "worker 299      3 ########################  3:1088-1200 (slot 294)\n"
            "load in grains of 64 tokens, 1 for beginning a piece: mean 2.1, largest 3 "
            "(143% of the mean)\n"
            "3 of 4 sequences split, into 295 pieces\n");
  input.shape.workers = 1;
  input.problem.batch = 9;
  input.lengths = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  EXPECT_EQ(describe_plan(plan_of(input)),
            "worker   0     18 ########################  0:0-1, 1:0-2, 2:0-3, 3:0-4, and 5 more\n"
            "load in grains of 64 tokens, 1 for beginning a piece: mean 18.0, largest 18 "
            "(100% of the mean)\n"
            "0 of 9 sequences split, into 0 pieces\n");
  input.shape.workers = 40;  // max_lines by default
  EXPECT_EQ(describe_plan(plan_of(input)).find("more workers"), std::string::npos);
  input.shape.workers = 41;
  EXPECT_NE(describe_plan(plan_of(input)).find("1 more workers"), std::string::npos);
}

class SplitPlanOn : public MachineTest {
 protected:
  bool on_gpu() const { return GetParam() == MachineKind::kGpu; }

  // make_plan on the machine, read back.
  void make_and_read(const Input& input, HostPlan* plan) {
    WorkspaceBytes needs;
    ASSERT_OK(split_bytes(input.problem, input.shape, &needs));
    const size_t bytes = needs.plan;
    DeviceBuffer lengths, workspace;
    ASSERT_OK(lengths.assign(*machine_, input.lengths.data(), input.lengths.size() * 4));
    ASSERT_OK(workspace.allocate(*machine_, bytes));
    ASSERT_OK(machine_->fill(workspace.data(), 0xff, bytes));
    const Status made = make_plan(*machine_, input.problem, input.shape, lengths.as<int32_t>(),
                                  workspace.data(), nullptr);
    ASSERT_OK(made);
    const Status read =
        read_plan(*machine_, input.problem, input.shape, workspace.data(), plan, nullptr);
    ASSERT_OK(read);
    ASSERT_EQ(plan->header.state.generation, 0u);  // 0xffffffff and one more
  }

  void expect_as_on_host(const Input& input) {
    HostPlan plan;
    make_and_read(input, &plan);
    if (HasFatalFailure()) return;
    const HostPlan expected = plan_of(input);
    if (plan == expected) return;
    // Say what differs.
    EXPECT_TRUE(plan.header == expected.header) << describe_plan(expected);
    for (size_t w = 0; w < expected.worker_begin.size(); ++w) {
      const WorkerBegin &a = plan.worker_begin[w], &b = expected.worker_begin[w];
      ASSERT_EQ(std::memcmp(&a, &b, sizeof a), 0)
          << "worker " << w << " begins at " << a.sequence << ":" << a.grain << " (" << a.split
          << "), expected " << b.sequence << ":" << b.grain << " (" << b.split << ")";
    }
    EXPECT_EQ(plan.slot_begin, expected.slot_begin);
    EXPECT_EQ(plan.seqlens_k, expected.seqlens_k);
    EXPECT_TRUE(plan.split_sequences == expected.split_sequences);
    FAIL() << "the plan differs from the host's";
  }
};

TEST_P(SplitPlanOn, IsTheHostsToTheBit) {
  uint64_t seed = 0;
  for (const Input& input : inputs(on_gpu() ? 1500 : 120)) {
    SCOPED_TRACE(input.name);
    gpu_model::schedule().seed = seed++ % 5;
    expect_as_on_host(input);
    if (HasFailure()) return;
  }
}

TEST_P(SplitPlanOn, IsTheSameUnderEverySchedule) {
  std::mt19937_64 random(11);
  for (const int fixed_split_tokens : {0, 1024}) {
    const Input input = make_input(2500, 3, 300, 3, fixed_split_tokens, random);
    for (uint64_t seed = 0; seed < 6; ++seed) {
      gpu_model::schedule().seed = seed;
      expect_as_on_host(input);
      if (HasFailure()) return;
    }
  }
}

// There are ten grains, and a worker takes at least four. Two workers share them, and the others have nothing.
TEST_P(SplitPlanOn, WorkersStayIdleRatherThanTakeTooLittle) {
  Input input = equal_sequences(1);
  input.problem.num_heads_q = 1;
  input.lengths = {640};
  input.shape.min_grains = 4;
  expect_as_on_host(input);
  const Pieces workers = pieces_of(plan_of(input));
  for (size_t worker = 0; worker < workers.size(); ++worker) {
    ASSERT_EQ(workers[worker].size(), worker < 2 ? 1u : 0u) << worker;
  }
  EXPECT_EQ(workers[1][0].grain_begin, 5);
}

TEST_P(SplitPlanOn, ClampsLengthsAsTheHostDoes) {
  std::mt19937_64 random(12);
  for (const int fixed_split_tokens : {0, 64, 1024}) {
    Input input = make_input(70, 4, 31, 2, fixed_split_tokens, random);
    const auto most = static_cast<int32_t>(input.problem.max_seqlen_k());
    const int32_t bad[] = {-1, -64, INT_MIN, most + 1, most + 65, INT_MAX};
    for (size_t i = 0; i < std::size(bad); ++i) input.lengths[5 * i] = bad[i];
    expect_as_on_host(input);
    HostPlan plan;
    make_and_read(input, &plan);
    if (HasFatalFailure()) return;
    for (size_t i = 0; i < std::size(bad); ++i) {
      EXPECT_EQ(plan.seqlens_k[5 * i], bad[i] < 0 ? 0 : most) << bad[i];
    }
  }
}

// The plan as stages use it, through plan_decode and the functions beside it.
class PlannedDecode : public SplitPlanOn {
 protected:
  void SetUp() override {
    SplitPlanOn::SetUp();
    if (machine_ == nullptr) return;
    gpu_model::device().multiprocessors = 4;  // so that small problems have cuts and whole pieces
    spec_.lengths = {150, 0, 700, 64, 1, 30};
    if (on_gpu()) spec_.lengths = {9000, 0, 700, 64, 1, 30000};
    spec_.seqlen_q = 2;
    spec_.num_heads_q = 3;
    spec_.data = DataKind::kNeedles;
    data_ = make_data_set(spec_);
    ASSERT_OK(generate_on_device(*machine_, data_, &tensors_));
    for (const Stage& stage : stages(GetParam())) {
      if (!check_device(stage, machine_->limits()).ok()) continue;
      (stage.plan_shape != nullptr ? planned_ : unplanned_).push_back(&stage);
    }
    ASSERT_FALSE(planned_.empty());
    ASSERT_FALSE(unplanned_.empty());
  }

  // A cache that this stage can read.
  void use_data_of(const Stage& stage) {
    if (stage.cache_formats.front() == spec_.cache_format) return;
    spec_.cache_format = stage.cache_formats.front();
    data_ = make_data_set(spec_);
    ASSERT_OK(generate_on_device(*machine_, data_, &tensors_));
  }

  // Memory that held no plan before, of the size that the stage asks for `problem`.
  void clear_workspace(const Stage& stage, const Problem& problem, unsigned char byte = 0xff) {
    ASSERT_OK(workspace_bytes(stage, problem, &needs_));
    ASSERT_OK(plan_.allocate(*machine_, std::max<size_t>(16, needs_.plan)));
    ASSERT_OK(machine_->fill(plan_.data(), byte, plan_.bytes()));
    ASSERT_OK(scratch_.allocate(*machine_, std::max<size_t>(16, needs_.scratch)));
    ASSERT_OK(machine_->fill(scratch_.data(), byte, scratch_.bytes()));
  }
  void clear_workspace(const Stage& stage, unsigned char byte = 0xff) {
    clear_workspace(stage, data_.problem, byte);
  }
  std::vector<unsigned char> bytes_of(const DeviceBuffer& buffer) {
    std::vector<unsigned char> bytes(buffer.bytes());
    EXPECT_OK(machine_->synchronize());
    EXPECT_OK(machine_->copy_to_host(bytes.data(), buffer.data(), bytes.size()));
    return bytes;
  }
  bool outputs_untouched() {
    const auto untouched = [&](const DeviceBuffer& buffer) {
      const auto bytes = bytes_of(buffer);
      return std::all_of(bytes.begin(), bytes.end(), [](unsigned char b) { return b == 0xff; });
    };
    return untouched(tensors_.out) && untouched(tensors_.lse);
  }
  const int32_t* lengths() const { return tensors_.seqlens_k.as<int32_t>(); }
  Status make(const Stage& stage) { return plan_decode(stage, data_.problem, lengths(), plan()); }
  Status check(const Stage& stage) { return check_plan(stage, data_.problem, lengths(), plan()); }
  Status run_planned(const Stage& stage) {
    return decode_planned(stage, data_.problem, tensors_.tensors(), plan(), scratch());
  }
  PlanState state_of(const Stage& stage) {
    PlanState state{};
    EXPECT_OK(plan_state(stage, data_.problem, plan(), &state));
    EXPECT_OK(machine_->synchronize());
    return state;
  }

  DecodeCase spec_;
  DataSet data_;
  DeviceTensors tensors_;
  // As much memory as the stage asked for, and no more.
  Workspace plan() const { return {plan_.data(), needs_.plan}; }
  Workspace scratch() const { return {scratch_.data(), needs_.scratch}; }

  DeviceBuffer plan_, scratch_;
  WorkspaceBytes needs_;
  std::vector<const Stage*> planned_, unplanned_;
};

void expect_status(const Status& status, StatusCode code, const std::string& message) {
  EXPECT_EQ(status.code(), code) << status.to_string();
  EXPECT_EQ(status.message(), message);
}

// Whatever an earlier decode left in scratch memory is not the number of a later one.
TEST(DecodeNumber, IsDrawnOnce) {
  std::set<uint64_t> numbers = {0};
  int bits = 0;
  for (int i = 0; i < 1000; ++i) {
    const uint64_t number = draw_number();
    EXPECT_TRUE(numbers.insert(number).second);
    bits += std::popcount(number);
  }
  EXPECT_NEAR(bits / 1000.0, 32, 1);  // unlike anything that memory holds by chance
}

// Blocks that wait for each other must all be resident, and the stage has only counted its own workers.
TEST(DecodeNumber, MoreWorkersJoinNoHalves) {
  const PlanShape shape = {.row_tiles = 2, .workers = 10, .joins_halves = true};
  EXPECT_TRUE(with_settings({.workers_percent = 100}, shape).joins_halves);
  EXPECT_TRUE(with_settings({.workers_percent = 50}, shape).joins_halves);
  EXPECT_FALSE(with_settings({.workers_percent = 110}, shape).joins_halves);
}

TEST_P(PlannedDecode, ThePlanOfAStageIsReadBack) {
  for (const Stage* stage : planned_) {
    use_data_of(*stage);
    SCOPED_TRACE(stage->slug);
    clear_workspace(*stage);
    ASSERT_OK(make(*stage));
    HostPlan made;
    PlanShape shape;
    ASSERT_OK(read_plan(*stage, data_.problem, plan(), &made));
    ASSERT_OK(plan_shape(*stage, data_.problem, machine_->limits(), &shape));
    EXPECT_TRUE(made == make_plan_on_host(data_.problem, shape, data_.seqlens_k));
    EXPECT_GT(made.header.num_split_sequences, 0);
    EXPECT_TRUE(outputs_untouched());
  }
}

// With other lengths than the plan's the results are wrong, but every decode ends: no block waits for
// something that does not come.
TEST_P(PlannedDecode, LengthsThatThePlanWasNotMadeForDoNotHang) {
  if (GetParam() == MachineKind::kModel) gpu_model::device().multiprocessors = 8;
  for (const CacheFormat format : kCacheFormats) {
    DecodeCase spec;
    spec.batch = 5;
    spec.num_heads_q = 16;
    spec.cache_format = format;
    spec.lengths.assign(5, 700);  // so that every shorter length has its pages
    const DataSet data = make_data_set(spec);
    DeviceTensors tensors;
    ASSERT_OK(generate_on_device(*machine_, data, &tensors));
    std::mt19937 random(1);
    for (int turn = 0; turn < 6; ++turn) {
      std::vector<int32_t> planned(5), found(5);
      for (int32_t& length : planned) length = static_cast<int32_t>(random() % 701);
      for (int32_t& length : found) length = static_cast<int32_t>(random() % 3 * random() % 701);
      DeviceBuffer lengths;
      ASSERT_OK(lengths.assign(*machine_, planned.data(), planned.size() * 4));
      for (const Stage* stage : planned_) {
        if (stage->cache_formats.front() != format) continue;
        SCOPED_TRACE(stage->slug + ", turn " + std::to_string(turn));
        WorkspaceBytes needs;
        ASSERT_OK(workspace_bytes(*stage, data.problem, &needs));
        DeviceBuffer workspace;
        ASSERT_OK(workspace.allocate(*machine_, needs.total()));
        const Workspace whole = workspace;
        ASSERT_OK(plan_decode(*stage, data.problem, lengths.as<int32_t>(), needs.plan_in(whole)));
        ASSERT_OK(
            machine_->copy_to_device(tensors.seqlens_k.data(), found.data(), found.size() * 4));
        EXPECT_OK(decode_planned(*stage, data.problem, tensors.tensors(), needs.plan_in(whole),
                                 needs.scratch_in(whole)));
        ASSERT_OK(machine_->synchronize());
      }
    }
  }
}

TEST_P(PlannedDecode, OnePlanServesManyDecodes) {
  for (const Stage* stage : planned_) {
    use_data_of(*stage);
    for (const int fixed_split_tokens : {0, 128}) {
      SCOPED_TRACE(stage->slug + ", fixed splits " + std::to_string(fixed_split_tokens));
      data_.problem.fixed_split_tokens = fixed_split_tokens;
      clear_workspace(*stage);
      ASSERT_OK(tensors_.poison_outputs(*machine_));
      DeviceBuffer whole;
      ASSERT_OK(allocate_workspace(*stage, data_.problem, &whole));
      ASSERT_EQ(whole.bytes(), needs_.total());
      ASSERT_OK(decode(*stage, data_.problem, tensors_.tensors(), whole));
      const auto out = bytes_of(tensors_.out), lse = bytes_of(tensors_.lse);
      clear_workspace(*stage);
      ASSERT_OK(make(*stage));
      for (int turn = 0; turn < 2; ++turn) {
        ASSERT_OK(tensors_.poison_outputs(*machine_));
        ASSERT_OK(run_planned(*stage));
        EXPECT_TRUE(bytes_of(tensors_.out) == out) << turn;
        EXPECT_TRUE(bytes_of(tensors_.lse) == lse) << turn;
        EXPECT_OK(check(*stage));
      }
    }
  }
}

TEST_P(PlannedDecode, APlanIsCheckedOnRequest) {
  const std::string kNoPlan = "plan holds no plan for this problem";
  const std::string kOther = kNoPlan + ", but one for another";
  for (const Stage* stage : planned_) {
    use_data_of(*stage);
    SCOPED_TRACE(stage->slug);
    for (const unsigned char byte : {0x00, 0xff}) {
      clear_workspace(*stage, byte);
      expect_status(check(*stage), StatusCode::kInvalidArgument, kNoPlan);
      HostPlan made;
      expect_status(read_plan(*stage, data_.problem, plan(), &made), StatusCode::kInvalidArgument,
                    kNoPlan);
    }
    ASSERT_OK(make(*stage));
    EXPECT_OK(check(*stage));

    // One length, at any place, is different by one.
    for (const size_t i : {size_t{0}, size_t{3}, data_.seqlens_k.size() - 1}) {
      std::vector<int32_t> other = data_.seqlens_k;
      other[i] += 1;
      DeviceBuffer device;
      ASSERT_OK(device.assign(*machine_, other.data(), other.size() * 4));
      expect_status(check_plan(*stage, data_.problem, device.as<int32_t>(), plan()),
                    StatusCode::kInvalidArgument,
                    "seqlens_k[" + std::to_string(i) + "] = " + std::to_string(other[i]) +
                        ", but the plan was made for " + std::to_string(data_.seqlens_k[i]));
    }

    // Another problem: a sequence fewer, or another mode.
    Problem problem = data_.problem;
    problem.batch -= 1;
    expect_status(check_plan(*stage, problem, lengths(), plan()), StatusCode::kInvalidArgument,
                  kOther);
    const auto expect_other = [&] {
      WorkspaceBytes more;
      ASSERT_OK(workspace_bytes(*stage, problem, &more));
      ASSERT_OK(plan_.allocate(*machine_, needs_.plan + more.plan));
      ASSERT_OK(make(*stage));
      expect_status(check_plan(*stage, problem, lengths(), plan_), StatusCode::kInvalidArgument,
                    kOther);
      EXPECT_OK(check(*stage));
    };
    problem = data_.problem;
    problem.fixed_split_tokens = 128;
    expect_other();
    // Another table: its row has fewer columns, past which the plan would read.
    problem = data_.problem;
    problem.max_pages_per_seq -= 1;
    expect_other();
    // Other workers: a problem whose rows fill the device by themselves.
    problem = data_.problem;
    problem.num_heads_q = 3000;
    PlanShape few, many;
    ASSERT_OK(plan_shape(*stage, problem, machine_->limits(), &few));
    ASSERT_OK(plan_shape(*stage, data_.problem, machine_->limits(), &many));
    ASSERT_NE(few.workers, many.workers);
    expect_other();
  }
}

// Whatever the plan's memory holds instead of a plan for the problem, neither outputs nor other memory are
// touched, and the next call that looks at it reports it.
TEST_P(PlannedDecode, MemoryWithoutAPlanIsRecognisedInTheKernel) {
  std::mt19937_64 random(7);
  for (const Stage* stage : planned_) {
    use_data_of(*stage);
    SCOPED_TRACE(stage->slug);
    ASSERT_OK(tensors_.poison_outputs(*machine_));
    const auto expect_refused = [&](const std::string& what) {
      SCOPED_TRACE(what);
      const auto before = bytes_of(plan_);
      ASSERT_OK(run_planned(*stage));
      ASSERT_OK(machine_->synchronize());
      EXPECT_TRUE(outputs_untouched());
      EXPECT_EQ(state_of(*stage).refused, 1u);
      EXPECT_FALSE(check(*stage).ok());
      auto after = bytes_of(plan_);
      std::copy_n(before.begin() + 12, 4, after.begin() + 12);  // PlanState::refused
      EXPECT_TRUE(after == before);
    };
    clear_workspace(*stage, 0x00);
    expect_refused("zeros");
    clear_workspace(*stage);
    expect_refused("ones");
    for (int turn = 0; turn < 5; ++turn) {
      std::vector<unsigned char> bytes(plan_.bytes());
      for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
      ASSERT_OK(machine_->copy_to_device(plan_.data(), bytes.data(), bytes.size()));
      expect_refused("random bytes");
    }
    // A plan for a wider table, for fewer sequences, or for fixed splits. Each is a whole plan, but for another
    // problem.
    for (const auto& change : std::vector<std::function<void(Problem&)>>{
             [](Problem& p) { p.max_pages_per_seq += 1; }, [](Problem& p) { p.batch -= 1; },
             [](Problem& p) { p.fixed_split_tokens = 64; }}) {
      Problem other = data_.problem;
      change(other);
      clear_workspace(*stage, other);
      ASSERT_OK(plan_decode(*stage, other, lengths(), plan_));
      WorkspaceBytes own;
      ASSERT_OK(workspace_bytes(*stage, data_.problem, &own));
      if (own.plan > plan_.bytes() || own.scratch > scratch_.bytes()) {
        DeviceBuffer larger;
        const auto bytes = bytes_of(plan_);
        ASSERT_OK(larger.allocate(*machine_, std::max(own.plan, plan_.bytes())));
        ASSERT_OK(machine_->copy_to_device(larger.data(), bytes.data(), bytes.size()));
        plan_ = std::move(larger);
        ASSERT_OK(scratch_.allocate(*machine_, std::max(own.scratch, scratch_.bytes())));
      }
      needs_ = own;
      expect_refused("another problem's plan");
      // From then on, a check of the plan for its own problem reports it, too.
      const Status told = check_plan(*stage, other, lengths(), plan_);
      EXPECT_NE(told.message().find("found no plan of its own"), std::string::npos)
          << told.to_string();
    }
    // A plan that is made anew is as good as the first.
    clear_workspace(*stage);
    expect_refused("ones");
    ASSERT_OK(make(*stage));
    EXPECT_EQ(state_of(*stage).refused, 0u);
    EXPECT_EQ(state_of(*stage).generation, 0u);  // 0xffffffff and one more
    ASSERT_OK(run_planned(*stage));
    EXPECT_FALSE(outputs_untouched());
    EXPECT_OK(check(*stage));
    ASSERT_OK(make(*stage));
    EXPECT_EQ(state_of(*stage).generation, 1u);
  }
}

// Two decodes are under way by one plan, each with its own scratch memory and outputs. (The model runs them
// one after the other, but notices if one needs the other's memory.)
TEST_P(PlannedDecode, OnePlanServesDecodesAtTheSameTime) {
  for (const Stage* stage : planned_) {
    use_data_of(*stage);
    SCOPED_TRACE(stage->slug);
    clear_workspace(*stage);
    ASSERT_OK(make(*stage));
    ASSERT_OK(run_planned(*stage));
    const auto out = bytes_of(tensors_.out), lse = bytes_of(tensors_.lse);
    const auto planned = bytes_of(plan_);
    DeviceBuffer scratches[2], outs[2], lses[2];
    void* streams[2] = {};
#ifdef MLA_HAVE_CUDA
    for (void*& stream : streams) {
      if (!on_gpu()) continue;
      cudaStream_t made = nullptr;
      ASSERT_EQ(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), cudaSuccess);
      stream = made;
    }
#endif
    for (int i = 0; i < 2; ++i) {
      ASSERT_OK(scratches[i].allocate(*machine_, std::max<size_t>(16, needs_.scratch)));
      ASSERT_OK(outs[i].allocate(*machine_, out.size()));
      ASSERT_OK(lses[i].allocate(*machine_, lse.size()));
    }
    ASSERT_OK(machine_->synchronize());
    for (int turn = 0; turn < (on_gpu() ? 100 : 1); ++turn) {
      for (int i = 0; i < 2; ++i) {
        Tensors tensors = tensors_.tensors();
        tensors.out = outs[i].data();
        tensors.lse = lses[i].as<float>();
        ASSERT_OK(machine_->fill(outs[i].data(), 0xff, out.size(), streams[i]));
        ASSERT_OK(decode_planned(*stage, data_.problem, tensors, plan(), scratches[i], streams[i]));
      }
    }
    for (int i = 0; i < 2; ++i) {
      EXPECT_TRUE(bytes_of(outs[i]) == out) << i;
      EXPECT_TRUE(bytes_of(lses[i]) == lse) << i;
    }
    EXPECT_TRUE(bytes_of(plan_) == planned);
#ifdef MLA_HAVE_CUDA
    for (void* stream : streams) {
      if (stream != nullptr) cudaStreamDestroy(static_cast<cudaStream_t>(stream));
    }
#endif
  }
}

TEST_P(PlannedDecode, AStageWithoutAPlanHasNothingToCheck) {
  for (const Stage* stage : unplanned_) {
    use_data_of(*stage);
    SCOPED_TRACE(stage->slug);
    clear_workspace(*stage);
    EXPECT_EQ(needs_.plan, 0u);
    const auto before = bytes_of(plan_);
    EXPECT_OK(make(*stage));
    EXPECT_OK(check(*stage));
    EXPECT_TRUE(bytes_of(plan_) == before);
    HostPlan made;
    PlanState state;
    PlanShape shape;
    const std::string none = stage->slug + " makes no plan";
    expect_status(read_plan(*stage, data_.problem, {}, &made), StatusCode::kUnsupported, none);
    expect_status(plan_state(*stage, data_.problem, {}, &state), StatusCode::kUnsupported, none);
    expect_status(plan_shape(*stage, data_.problem, machine_->limits(), &shape),
                  StatusCode::kUnsupported, none);
    EXPECT_OK(decode_planned(*stage, data_.problem, tensors_.tensors(), {}, scratch()));
  }
}

// In each function, each argument is spoilt in turn. The call is refused with the right code and words, and
// touches no byte of the outputs or the workspace.
TEST_P(PlannedDecode, BadCallsAreRefusedAndTouchNothing) {
  struct Call {
    Problem problem;
    Tensors tensors;
    Workspace plan, scratch;
  };
  struct Bad {
    const char* name;
    std::function<void(Call&)> spoil;
    StatusCode code;
    std::vector<const char*> message;
    bool plan_only = true;  // whether functions without tensors see it, too
  };
  constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
  const std::vector<Bad> bad_calls = {
      {"batch", [](Call& c) { c.problem.batch = -1; }, kInvalid, {"batch = -1"}},
      {"fixed splits",
       [](Call& c) { c.problem.fixed_split_tokens = 100; },
       kInvalid,
       {"fixed_split_tokens = 100", "64"}},
      {"plan too small",
       [](Call& c) { --c.plan.bytes; },
       StatusCode::kWorkspaceTooSmall,
       {"plan.bytes = ", "needs "}},
      {"plan null", [](Call& c) { c.plan.data = nullptr; }, kInvalid, {"plan.data is null"}},
      {"plan misaligned",
       [](Call& c) { c.plan.data = static_cast<char*>(c.plan.data) + 8; },
       kInvalid,
       {"plan", "16"}},
      {"scratch too small",
       [](Call& c) { --c.scratch.bytes; },
       StatusCode::kWorkspaceTooSmall,
       {"scratch.bytes = ", "needs "},
       false},
      {"scratch null",
       [](Call& c) { c.scratch.data = nullptr; },
       kInvalid,
       {"scratch.data is null"},
       false},
      {"lengths null",
       [](Call& c) { c.tensors.seqlens_k = nullptr; },
       kInvalid,
       {"seqlens_k is null"}},
      {"lengths misaligned",
       [](Call& c) {
         c.tensors.seqlens_k = reinterpret_cast<const int32_t*>(
             reinterpret_cast<const char*>(c.tensors.seqlens_k) + 2);
       },
       kInvalid,
       {"seqlens_k ", "not aligned to 4 bytes"}},
      {"q null", [](Call& c) { c.tensors.q = nullptr; }, kInvalid, {"q is null"}, false},
      {"out null", [](Call& c) { c.tensors.out = nullptr; }, kInvalid, {"out is null"}, false},
  };
  struct Entry {
    const char* name;
    std::function<Status(const Stage&, const Call&)> call;
    bool takes_lengths, takes_tensors;
  };
  HostPlan made;
  PlanState state;
  const std::vector<Entry> entries = {
      {"plan_decode",
       [](const Stage& stage, const Call& c) {
         return plan_decode(stage, c.problem, c.tensors.seqlens_k, c.plan);
       },
       true, false},
      {"decode_planned",
       [](const Stage& stage, const Call& c) {
         return decode_planned(stage, c.problem, c.tensors, c.plan, c.scratch);
       },
       true, true},
      {"read_plan",
       [&](const Stage& stage, const Call& c) {
         return read_plan(stage, c.problem, c.plan, &made);
       },
       false, false},
      {"plan_state",
       [&](const Stage& stage, const Call& c) {
         return plan_state(stage, c.problem, c.plan, &state);
       },
       false, false},
      {"check_plan",
       [](const Stage& stage, const Call& c) {
         return check_plan(stage, c.problem, c.tensors.seqlens_k, c.plan);
       },
       true, false},
  };
  for (const Stage* stage : planned_) {
    use_data_of(*stage);
    clear_workspace(*stage);
    ASSERT_OK(make(*stage));
    const auto before = bytes_of(plan_);
    for (const Entry& entry : entries) {
      for (const Bad& bad : bad_calls) {
        if (!bad.plan_only && !entry.takes_tensors) continue;
        if (std::strncmp(bad.name, "lengths", 7) == 0 && !entry.takes_lengths) continue;
        SCOPED_TRACE(stage->slug + ", " + entry.name + ", " + bad.name);
        Call call{data_.problem, tensors_.tensors(), plan(), scratch()};
        bad.spoil(call);
        const Status status = entry.call(*stage, call);
        EXPECT_EQ(status.code(), bad.code) << status.to_string();
        for (const char* part : bad.message) {
          EXPECT_NE(status.message().find(part), std::string::npos)
              << status.to_string() << " lacks " << part;
        }
        EXPECT_TRUE(outputs_untouched());
        EXPECT_TRUE(bytes_of(plan_) == before);
      }
    }
    EXPECT_OK(check(*stage));
  }
}

std::string machine_name(const testing::TestParamInfo<MachineKind>& test) {
  return test.param == MachineKind::kModel ? "Model" : "Gpu";
}
INSTANTIATE_TEST_SUITE_P(Machines, SplitPlanOn,
                         testing::Values(MachineKind::kModel, MachineKind::kGpu), machine_name);
INSTANTIATE_TEST_SUITE_P(Machines, PlannedDecode,
                         testing::Values(MachineKind::kModel, MachineKind::kGpu), machine_name);

}  // namespace
}  // namespace mla
