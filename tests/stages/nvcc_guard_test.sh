#!/usr/bin/env bash
# stages/cmake/nvcc_guard.sh: a wgmma that ptxas serialises fails the build, a right one does not, and nothing that the
# compiler says is lost.
#   nvcc_guard_test.sh NVCC
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
nvcc=${1:-}
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
failures=0
fail() { echo "FAILED: $1"; failures=$((failures + 1)); }
guard() { sh stages/cmake/nvcc_guard.sh "$@"; }

# With a pretended compiler: streams stay apart, exit codes stay, and any remark of this kind is an error.
[ "$(guard sh -c 'echo out; echo err >&2' 2> /dev/null)" = out ] || fail "standard output changed"
[ "$(guard sh -c 'echo out; echo err >&2' 2>&1 > /dev/null)" = err ] || fail "standard error changed"
guard sh -c 'exit 3'
[ $? -eq 3 ] || fail "the exit code changed"
: > "$folder/object"
for remark in C7508 C7510 C7519; do
  guard sh -c "echo 'ptxas info : ($remark) Potential Performance Loss' >&2" x -o "$folder/object" 2> /dev/null \
    && fail "$remark was let through"
done
[ ! -e "$folder/object" ] || fail "the object of a failed build was left there"
guard sh -c "echo 'ptxas info : Used 75 registers (C7600) C7510' >&2" 2> /dev/null || fail "a harmless remark was refused"
[ "$failures" -eq 0 ] || exit 1

command -v "${nvcc:-none}" > /dev/null || { echo "skipped from here on: no nvcc"; exit 77; }
# compile TOUCH: a kernel with one wgmma; TOUCH comes where nothing may touch its accumulators
compile() {
  cat > "$folder/kernel.cu" << SOURCE
#include "stages/common/ptx/ptx_sm90.h"
namespace mla::gpu {
__global__ void product(float* out) {
  __shared__ alignas(1024) bfloat16 a[64 * 64], b[64 * 64];
  const ptx::MatrixDescriptor descriptor_a = ptx::matrix_descriptor(a, 0, 1024);
  const ptx::MatrixDescriptor descriptor_b = ptx::matrix_descriptor(b, 0, 1024);
  float d[8][4] = {};
  ptx::wgmma_fence(d);
  ptx::wgmma_m64n64k16<bfloat16>(d, descriptor_a, descriptor_b, true);
  $1
  ptx::wgmma_m64n64k16<bfloat16>(d, descriptor_a, descriptor_b, true);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>(d);
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i / 4][i % 4];
}
}  // namespace mla::gpu
SOURCE
  guard "$nvcc" -std=c++20 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -I. \
    -c "$folder/kernel.cu" -o "$folder/kernel.o"
}
compile "" || fail "a right kernel was refused"
[ -e "$folder/kernel.o" ] || fail "the object of a right kernel is missing"
said=$(compile "d[0][0] += 1;" 2>&1) && fail "a serialised wgmma was let through: $said"
[[ $said == *"(C75"*"nvcc_guard.sh: error"* ]] || fail "not refused for its wgmma: $said"
[ ! -e "$folder/kernel.o" ] || fail "the object of a refused kernel was left there"
[ "$failures" -eq 0 ]
