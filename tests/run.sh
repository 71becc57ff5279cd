#!/usr/bin/env bash
# Installs what is missing, builds everything, runs the tests.
#
#   bash tests/run.sh                   every test that runs here in minutes (a GPU's too, where there is one)
#   bash tests/run.sh -R 02_shared      one stage's tests; arguments go to ctest
#   bash tests/run.sh -L long           the full product of cases on a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source stages/cmake/setup.sh
build all

arguments=("$@")
if [[ $# -eq 0 ]]; then arguments=(-LE long); fi
# One test at a time: the stages' tests and the reference use every core themselves.
ctest --test-dir build --output-on-failure "${arguments[@]}"
