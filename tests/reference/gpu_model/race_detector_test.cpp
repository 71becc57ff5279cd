// The race detector: each small kernel with a race is rejected in one run under the friendly schedule. Each
// kernel without one is rejected under no schedule.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "reference/gpu_model/ptx.h"
#include "reference/testing/race_faults.h"
#include "tests/reference/gpu_model/gpu_model_fixture.h"

namespace gpu_model_test {
namespace {

class RaceDetection : public GpuModel {
 protected:
  void SetUp() override {
    GpuModel::SetUp();
    if (!gpu_model::kernels_are_instrumented())
      GTEST_SKIP() << "kernels are not compiled for the race detector";
  }
};

TEST_F(RaceDetection, FindsEveryTextbookRaceInOneFriendlyRun) {
  for (const mla::RaceFault& fault : mla::race_faults(mla::MachineKind::kModel)) {
    gpu_model::schedule() = {};
    const mla::Status status = mla::run_race_fault(mla::model_machine(), fault, false);
    EXPECT_EQ(status.code(), mla::StatusCode::kKernelRejected) << fault.name;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule().seed = seed;
      EXPECT_EQ(mla::run_race_fault(mla::model_machine(), fault, true).to_string(), "ok")
          << fault.name << ", seed " << seed;
    }
  }
}

/// Accesses to different bytes of one word are no race; accesses to the same byte are.
template <typename T, bool kSame>
__global__ void neighbours(unsigned* out) {
  T* values = static_cast<T*>(gpu_model::dynamic_shared_memory(256));
  values[kSame ? threadIdx.x / 2 : threadIdx.x] = static_cast<T>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = static_cast<unsigned>(values[31 - threadIdx.x]);
}

TEST_F(RaceDetection, KnowsBytes) {
  GlobalArray<unsigned> out(32);
  EXPECT_EQ(error_of(1, 32, 256, [&] { neighbours<uint8_t, false>(out.data()); }), "");
  EXPECT_EQ(error_of(1, 32, 256, [&] { neighbours<uint16_t, false>(out.data()); }), "");
  expect_rejected("race: write of 1 bytes", 1, 32, 256,
                  [&] { neighbours<uint8_t, true>(out.data()); });
  expect_rejected("race: write of 2 bytes", 1, 32, 256,
                  [&] { neighbours<uint16_t, true>(out.data()); });
}

TEST_F(RaceDetection, NamesBothPlacesAndWhatIsMissing) {
  GlobalArray<int> out(1);
  const int line = __LINE__;
  const auto kernel = [&] {
    auto* values = static_cast<int*>(gpu_model::dynamic_shared_memory(256));
    if (threadIdx.x == 3) values[0] = 1;
    if (threadIdx.x == 40) out[0] = values[0];
  };
  const std::string message = error_of(1, 64, 256, kernel);
  expect_contains(message, "race: read of 4 bytes at " + at(line + 4));
  expect_contains(message, " after write at " + at(line + 3) + " by thread (3,0,0): ");
  expect_contains(message, "no barrier between them, block (0,0,0), thread (40,0,0)");
}

/// A grid that may begin early must wait for the one ahead.
TEST_F(RaceDetection, AGridMayBeginBeforeTheOneAheadEnds) {
  GlobalArray<unsigned> values(32), out(32);
  const auto write = [&] { values[threadIdx.x] = threadIdx.x; };
  const auto read = [&](bool waits) {
    return [&, waits] {
      if (waits) gpu_model::ptx::griddepcontrol_wait();
      out[threadIdx.x] = values[31 - threadIdx.x];
    };
  };
  gpu_model::launch(1, 32, 0, write);
  EXPECT_NO_THROW(gpu_model::launch(1, 32, 0, read(false)));
  gpu_model::launch(1, 32, 0, write);
  gpu_model::launch(1, 32, 0, read(true), {.dependent = true});
  gpu_model::launch(1, 32, 0, write);
  try {
    gpu_model::launch(1, 32, 0, read(false), {.dependent = true});
    ADD_FAILURE() << "not rejected";
  } catch (const gpu_model::KernelError& error) {
    expect_contains(error.what(), "by an earlier grid: no griddepcontrol_wait came before");
  }
}

/// Reads of global memory by more blocks than are remembered are no race.
TEST_F(RaceDetection, ManyBlocksMayRead) {
  GlobalArray<unsigned> in(32), out(32 * 64);
  in.fill(1);
  EXPECT_EQ(error_of(64, 32, 0, [&] { out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x]; }), "");
  expect_rejected("by one of many blocks: nothing released there is acquired here", 64, 32, 0, [&] {
    out[blockIdx.x * 32 + threadIdx.x] = in[0];
    if (blockIdx.x == 63 && threadIdx.x == 0) in[0] = 2;
  });
}

// The detector itself uses atomics of the host to count references. These may be the kernels'
// instrumented ones; they must not count as accesses of a kernel.
TEST_F(RaceDetection, AtomicsInTheHostsMemoryOrderNothing) {
  GlobalArray<unsigned> values(1), out(1), flag(1);
  unsigned flag_of_host = 0;
  for (const bool right : {true, false}) {
    flag[0] = 0;
    unsigned* released = right ? &flag[0] : &flag_of_host;
    const auto kernel = [&] {
      if (threadIdx.x == 0) {
        values[0] = 1;
        gpu_model::ptx::st_release(released, 1);
      } else if (threadIdx.x == 32) {
        gpu_model::ptx::wait_until_at_least(released, 1);
        out[0] = values[0];
      }
    };
    if (right) {
      EXPECT_EQ(error_of(1, 64, 0, kernel), "");
    } else {
      expect_rejected("race: read of 4 bytes", 1, 64, 0, kernel);
    }
  }
}

TEST_F(RaceDetection, IsOffWhereItIsNotWanted) {
  gpu_model::schedule().detect_races = false;
  GlobalArray<unsigned> out(1);
  EXPECT_NO_THROW(gpu_model::launch(1, 64, 0, [&] { out[0] = threadIdx.x; }));
}

}  // namespace
}  // namespace gpu_model_test
