#!/usr/bin/env bash
# A stage's kernel in an ordinary build has the same instructions as the kernel without its calls of timeline.h.
#   timeline_sass_test.sh NVCC CUOBJDUMP FOLDER
set -euo pipefail
nvcc=$1 cuobjdump=$2 folder=$3
cd "$(dirname "$0")/../../.."
if ! command -v "$cuobjdump" > /dev/null; then
  echo "skipped: no cuobjdump, which the CUDA Toolkit has; MLA_CUOBJDUMP names it"
  exit 77
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# instructions FOLDER: prints those of all kernels of the stage in FOLDER
instructions() {
  "$nvcc" -std=c++20 -O3 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -I. -DMLA_STAGE_ENTRY=stage_x \
    -cubin -o "$scratch/stage.cubin" "$1/stage.cu"
  "$cuobjdump" -sass "$scratch/stage.cubin" | grep -E 'Function :|/\*[0-9a-f]{4,}\*/'
}
mkdir "$scratch/without"
cp "$folder"/*.cu* "$scratch/without"
sed -i -z -E 's/timeline::(begin|enter|end)\([^;]*\);/;/g' "$scratch"/without/*.cuh
! cmp -s "$folder/kernel.cuh" "$scratch/without/kernel.cuh" || { echo "FAILED: $folder has no calls of timeline.h"; exit 1; }
instructions "$folder" > "$scratch/with.sass"
instructions "$scratch/without" > "$scratch/without.sass"
[ "$(wc -l < "$scratch/with.sass")" -gt 10 ] || { echo "FAILED: no instructions"; exit 1; }
diff "$scratch/with.sass" "$scratch/without.sass" > "$scratch/difference" || {
  echo "FAILED: the calls of timeline.h leave instructions behind"
  head -20 "$scratch/difference"
  exit 1
}
