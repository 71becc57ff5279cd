// The combine of a split decode, on parts that the test writes: more parts than a warp has lanes or a block
// has threads, parts that saw nothing, and rows that no part saw. They are merged in double for comparison.
#include "stages/common/split/split_combine.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "reference/gpu_model/gpu_model.h"
#include "stages/common/ptx/ptx.h"
#include "tests/machine_test.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

constexpr float kInfinity = INFINITY;

struct Input {
  std::string name;
  std::vector<int32_t> lengths;
  int workers;
  int fixed_split_tokens = 0;
  int most_parts = 1;  // of a sequence
  bool joins_halves = false;
};

// So many sequences that there are many rows. One has `long_one` tokens, one has a grain, and one none.
std::vector<int32_t> twenty_six(int32_t long_one) {
  std::vector<int32_t> lengths(26, 640);
  lengths[0] = 0;
  lengths[2] = 64;
  lengths[5] = long_one;
  return lengths;
}

// With few rows, a block combines a quarter of a row. With many, a warp combines a row (combines_by_block()), and the more
// rows there are, the fewer parts are under way.
std::vector<Input> inputs() {
  // So many sequences that have two parts if a worker has a grain, and one that has many.
  const auto one_long = [](size_t sequences, int parts) {
    std::vector<int32_t> lengths(sequences, 65);
    lengths[3] = 64 * parts;
    return lengths;
  };
  return {{"many parts: more than threads in a block", {64 * 300}, 300, 0, 300},
          {"many parts: some in flight at once, and no more", {64 * 40, 64 * 65}, 70, 0, 43},
          {"few: more than lanes in a warp", one_long(32, 100), 300, 0, 100},
          {"few: two", twenty_six(640), 20, 0, 2},
          {"few: six under way", one_long(130, 10), 300, 0, 10},
          {"few: three under way", one_long(240, 10), 500, 0, 10},
          {"fixed splits", {64 * 70, 1, 64 * 33, 0}, 2, 64, 70}};
}

// A number in [0, 1) that depends on the place alone.
double draw(int sequence, int part, int row, int column) {
  uint64_t x = 0x9e3779b97f4a7c15;
  for (const int value : {sequence, part, row, column}) {
    x = (x ^ static_cast<uint64_t>(value)) * 0xbf58476d1ce4e5b9;
    x ^= x >> 31;
  }
  return static_cast<double>(x >> 11) / 9007199254740992.0;
}

// One row of each sequence saw nothing; in the others, every fourth part did not. One row has a large lse, one a small one,
// and one a late part with all the weight.
float lse_of_part(int sequence, int part, int row) {
  if (row == 5 || draw(sequence, part, row, -1) < 0.25) return -kInfinity;
  const auto lse = static_cast<float>(6 * draw(sequence, part, row, -2) - 3);
  if (row == 4) return lse + 200;
  if (row == 7) return lse - 200;
  if (row == 8 && part == 39) return lse + 250;
  return lse;
}
float out_of_part(int sequence, int part, int row, int column) {
  if (lse_of_part(sequence, part, row) == -kInfinity) return NAN;  // there may be anything
  return static_cast<float>(2 * draw(sequence, part, row, column) - 1);
}

class SplitCombine : public MachineTest {
 protected:
  // A plan, and a part in each of its slots.
  void prepare(const Input& input, DType dtype) {
    problem_ = {};
    problem_.dtype = dtype;
    problem_.batch = static_cast<int>(input.lengths.size());
    problem_.seqlen_q = 2;
    problem_.num_heads_q = 6;
    problem_.num_heads_kv = 2;
    problem_.num_pages = 1;
    problem_.max_pages_per_seq = 400;
    problem_.softmax_scale = 1;
    problem_.fixed_split_tokens = input.fixed_split_tokens;
    shape_ = {.row_tiles = 2, .workers = input.workers, .joins_halves = input.joins_halves};
    made_ = make_plan_on_host(problem_, shape_, input.lengths);
    WorkspaceBytes needs;
    ASSERT_OK(split_bytes(problem_, shape_, &needs));
    DeviceBuffer lengths;
    ASSERT_OK(lengths.assign(*machine_, input.lengths.data(), input.lengths.size() * 4));
    ASSERT_OK(plan_.allocate(*machine_, needs.plan));
    ASSERT_OK(make_plan(*machine_, problem_, shape_, lengths.as<int32_t>(), plan_.data(), nullptr));
    std::vector<std::byte> scratch(needs.scratch);
    const SplitWorkspace parts = split_workspace(problem_, shape_, nullptr, scratch.data());
    int most = 1;
    for (const SplitSequence& split : made_.split_sequences) {
      most = std::max(most, split.slots);
      for (int part = 0; part < split.slots; ++part) {
        for (int row = 0; row < kRows; ++row) {
          const int64_t place = int64_t{split.slot_begin + part} * kRows + row;
          parts.lse_partial[place] = lse_of_part(split.sequence, part, row);
          for (int column = 0; column < kHeadDimV; ++column) {
            parts.out_partial[place * kHeadDimV + column] =
                out_of_part(split.sequence, part, row, column);
          }
        }
      }
    }
    EXPECT_EQ(most, input.most_parts);
    ASSERT_OK(scratch_.assign(*machine_, scratch.data(), scratch.size()));
    ASSERT_OK(out_.allocate(*machine_, static_cast<size_t>(problem_.out_elements()) * 2));
    ASSERT_OK(lse_.allocate(*machine_, static_cast<size_t>(problem_.lse_elements()) * 4));
    ASSERT_OK(machine_->fill(out_.data(), 0xff, out_.bytes()));
    ASSERT_OK(machine_->fill(lse_.data(), 0xff, lse_.bytes()));
  }

  Tensors tensors() const {
    Tensors result;
    result.out = out_.data();
    result.lse = lse_.as<float>();
    return with_strides(problem_, result);
  }

  void combine() {
    ASSERT_OK(combine_again(*machine_, problem_, shape_, tensors(), plan_.data(), scratch_.data(),
                            nullptr));
    read_back();
  }
  void read_back() {
    ASSERT_OK(machine_->synchronize());
    host_out_.resize(out_.bytes() / 2);
    host_lse_.resize(lse_.bytes() / 4);
    ASSERT_OK(machine_->copy_to_host(host_out_.data(), out_.data(), out_.bytes()));
    ASSERT_OK(machine_->copy_to_host(host_lse_.data(), lse_.data(), lse_.bytes()));
  }

  float out_at(int64_t place) const {
    const uint16_t bits = host_out_[static_cast<size_t>(place)];
    return visit_dtype(problem_.dtype,
                       [&](auto zero) { return to_float(std::bit_cast<decltype(zero)>(bits)); });
  }

  void expect_merged() {
    const double half_ulp = problem_.dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
    const Tensors places = tensors();
    std::vector<int> parts(static_cast<size_t>(problem_.batch));
    for (const SplitSequence& split : made_.split_sequences) {
      parts[static_cast<size_t>(split.sequence)] = split.slots;
    }
    const int group = problem_.group_size(), rows_per_head = problem_.rows_per_kv_head();
    for (int sequence = 0; sequence < problem_.batch; ++sequence) {
      for (int row = 0; row < kRows; ++row) {
        const int query = row % rows_per_head / group;
        const int head = row / rows_per_head * group + row % rows_per_head % group;
        SCOPED_TRACE("sequence " + std::to_string(sequence) + ", row " + std::to_string(row));
        const float lse = host_lse_[static_cast<size_t>(places.lse_place(sequence, query, head))];
        const int64_t place = places.out_place(sequence, query, head);
        const int slots = parts[static_cast<size_t>(sequence)];
        if (slots == 0 || combined_slots(made_, shape_) == 0) {  // a worker has written it
          ASSERT_TRUE(std::isnan(lse) && std::isnan(out_at(place)));
          continue;
        }
        double sum = 0;
        std::vector<double> expected(kHeadDimV);
        for (int part = 0; part < slots; ++part) {
          const double weight = std::exp(double{lse_of_part(sequence, part, row)});
          if (weight == 0) continue;
          sum += weight;
          for (int column = 0; column < kHeadDimV; ++column) {
            expected[static_cast<size_t>(column)] +=
                weight * out_of_part(sequence, part, row, column);
          }
        }
        if (sum == 0) {
          ASSERT_EQ(lse, kInfinity);
        } else {
          ASSERT_NEAR(lse, std::log(sum), 4e-5);
        }
        for (int column = 0; column < kHeadDimV; ++column) {
          const double right = sum == 0 ? 0 : expected[static_cast<size_t>(column)] / sum;
          ASSERT_NEAR(out_at(place + column), right, half_ulp * std::abs(right) + 1e-5) << column;
        }
      }
    }
  }

  static constexpr int kRows = 12;
  Problem problem_;
  PlanShape shape_;
  HostPlan made_;
  DeviceBuffer plan_, scratch_, out_, lse_;
  std::vector<uint16_t> host_out_;
  std::vector<float> host_lse_;
};

TEST_P(SplitCombine, MergesAnyNumberOfParts) {
  uint64_t turn = 0;
  for (const Input& input : inputs()) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      SCOPED_TRACE(input.name + ", " + to_string(dtype));
      gpu_model::schedule().seed = turn;
      gpu_model::device().max_grid_x = turn % 2 == 0 ? 2147483647 : 3;  // blocks loop
      ++turn;
      prepare(input, dtype);
      combine();
      if (HasFatalFailure()) return;
      expect_merged();
      if (HasFailure()) return;
    }
  }
}

// The decode has joined halves where all parts are halves. Otherwise the combine merges all parts.
TEST_P(SplitCombine, LeavesHalvesAlone) {
  for (const Input& input : {Input{"few: halves alone", twenty_six(640), 20, 0, 2, true},
                             Input{"few: halves and others", twenty_six(1600), 20, 0, 3, true},
                             Input{"many: halves alone", {128}, 20, 0, 2, true},
                             Input{"many: three parts", {192}, 20, 0, 3, true}}) {
    SCOPED_TRACE(input.name);
    prepare(input, DType::kBFloat16);
    combine();
    if (HasFatalFailure()) return;
    expect_merged();
    const bool halves_alone = input.most_parts == 2;
    EXPECT_EQ(combined_slots(made_, shape_), halves_alone ? 0 : made_.header.num_slots);
    shape_.joins_halves = false;
    EXPECT_EQ(combined_slots(made_, shape_), made_.header.num_slots);
  }
}

// With fixed splits, a sequence's bits do not depend on what else is in the batch.
TEST_P(SplitCombine, FixedSplitsAreSummedInTheSameOrderInAnyBatch) {
  prepare({"alone", {64 * 70}, 20, 64, 70}, DType::kFloat16);
  combine();
  if (HasFatalFailure()) return;
  const std::vector<uint16_t> out(host_out_.begin(), host_out_.begin() + kRows * kHeadDimV);
  const std::vector<float> lse(host_lse_.begin(), host_lse_.begin() + kRows);
  std::vector<int32_t> lengths(9, 100);
  lengths[0] = 64 * 70;
  prepare({"among others", lengths, 20, 64, 70}, DType::kFloat16);
  combine();
  if (HasFatalFailure()) return;
  EXPECT_TRUE(std::equal(out.begin(), out.end(), host_out_.begin()));
  EXPECT_EQ(std::memcmp(lse.data(), host_lse_.data(), lse.size() * 4), 0);
}

// Writes the parts as a decode does.
void write_parts(SplitWorkspace split, const float* lse, const float* out, int64_t count) {
  model::ptx::griddepcontrol_launch_dependents();
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    split.lse_partial[i] = lse[i];
    for (int column = 0; column < kHeadDimV; ++column) {
      split.out_partial[i * kHeadDimV + column] = out[i * kHeadDimV + column];
    }
  }
}

// The combine may start while the decode before it still writes. Where kernels are compiled for it, the race detector
// notices if the combine does not wait.
TEST_P(SplitCombine, WaitsForThePartsOfTheGridBefore) {
  if (GetParam() != MachineKind::kModel) GTEST_SKIP() << "a GPU does not report races";
  for (const Input& input :
       {Input{"few", twenty_six(640), 20, 0, 2}, Input{"many", {64 * 20}, 20, 0, 20}}) {
    SCOPED_TRACE(input.name);
    prepare(input, DType::kBFloat16);
    const SplitWorkspace from = split_workspace(problem_, shape_, plan_.data(), scratch_.data());
    DeviceBuffer written;
    ASSERT_OK(written.allocate(*machine_, scratch_.bytes()));
    const SplitWorkspace to = split_workspace(problem_, shape_, plan_.data(), written.data());
    ASSERT_OK(model::launch(write_parts, 1, 128, 0, nullptr, to, from.lse_partial, from.out_partial,
                            int64_t{made_.header.num_slots} * kRows));
    ASSERT_OK(model::launch_combine(problem_, shape_, to, tensors(), nullptr,
                                    model::CombineStart::kEarly));
    read_back();
    expect_merged();
  }
}

TEST(SplitCombineKernel, IsABlockWhereFewRowsMayHaveManyParts) {
  const auto by_block = [](int heads, int batch, int tokens, int workers,
                           int fixed_split_tokens = 0, int multiprocessors = 132) {
    Problem problem;
    problem.batch = batch;
    problem.num_heads_q = heads;
    problem.max_pages_per_seq = tokens / kDefaultPageSize;
    problem.fixed_split_tokens = fixed_split_tokens;
    return model::combines_by_block(problem, {.workers = workers, .min_grains = 2},
                                    multiprocessors);
  };
  EXPECT_TRUE(by_block(128, 1, 4096, 66));
  EXPECT_FALSE(by_block(128, 1, 4096, 66, 1024));
  EXPECT_FALSE(by_block(128, 1, 4096, 66, 0, 20));
  EXPECT_TRUE(by_block(128, 2, 4096, 66));   // 32 parts
  EXPECT_FALSE(by_block(128, 2, 512, 66));   // 4
  EXPECT_FALSE(by_block(128, 1, 640, 66));   // 5
  EXPECT_TRUE(by_block(16, 4, 512, 132));    // 4
  EXPECT_FALSE(by_block(128, 3, 4096, 66));  // 22
  EXPECT_TRUE(by_block(16, 8, 8192, 132));   // 16
  EXPECT_FALSE(by_block(16, 16, 4096, 132));
}

TEST(SplitCombineKernel, LeavesRoomForTheBlocksOfAMultiprocessorAndNoMore) {
  const DeviceLimits h200 = {.multiprocessors = 132, .max_shared_bytes = 227 * 1024};
  constexpr size_t kAll = 228 * 1024, kReserved = 1024;  // per multiprocessor; per block
  for (const auto& [grid, blocks] :
       {std::pair{1u, 1u}, {132u, 1u}, {133u, 2u}, {264u, 2u}, {265u, 3u}, {512u, 4u}}) {
    SCOPED_TRACE(grid);
    EXPECT_EQ(model::blocks_each(grid, h200), blocks);
    const size_t bytes = model::spreading_bytes(grid, h200) + kReserved;
    EXPECT_LE(blocks * bytes, kAll);
    EXPECT_GT((blocks + 1) * bytes, kAll);
  }
}

INSTANTIATE_TEST_SUITE_P(Machines, SplitCombine,
                         testing::Values(MachineKind::kModel, MachineKind::kGpu),
                         [](const auto& test) {
                           return std::string(test.param == MachineKind::kModel ? "Model" : "Gpu");
                         });

}  // namespace
}  // namespace mla
