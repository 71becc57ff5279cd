#!/usr/bin/env bash
# Compiles the cost model to WebAssembly: docs/demos/limits_wasm.js, which is committed, so that a reader and CI need no
# Emscripten. Run it when a stage's prediction or mla_run explain has changed; tests/docs/demos_test.py says if it was
# forgotten.
#
#   bash docs/demos/wasm/build.sh [FOLDER]     writes there instead of docs/demos
#
# Needs Emscripten (Debian: apt-get install emscripten) and the headers of fmt and Eigen.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
out=$(realpath "${1:-docs/demos}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export NODE_PATH=${NODE_PATH:-/usr/share/nodejs}  # Debian's acorn, for whatever node there is

# Only these of the system's headers: the others belong to another machine.
mkdir "$work/include"
ln -s /usr/include/fmt /usr/include/eigen3/Eigen "$work/include"
flags=(-std=c++20 -Os -DNDEBUG -DFMT_HEADER_ONLY -Idocs/demos/wasm -I. -isystem "$work/include" -include docs/demos/wasm/missing.h -fno-exceptions -Wno-everything)

shopt -s nullglob
declarations='' entries='' objects=()
compile() {  # SOURCE NAME FLAGS...
  em++ -c "${flags[@]}" "${@:3}" -x c++ "$1" -o "$work/$2.o"
  objects+=("$work/$2.o")
}
for folder in stages/[0-9][0-9]_*/; do
  slug=$(basename "$folder")
  [[ -e $folder/stage.cu ]] || continue
  compile "$folder/stage.cu" "$slug" -DMLA_STAGE_ENTRY="stage_$slug"
  declarations+="namespace mla::model { Stage stage_$slug(); } "
  entries+="add(model::stage_$slug(), \"$slug\"); "
done
sed -e "s/@model_declarations@/$declarations/; s/@model_entries@/$entries/; s/@gpu_[a-z]*@//" \
  stages/common/registry.cpp.in > "$work/registry.cpp"
compile "$work/registry.cpp" registry
for source in docs/demos/wasm/{limits_page,no_kernels}.cpp bench/explain/{estimate,explain,facts}.cpp bench/measure/{limits,statistics,table}.cpp \
  stages/common/stage.cpp stages/common/split/*.cpp reference/{problem,checks,status}.cpp; do
  compile "$source" "$(basename "$source" .cpp)_$(basename "$(dirname "$source")")"
done
em++ -Os "${objects[@]}" -o "$work/limits.wasm" --no-entry -sSTANDALONE_WASM -sALLOW_MEMORY_GROWTH \
  -sEXPORTED_FUNCTIONS=_limits_names,_limits_slugs,_limits_time,_limits_explain
{
  echo '// The cost model as WebAssembly, made by docs/demos/wasm/build.sh. Not to be edited.'
  echo '// Holds parts of Emscripten and musl (MIT), libc++ (Apache 2.0 with LLVM exceptions), {fmt} (MIT).'
  echo "const limitsWasm = \"$(base64 -w 0 "$work/limits.wasm")\";"
} > "$out/limits_wasm.js"
echo "$out/limits_wasm.js: $(stat -c %s "$out/limits_wasm.js") bytes"
