#!/usr/bin/env bash
# Installs a build, and builds a wheel that links it: BUILD_FOLDER/tests/wheel, for the other tests.
#   wheel_test.sh BUILD_FOLDER
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" python_wheel "$1"
rm -rf "$wheels"
make_environment build-system
cmake --install "$build" --prefix "$scratch/installed" > "$scratch/log" || { cat "$scratch/log"; exit 1; }
export CMAKE_BUILD_PARALLEL_LEVEL=2
pip wheel --no-build-isolation --no-deps --wheel-dir "$scratch/wheel" \
  -C "cmake.define.flashmla_DIR=$(dirname "$(find "$scratch/installed" -name flashmlaConfig.cmake)")" "$root"
mv "$scratch/wheel" "$wheels"
du -h "$wheels"/*.whl
