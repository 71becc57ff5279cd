/// @file
/// What suites share whose tests run on each machine.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "reference/gpu_model/gpu_model.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// A test on the machine that its parameter names; it is skipped where there is none. After each test,
/// the model's device and schedule are the default ones again.
class MachineTest : public testing::TestWithParam<MachineKind> {
 protected:
  void SetUp() override {
    std::string why_not;
    machine_ = find_machine(GetParam(), &why_not);
    if (machine_ == nullptr) GTEST_SKIP() << why_not;
  }
  void TearDown() override {
    gpu_model::device() = {};
    gpu_model::schedule() = {};
  }

  Machine* machine_ = nullptr;
};

}  // namespace mla
