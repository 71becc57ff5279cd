#!/usr/bin/env bash
# Compiles the GPU model, the reference and stages 01 to 03 to WebAssembly: docs/demos/model_wasm.js, which is committed, so
# that a reader and CI need no Emscripten. Run it when one of them has changed; tests/docs/demos_test.py says if a kernel
# differs from the one that was compiled.
#
#   bash docs/demos/wasm/model/build.sh [FOLDER]     writes there instead of docs/demos
#
# Needs what docs/demos/wasm/build.sh needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../../.."
out=$(realpath "${1:-docs/demos}")
own=docs/demos/wasm/model
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export NODE_PATH=${NODE_PATH:-/usr/share/nodejs}

mkdir "$work/include"
ln -s /usr/include/fmt /usr/include/eigen3/Eigen /usr/include/nlohmann "$work/include"
flags=(-std=c++20 -Os -DNDEBUG -DFMT_HEADER_ONLY -I$own -I. -isystem "$work/include" -Wno-everything -fno-strict-aliasing)
objects=() texts=()
compile() {  # SOURCE [FLAGS...]
  local object=$work/${1//\//_}.o
  em++ -c "${flags[@]}" "${@:2}" -x c++ "$1" -o "$object"
  objects+=("$object")
}

# Kernels are compiled for the race detector. No driver takes that option for WebAssembly, but the compiler does.
slugs=(01_naive 02_shared_tiled 03_online_softmax)
declarations='' entries=''
for slug in "${slugs[@]}"; do
  em++ -S -emit-llvm -g "${flags[@]}" -include $own/before_kernels.h -ftrivial-auto-var-init=pattern -Xclang -fsanitize=thread \
    -mllvm -tsan-instrument-func-entry-exit=0 -DMLA_STAGE_ENTRY="stage_$slug" -x c++ stages/$slug/stage.cu -o "$work/$slug.ll"
  texts+=("$work/$slug.ll")
  declarations+="namespace mla::model { Stage stage_$slug(); } "
  entries+="add(model::stage_$slug(), \"$slug\"); "
done
python3 $own/places.py "$work/places.cpp" "${texts[@]}"
for slug in "${slugs[@]}"; do
  em++ -c -Os -Wno-everything "$work/$slug.ll" -o "$work/$slug.o"
  objects+=("$work/$slug.o")
done
sed -e "s/@model_declarations@/$declarations/; s/@model_entries@/$entries/; s/@gpu_[a-z]*@//" \
  stages/common/registry.cpp.in > "$work/registry.cpp"

missing=(-include docs/demos/wasm/missing.h)
for source in "$work"/{registry,places}.cpp $own/*.cpp reference/{problem,checks,status,attention,quantise}.cpp \
  reference/testing/{data_generator,compare}.cpp stages/common/stage.cpp stages/common/machine/machine.cpp \
  stages/common/split/*.cpp stages/common/split/make_plan.cu; do
  compile "$source" "${missing[@]}"
done
for source in reference/gpu_model/*.cpp; do
  case $source in
    */fiber.cpp | */source_line.cpp) ;;  # of its own
    */access_hooks.cpp) compile "$source" -include $own/before_hooks.h ;;
    *) compile "$source" "${missing[@]}" -O2 ;;
  esac
done
em++ -Os "${objects[@]}" -o "$work/model.js" -sASYNCIFY -sMODULARIZE -sEXPORT_NAME=gpuModel -sSINGLE_FILE -sENVIRONMENT=web \
  -sALLOW_MEMORY_GROWTH -sEXPORTED_FUNCTIONS=_model_run,_model_result,_model_what -sEXPORTED_RUNTIME_METHODS=UTF8ToString
{
  echo '// The GPU model as WebAssembly, made by docs/demos/wasm/model/build.sh. Not to be edited.'
  echo '// Holds parts of Emscripten and musl (MIT), libc++ (Apache 2.0 with LLVM exceptions), {fmt} (MIT) and Eigen (MPL 2.0).'
  cat "$work/model.js"
  echo "const modelKernels = $(python3 $own/kernels.py "${slugs[@]}");"
} > "$out/model_wasm.js"
echo "$out/model_wasm.js: $(stat -c %s "$out/model_wasm.js") bytes"
