// With Problem::fixed_split_tokens, every stage gives a sequence the same bits whatever else is in the
// batch: alone and among others, at another place, with a narrower block table. Without it, stages that
// plan over the whole batch must differ, or this test would prove nothing.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/device_data.h"
#include "stages/common/stage.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

constexpr int kSequences = 128;

// One sequence's results.
struct Result {
  std::vector<uint16_t> out;
  std::vector<float> lse;
  bool operator==(const Result& other) const {
    return out == other.out &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

class BatchInvariance : public testing::TestWithParam<std::tuple<MachineKind, DType, CacheFormat>> {
 protected:
  void SetUp() override {
    std::string why_not;
    on_gpu_ = std::get<0>(GetParam()) == MachineKind::kGpu;
    machine_ = on_gpu_ ? gpu_machine(&why_not) : &model_machine();
    if (machine_ == nullptr) GTEST_SKIP() << why_not;
    std::vector<Stage> each = stages(std::get<0>(GetParam()));
    each.push_back(*find_stage(std::get<0>(GetParam()), "auto"));
    for (Stage& stage : each) {
      const bool fits = check_device(stage, machine_->limits()).ok();
      if (fits && can_read(stage, std::get<2>(GetParam()))) stages_.push_back(std::move(stage));
    }
    if (stages_.empty()) GTEST_SKIP() << "no stage reads this format here";
    gpu_model::device().multiprocessors = 4;  // so that workers have several pieces

    std::mt19937_64 random(5);
    DecodeCase spec;
    spec.dtype = std::get<1>(GetParam());
    spec.cache_format = std::get<2>(GetParam());
    spec.seqlen_q = 2;
    spec.num_heads_q = on_gpu_ ? 128 : 2;
    spec.causal = true;
    spec.data = DataKind::kNeedles;
    for (int i = 0; i < kSequences; ++i) {
      // Mostly short, some long ones that are split, some empty, some at the edges of pages.
      int length = static_cast<int>(random() % (on_gpu_ ? 3000 : 40));
      if (i % 16 == 3) length = on_gpu_ ? 20000 - 37 * i : 520 - i;
      if (i == 3 && !on_gpu_) length = 1400;  // so many parts that another order of sums shows
      if (i % 16 == 7) length = 0;
      if (i % 16 == 11) length = 127 + i / 16 % 3;
      spec.lengths.push_back(length);
    }
    data_ = make_data_set(spec);
    data_.problem.fixed_split_tokens = on_gpu_ ? 1024 : 128;
    ASSERT_OK(generate_on_device(*machine_, data_, &tensors_));
    q_.resize(tensors_.q.bytes());
    ASSERT_OK(machine_->copy_to_host(q_.data(), tensors_.q.data(), q_.size()));

    whole_.resize(kSequences);
    std::iota(whole_.begin(), whole_.end(), 0);
    std::vector<int> shuffled = whole_;
    std::shuffle(shuffled.begin(), shuffled.end(), random);
    // The long sequences (3, 19, ...) and some others are alone. Then most sequences come in batches of
    // 17, and a long one comes beside another, which on the model takes time.
    for (const int alone : {3, 7, 11, 19, 27, 43, 51, 100}) batches_.push_back({alone});
    const auto deal = [&](size_t size, size_t batches) {
      for (size_t begin = 0; begin + size <= shuffled.size() && batches > 0; begin += size) {
        batches_.emplace_back(shuffled.begin() + static_cast<std::ptrdiff_t>(begin),
                              shuffled.begin() + static_cast<std::ptrdiff_t>(begin + size));
        --batches;
      }
    };
    deal(17, 7);
    for (int i = 0; i < (on_gpu_ ? 64 : 6); ++i) {
      batches_.push_back({16 * (i % 8) + 3, shuffled[static_cast<size_t>(i)]});
    }
    batches_.push_back(shuffled);  // all of them in another order
  }
  void TearDown() override {
    gpu_model::device() = {};
    gpu_model::schedule() = {};
  }

  // Decodes a batch of these sequences of the data set.
  void decode_some(const Stage& stage, const std::vector<int>& sequences,
                   std::vector<Result>* results) {
    Problem problem = data_.problem;
    problem.batch = static_cast<int>(sequences.size());
    const size_t q_bytes = q_.size() / kSequences;
    std::vector<unsigned char> q;
    std::vector<int32_t> table, lengths;
    for (const int i : sequences) lengths.push_back(data_.seqlens_k[static_cast<size_t>(i)]);
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    problem.max_pages_per_seq =
        static_cast<int>(std::max<int64_t>(1, pages_for(longest, kDefaultPageSize)));
    for (const int i : sequences) {
      const auto row = data_.block_table.begin() + int64_t{i} * data_.problem.max_pages_per_seq;
      table.insert(table.end(), row, row + problem.max_pages_per_seq);
      const auto q_row = q_.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(i) * q_bytes);
      q.insert(q.end(), q_row, q_row + static_cast<std::ptrdiff_t>(q_bytes));
    }
    DeviceTensors tensors;
    DeviceBuffer workspace;
    ASSERT_OK(tensors.q.assign(*machine_, q.data(), q.size()));
    ASSERT_OK(tensors.block_table.assign(*machine_, table.data(), table.size() * 4));
    ASSERT_OK(tensors.seqlens_k.assign(*machine_, lengths.data(), lengths.size() * 4));
    ASSERT_OK(tensors.out.allocate(*machine_, static_cast<size_t>(problem.out_elements()) * 2));
    ASSERT_OK(tensors.lse.allocate(*machine_, static_cast<size_t>(problem.lse_elements()) * 4));
    ASSERT_OK(tensors.poison_outputs(*machine_));
    ASSERT_OK(allocate_workspace(stage, problem, &workspace));
    Tensors pointers = tensors.tensors();
    pointers.kv_cache = tensors_.kv_cache.data();
    const Status status = decode(stage, problem, pointers, workspace);
    ASSERT_OK(status);
    ASSERT_OK(machine_->synchronize());

    std::vector<uint16_t> out(tensors.out.bytes() / 2);
    std::vector<float> lse(tensors.lse.bytes() / 4);
    ASSERT_OK(machine_->copy_to_host(out.data(), tensors.out.data(), tensors.out.bytes()));
    ASSERT_OK(machine_->copy_to_host(lse.data(), tensors.lse.data(), tensors.lse.bytes()));
    results->resize(sequences.size());
    const size_t out_length = out.size() / sequences.size();
    const size_t lse_length = lse.size() / sequences.size();
    for (size_t i = 0; i < sequences.size(); ++i) {
      (*results)[i].out.assign(&out[i * out_length], &out[i * out_length] + out_length);
      (*results)[i].lse.assign(&lse[i * lse_length], &lse[i * lse_length] + lse_length);
    }
  }

  // Counts the results in sub-batches that differ from those of the same sequences in the whole batch.
  // Stops after the batch with which there are `enough`.
  void count_differences(const Stage& stage, int enough, int* differences) {
    *differences = 0;
    std::vector<Result> expected, results;
    decode_some(stage, whole_, &expected);
    for (size_t b = 0; b < batches_.size() && *differences < enough && !HasFatalFailure(); ++b) {
      gpu_model::schedule().seed = b % 3;
      decode_some(stage, batches_[b], &results);
      for (size_t i = 0; i < results.size(); ++i) {
        *differences += !(results[i] == expected[static_cast<size_t>(batches_[b][i])]);
      }
    }
  }

  bool on_gpu_ = false;
  Machine* machine_ = nullptr;
  std::vector<Stage> stages_;  // that can run, and read this format; "auto" too
  DataSet data_;
  DeviceTensors tensors_;
  std::vector<unsigned char> q_;
  std::vector<int> whole_;
  std::vector<std::vector<int>> batches_;
};

TEST_P(BatchInvariance, FixedSplitsGiveTheSameBitsInAnyBatch) {
  int planned = 0;
  for (const Stage& stage : stages_) {
    SCOPED_TRACE(stage.slug);
    int differences = 0;
    count_differences(stage, kSequences, &differences);
    if (HasFatalFailure()) return;
    EXPECT_EQ(differences, 0);
    planned += stage.plan_shape != nullptr;
  }
  if (!is_quantised(data_.problem.cache_format)) {
    EXPECT_GT(planned, 0);
  }
}

// The counter-check: a stage with a plan cuts by the whole batch, and the bits show it.
TEST_P(BatchInvariance, WithoutFixedSplitsBitsDependOnTheBatch) {
  data_.problem.fixed_split_tokens = 0;
  for (const Stage& stage : stages_) {
    if (stage.plan_shape == nullptr || stage.slug == "auto") continue;
    SCOPED_TRACE(stage.slug);
    int differences = 0;
    count_differences(stage, /*enough=*/1, &differences);
    if (HasFatalFailure()) return;
    EXPECT_GT(differences, 0);
  }
}

std::string name_of(
    const testing::TestParamInfo<std::tuple<MachineKind, DType, CacheFormat>>& test) {
  const auto [machine, dtype, format] = test.param;
  return std::string(machine == MachineKind::kModel ? "Model_" : "Gpu_") + to_string(dtype) +
         (is_quantised(format) ? std::string("_") + to_string(format) : "");
}

INSTANTIATE_TEST_SUITE_P(Machines, BatchInvariance,
                         testing::Combine(testing::Values(MachineKind::kModel, MachineKind::kGpu),
                                          testing::Values(DType::kBFloat16, DType::kFloat16),
                                          testing::Values(CacheFormat::k16Bit,
                                                          CacheFormat::kFp8Tensor)),
                         name_of);
INSTANTIATE_TEST_SUITE_P(MachinesOfTiles, BatchInvariance,
                         testing::Combine(testing::Values(MachineKind::kModel, MachineKind::kGpu),
                                          testing::Values(DType::kBFloat16),
                                          testing::Values(CacheFormat::kFp8Tile128,
                                                          CacheFormat::kInt8Tile128)),
                         name_of);

}  // namespace
}  // namespace mla
