#!/usr/bin/env bash
# The main job: decodes the same paged batches with every stage, checked, in one table a shape.
#
#   bash bench/run.sh                              on a GPU: the shapes of suite main (minutes)
#                                                  without: a small batch on the CPU model of a GPU, then recorded results
#   bash bench/run.sh --out results.json           where to write the results (default: bench/results/<gpu>_<date>.json)
#   bash bench/run.sh --stages 02,03 --shapes ...  everything else goes to mla_bench, see build/bench/mla_bench --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tests/setup.sh
build mla_bench mla_run
bench=build/bench/mla_bench

out=
arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --out) out=${2:?--out needs a file name}; shift 2 ;;
    --out=*) out=${1#--out=}; shift ;;
    --help|-h) sed -n '2,8s/^# \{0,1\}//p' bench/run.sh; exec "$bench" --help ;;
    *) arguments+=("$1"); shift ;;
  esac
done

if gpu=$("$bench" --print-gpu); then
  out=${out:-bench/results/${gpu}_$(date -u +%Y-%m-%d).json}
  "$bench" --out "$out" "${arguments[@]}"
  echo
  python3 bench/report.py --summary --results "$out"
else
  echo "No GPU here ($gpu): a small batch on the CPU model of a GPU. Its times say nothing about a GPU's."
  "$bench" --machine model ${out:+--out "$out"} "${arguments[@]}"
  echo
  echo "Recorded, not measured here (every shape: python3 bench/report.py --table):"
  python3 bench/report.py --summary
fi
