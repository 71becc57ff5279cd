// A decode that is captured once in a CUDA graph follows lengths and block table as they are at each
// replay. It must keep no size or plan from the time of the capture.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>

#ifdef MLA_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

#include "reference/testing/compare.h"
#include "reference/testing/device_data.h"
#include "reference/testing/oracle.h"
#include "stages/common/stage.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

#ifdef MLA_HAVE_CUDA

constexpr int kReplays = 20;
constexpr int kLongest = 3000;

// What is in device memory at one replay, and the right result then.
struct State {
  std::vector<int32_t> lengths, table;
  ReferenceResult expected;
};

class Graph : public testing::TestWithParam<std::pair<DType, CacheFormat>> {
 protected:
  void SetUp() override {
    std::string why_not;
    machine_ = gpu_machine(&why_not);
    if (machine_ == nullptr) GTEST_SKIP() << why_not;
    for (const Stage& stage : stages(MachineKind::kGpu)) {
      if (!can_read(stage, GetParam().second)) continue;
      if (const Status fit = check_device(stage, machine_->limits()); fit.ok()) {
        stages_.push_back(&stage);
      } else {
        std::printf("[ SKIPPED  ] %s\n", fit.to_string().c_str());
      }
    }
    if (stages_.empty()) GTEST_SKIP() << "no stage that can run here reads this format";
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    DecodeCase spec;
    spec.dtype = GetParam().first;
    spec.cache_format = GetParam().second;
    spec.seqlen_q = 2;
    spec.num_heads_q = 128;
    spec.causal = true;
    spec.data = DataKind::kNeedles;
    spec.lengths.assign(6, kLongest);  // so that there are tokens for every shorter length
    data_ = make_data_set(spec);
    ASSERT_OK(generate_on_device(*machine_, data_, &tensors_));
    make_states();
  }
  void TearDown() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  // Every replay has other lengths, and other sequences' pages. Among them are a replay in which all
  // sequences are empty, and next to it one in which all are longest.
  void make_states() {
    const auto batch = static_cast<size_t>(data_.problem.batch);
    const auto columns = static_cast<size_t>(data_.problem.max_pages_per_seq);
    std::mt19937_64 random(9);
    std::vector<size_t> rows(batch);
    std::iota(rows.begin(), rows.end(), size_t{0});
    for (int i = 0; i < kReplays; ++i) {
      State state;
      std::shuffle(rows.begin(), rows.end(), random);
      for (const size_t row : rows) {
        int32_t length = static_cast<int32_t>(random() % (kLongest + 1));
        if (random() % 4 == 0) length = static_cast<int32_t>(random() % 66);
        if (i == 7) length = 0;
        if (i == 6 || i == 8) length = kLongest;
        state.lengths.push_back(length);
        const auto begin = data_.block_table.begin() + static_cast<std::ptrdiff_t>(row * columns);
        state.table.insert(state.table.end(), begin, begin + static_cast<std::ptrdiff_t>(columns));
        std::fill(state.table.end() - static_cast<std::ptrdiff_t>(columns) +
                      static_cast<std::ptrdiff_t>(pages_for(length, kDefaultPageSize)),
                  state.table.end(), kGarbagePage);
      }
      upload(state);
      const Status status =
          oracle_decode(*machine_, data_.problem, tensors_.tensors(), &state.expected);
      ASSERT_OK(status);
      states_.push_back(std::move(state));
    }
  }

  // In place: the graph holds the addresses.
  void upload(const State& state) {
    ASSERT_OK(machine_->copy_to_device(tensors_.seqlens_k.data(), state.lengths.data(),
                                       tensors_.seqlens_k.bytes(), stream_));
    ASSERT_OK(machine_->copy_to_device(tensors_.block_table.data(), state.table.data(),
                                       tensors_.block_table.bytes(), stream_));
  }

  template <typename Enqueue>
  void expect_right_replays(const Stage& stage, Enqueue&& enqueue) {
    upload(states_[0]);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), cudaSuccess);
    const Status captured = enqueue();
    ASSERT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
    ASSERT_OK(captured);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    // The first round is compared with the truth, and all others with the first, to the bit: a thousand
    // replays in all. A combine that started before the parts were there would be wrong now and then.
    constexpr size_t kRounds = 1000;
    std::vector<std::vector<uint16_t>> first_out(states_.size());
    std::vector<std::vector<float>> first_lse(states_.size());
    for (size_t replay = 0; replay < kRounds; ++replay) {
      const size_t i = replay % states_.size();
      SCOPED_TRACE(stage.slug + ", replay " + std::to_string(replay));
      upload(states_[i]);
      ASSERT_OK(machine_->fill(tensors_.out.data(), 0xff, tensors_.out.bytes(), stream_));
      ASSERT_OK(machine_->fill(tensors_.lse.data(), 0xff, tensors_.lse.bytes(), stream_));
      ASSERT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
      std::vector<uint16_t> out(tensors_.out.bytes() / 2);
      std::vector<float> lse(tensors_.lse.bytes() / 4);
      ASSERT_OK(machine_->copy_to_host(out.data(), tensors_.out.data(), tensors_.out.bytes()));
      ASSERT_OK(machine_->copy_to_host(lse.data(), tensors_.lse.data(), tensors_.lse.bytes()));
      if (replay == i) {
        const DecodeComparison comparison =
            compare_decode(data_.problem, out, lse, states_[i].expected);
        EXPECT_OK(comparison);
        first_out[i] = std::move(out);
        first_lse[i] = std::move(lse);
      } else {
        ASSERT_EQ(out, first_out[i]);
        ASSERT_EQ(lse, first_lse[i]);
      }
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }

  // Captures `enqueue(stage, problem, tensors, workspace, stream)` for every stage.
  template <typename Enqueue>
  void expect_right_replays_of_all(Enqueue&& enqueue) {
    for (const Stage* each : stages_) {
      const Stage& stage = *each;
      for (const int fixed_split_tokens : {0, 256}) {
        Problem problem = data_.problem;
        problem.fixed_split_tokens = fixed_split_tokens;
        WorkspaceBytes needs;
        ASSERT_OK(workspace_bytes(stage, problem, &needs));
        DeviceBuffer workspace;
        ASSERT_OK(workspace.allocate(*machine_, std::max<size_t>(16, needs.total())));
        ASSERT_OK(machine_->fill(workspace.data(), 0xff, workspace.bytes()));
        ASSERT_OK(machine_->synchronize());
        expect_right_replays(stage, [&] {
          return enqueue(stage, problem, tensors_.tensors(), {workspace.data(), needs.total()},
                         stream_);
        });
        if (HasFatalFailure()) return;
      }
    }
  }

  Machine* machine_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::vector<const Stage*> stages_;  // that can run, and read this format
  DataSet data_;
  DeviceTensors tensors_;
  std::vector<State> states_;
};

TEST_P(Graph, DecodeFollowsLengthsAndTable) {
  expect_right_replays_of_all(decode);
}

TEST_P(Graph, PlanAndPlannedDecodeFollowThem) {
  expect_right_replays_of_all([](const Stage& stage, const Problem& problem, const Tensors& tensors,
                                 const Workspace& workspace, Stream stream) -> Status {
    WorkspaceBytes needs;
    MLA_RETURN_IF_ERROR(workspace_bytes(stage, problem, &needs));
    const Workspace plan = needs.plan_in(workspace);
    MLA_RETURN_IF_ERROR(plan_decode(stage, problem, tensors.seqlens_k, plan, stream));
    return decode_planned(stage, problem, tensors, plan, needs.scratch_in(workspace), stream);
  });
}

INSTANTIATE_TEST_SUITE_P(Types, Graph,
                         testing::Values(std::pair(DType::kBFloat16, CacheFormat::k16Bit),
                                         std::pair(DType::kFloat16, CacheFormat::k16Bit),
                                         std::pair(DType::kBFloat16, CacheFormat::kFp8Tile128),
                                         std::pair(DType::kBFloat16, CacheFormat::kFp8Tensor),
                                         std::pair(DType::kFloat16, CacheFormat::kFp8Tensor),
                                         std::pair(DType::kBFloat16, CacheFormat::kInt8Tile128)),
                         [](const auto& test) {
                           const CacheFormat format = test.param.second;
                           return to_string(test.param.first) +
                                  (is_quantised(format) ? std::string("_") + to_string(format)
                                                        : std::string());
                         });

#else

TEST(Graph, DecodeFollowsLengthsAndTable) {
  GTEST_SKIP() << "no GPU code: built without the CUDA Toolkit (12.8 or newer)";
}

#endif

}  // namespace
}  // namespace mla
