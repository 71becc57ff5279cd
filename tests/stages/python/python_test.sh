#!/usr/bin/env bash
# Installs a build, builds a wheel that links it, installs that into a fresh environment and runs the suite of this folder
# there. PyTorch is too large to be installed for that; its tests are skipped.
#   python_test.sh BUILD_FOLDER
set -euo pipefail
build=$(realpath "$1")
tests=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
root=$(realpath "$tests/../../..")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

skip() { echo "python_test: skipped: $*"; exit 77; }

python3 -c 'import ensurepip' 2> /dev/null || skip "python3 cannot make an environment (python3-venv)"
python3 -m venv "$scratch/venv"
python=$scratch/venv/bin/python
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }

# What the wheel is built with, and what the suite needs, as pyproject.toml says.
mapfile -t needed < <("$python" - "$root/pyproject.toml" << 'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)
print(*project["build-system"]["requires"], *project["project"]["optional-dependencies"]["test"], sep="\n")
END
)
pip install "${needed[@]}" 2> "$scratch/log" || { cat "$scratch/log"; skip "pip finds no index with ${needed[*]}"; }

cmake --install "$build" --prefix "$scratch/installed" > "$scratch/log" || { cat "$scratch/log"; exit 1; }
export CMAKE_BUILD_PARALLEL_LEVEL=2
pip wheel --no-build-isolation --no-deps --wheel-dir "$scratch/wheel" \
  -C "cmake.define.flashmla_DIR=$(dirname "$(find "$scratch/installed" -name flashmlaConfig.cmake)")" "$root"
du -h "$scratch"/wheel/*.whl
pip install --no-index --no-deps "$scratch"/wheel/*.whl

# From a folder without sources: what is installed is what is tested.
cp "$root/pyproject.toml" "$scratch"
cd "$scratch"
"$python" -c 'import mla_stages, sys; sys.exit(not mla_stages.__file__.startswith(sys.prefix))'
"$python" -m mypy
"$python" -m pytest -q -rs -p no:cacheprovider --rootdir "$tests" "$tests"
