#!/usr/bin/env bash
# Runs the notebooks with the wheel and the programs of a build: every cell succeeds and prints the text that is stored.
#   notebooks_test.sh BUILD_FOLDER
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../stages/python/environment.sh" notebooks_test "$1"
make_environment notebooks
install_wheel
MLA_BUILD=$build PYTHONPYCACHEPREFIX=$scratch/bytecode IPYTHONDIR=$scratch MPLCONFIGDIR=$scratch JUPYTER_RUNTIME_DIR=$scratch/runtime \
  "$scratch/venv/bin/python" "$root/docs/notebooks/run.py"
