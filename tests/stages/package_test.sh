#!/usr/bin/env bash
# Installs a build, and builds and runs a program that finds the package and decodes with a stage.
#   package_test.sh BUILD_FOLDER
set -euo pipefail
build=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cmake --install "$build" --prefix "$scratch/installed" > "$scratch/install.log"
cat > "$scratch/CMakeLists.txt" << 'END'
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
find_package(flashmla REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE flashmla::stages flashmla::testing)
END
cat > "$scratch/main.cpp" << 'END'
#include <cstdio>

#include "flashmla/reference/testing/compare.h"
#include "flashmla/reference/testing/data_generator.h"
#include "flashmla/stages/common/stage.h"

int main() {
  mla::DecodeCase spec;
  spec.num_heads_q = 4;
  spec.seqlen_k = 100;
  const mla::DataSet data = mla::make_data_set(spec);
  mla::HostTensors host = mla::generate(data);
  const mla::Stage* stage = mla::find_stage(mla::MachineKind::kModel, "03");
  if (stage == nullptr) return 1;
  const mla::Status status = mla::decode(*stage, data.problem, host.tensors(data));
  if (!status.ok()) {
    std::puts(status.to_string().c_str());
    return 1;
  }
  mla::ReferenceResult expected;
  if (!mla::reference_attention(data.problem, host.tensors(data), &expected).ok()) return 1;
  const auto comparison = mla::compare_decode(data.problem, host.out, host.lse, expected);
  std::puts(comparison.describe().c_str());
  return comparison.ok() ? 0 : 1;
}
END
cmake -S "$scratch" -B "$scratch/build" -G Ninja -DCMAKE_PREFIX_PATH="$scratch/installed" > "$scratch/configure.log" ||
  { cat "$scratch/configure.log"; exit 1; }
cmake --build "$scratch/build" > "$scratch/build.log" || { cat "$scratch/build.log"; exit 1; }
"$scratch/build/consumer"
