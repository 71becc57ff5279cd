#!/usr/bin/env bash
# Installs a build, then builds and runs programs that find the package: one that decodes with a stage on the model, one
# that includes every public header and, where the build is for GPUs, one for GPUs alone.
#   package_test.sh BUILD_FOLDER ON|OFF    ON: the build is for GPUs
set -euo pipefail
build=$1 cuda=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

fail() { echo "package_test: $*" >&2; exit 1; }

# Configures the consumer in $scratch/NAME; its output is in $scratch/NAME/log.
configure() {
  cmake -S "$scratch/$1" -B "$scratch/$1/build" -G Ninja -DCMAKE_PREFIX_PATH="$scratch/installed" "${@:2}" > "$scratch/$1/log" 2>&1
}

# Configures, builds and runs it.
run() {
  configure "$@" && cmake --build "$scratch/$1/build" >> "$scratch/$1/log" 2>&1 ||
    { cat "$scratch/$1/log"; fail "$1 was not built"; }
  "$scratch/$1/build/consumer" || fail "$1 failed"
}

cmake --install "$build" --prefix "$scratch/installed" > "$scratch/install.log"

# A project that uses the whole package. A second source includes every installed header, and each must find all that it
# includes.
mkdir "$scratch/whole"
cat > "$scratch/whole/CMakeLists.txt" << 'END'
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
find_package(flashmla REQUIRED)
add_executable(consumer main.cpp headers.cpp)
target_link_libraries(consumer PRIVATE flashmla::stages flashmla::testing flashmla::layers)
END
cat > "$scratch/whole/main.cpp" << 'END'
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
(cd "$scratch/installed/include" && find flashmla -name '*.h' -printf '#include "%p"\n' | sort) > "$scratch/whole/headers.cpp"
for header in flashmla.h reference/problem.h reference/testing/compare.h; do
  grep -q "\"flashmla/$header\"" "$scratch/whole/headers.cpp" || fail "$header is not installed"
done
if grep -E 'ptx|piece_cursor|split_items|launch|gpu_model/(fiber|memory|simt)' "$scratch/whole/headers.cpp"; then
  fail "these headers are not public"
fi
run whole

# Makes the consumer $scratch/NAME, which asks for COMPONENT and links flashmla::TARGET: consumer NAME COMPONENT TARGET,
# with its program on standard input.
consumer() {
  mkdir "$scratch/$1"
  cat > "$scratch/$1/CMakeLists.txt" << END
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
find_package(flashmla REQUIRED COMPONENTS $2)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE flashmla::$3)
END
  cat > "$scratch/$1/main.cpp"
}

# If a component does not exist, the message names it, the reason, and the components that exist.
consumer missing tensors tensors < /dev/null
if configure missing; then fail "the component tensors was found"; fi
tr -s ' \n' ' ' < "$scratch/missing/log" | grep -q 'flashmla has no component tensors; it has .*model, reference, layers' ||
  { cat "$scratch/missing/log"; fail "a component that is not there is not named"; }

# The one header for callers.
consumer umbrella model stages << 'END'
#include "flashmla/flashmla.h"
int main() {
  std::string why_not;
  mla::PageTable table;
  if (!mla::PageTable::create(4, mla::kDefaultPageSize, &table).ok()) return 1;
  return mla::find_stage(mla::MachineKind::kModel, "03", &why_not) == nullptr;
}
END
run umbrella

# A program for GPUs alone. Without a GPU it starts, too, and says that there is none.
consumer gpu gpu gpu << 'END'
#include <cstdio>

#include "flashmla/flashmla.h"

int main() {
  mla::Problem problem;
  problem.batch = problem.num_pages = problem.max_pages_per_seq = 1;
  problem.num_heads_q = 16;
  problem.softmax_scale = 0.1f;
  std::string why_not;
  if (mla::find_machine(mla::MachineKind::kModel, &why_not) != nullptr) return 1;
  if (why_not.find("no GPU model") != 0) return 2;
  if (!mla::stages(mla::MachineKind::kModel).empty()) return 3;
  why_not.clear();
  if (mla::find_stage(mla::MachineKind::kModel, "03", &why_not) != nullptr) return 4;
  if (why_not.find("no GPU model") != 0) return 5;
  if (mla::find_stage(mla::MachineKind::kGpu, "03", &why_not) == nullptr) return 6;

  mla::Machine* const gpu = mla::gpu_machine(&why_not);
  std::puts(gpu == nullptr ? why_not.c_str() : gpu->description().c_str());
  for (const mla::Stage& stage : mla::stages(mla::MachineKind::kGpu)) {
    mla::WorkspaceBytes bytes;
    const mla::Status status = mla::workspace_bytes(stage, problem, &bytes);
    std::printf("%s: %s, %zu bytes\n", stage.slug.c_str(),
                status.ok() ? "ok" : status.to_string().c_str(), bytes.total());
    const mla::StatusCode code = status.code();
    // A stage that cannot do the problem says so whatever there is; the others need a GPU.
    if (code == mla::StatusCode::kUnsupported) continue;
    if (code != (gpu == nullptr ? mla::StatusCode::kUnavailable : mla::StatusCode::kOk)) return 7;
  }
  if (gpu == nullptr) return 0;
  std::unique_ptr<mla::PagedCache> cache;
  if (!mla::PagedCache::create(*gpu, {.num_pages = 1}, &cache).ok()) return 8;
  // No pointer is followed: null is refused before.
  return mla::check_paging(*gpu, problem, nullptr, nullptr).ok();
}
END
if [[ $cuda == ON ]]; then
  run gpu -DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON -DCMAKE_DISABLE_FIND_PACKAGE_Boost=ON
  if ninja -C "$scratch/gpu/build" -t commands | grep -iE 'eigen|boost|gpu_model'; then
    fail "the program for GPUs alone is built with the names above"
  fi
  if nm -C "$scratch/gpu/build/consumer" | grep -iE 'eigen|boost|gpu_model|mla::model'; then
    fail "the program for GPUs alone contains the names above"
  fi
else
  if configure gpu; then fail "the component gpu was found in a build without CUDA"; fi
  tr -s ' \n' ' ' < "$scratch/gpu/log" | grep -q 'no component gpu: the CUDA Toolkit was off or not found (MLA_CUDA); it has' ||
    { cat "$scratch/gpu/log"; fail "the message does not say why there is no component gpu"; }
fi
