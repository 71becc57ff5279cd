#!/usr/bin/env bash
# Installs the wheel into a fresh environment and runs the suite of this folder there. PyTorch is too large to install for
# this, so its tests are skipped.
#   python_test.sh BUILD_FOLDER
set -euo pipefail
tests=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
source "$tests/environment.sh" python_test "$1"
make_environment test
install_wheel

# From a folder without sources, so that the installed package is tested.
python=$scratch/venv/bin/python
cp "$root/pyproject.toml" "$scratch"
cd "$scratch"
"$python" -c 'import mla_stages, sys; sys.exit(not mla_stages.__file__.startswith(sys.prefix))'
"$python" -m mypy
export MLA_PROFILE=$build/bench/mla_profile  # if this build has one
"$python" -m pytest -q -rs -p no:cacheprovider --rootdir "$tests" "$tests"
