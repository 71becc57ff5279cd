#!/usr/bin/env bash
# Installs what is missing, builds everything, and runs the tests.
#
#   bash tests/run.sh                   every test that runs here in minutes (a GPU's too, where there is one)
#   bash tests/run.sh 02                one stage alone, in a minute: builds what it needs, runs its conformance cases
#   bash tests/run.sh 02 03             these stages
#   bash tests/run.sh -R 02_shared      everything is built; arguments go to ctest
#   bash tests/run.sh -L long           the full product of cases on a GPU
#
# --no-install, given first, lists what is missing and ends, instead of installing it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source stages/cmake/setup.sh
if [[ ${1:-} == --no-install ]]; then no_install=yes; shift; fi

programs=() pattern=
while [[ ${1:-} =~ ^[0-9]+$ ]]; do
  ls stages/"$1"_*/stage.c* > /dev/null 2>&1 || { echo "run.sh: there is no stage $1; there are $(echo stages/[0-9]*)" >&2; exit 2; }
  programs+=("conformance_$1")
  pattern+=${pattern:+|}^$1_
  shift
done
if [[ -n $pattern ]]; then
  build "${programs[@]}"
  arguments=(-R "$pattern" -LE long -E 'sass|timeline|mutants' "$@")
else
  build all
  arguments=("$@")
  if [[ $# -eq 0 ]]; then arguments=(-LE long); fi
fi
# Two tests at a time: many use every core themselves, but kernels whose blocks run together use only one.
ctest --test-dir build --output-on-failure --parallel 2 "${arguments[@]}"
