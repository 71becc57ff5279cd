#!/usr/bin/env bash
# The main job: decodes the same paged batches with every stage, checked, in one table a shape.
#
#   bash bench/run.sh                              on a GPU: the shapes of suite main (minutes)
#                                                  without: a small batch on the CPU model of a GPU, then recorded results
#   bash bench/run.sh --out results.json           where to write the results (default on a GPU:
#                                                  build/results/<gpu>_<date>_<time>.json)
#   bash bench/run.sh --record [--suite table]     every stage on a GPU, kept as bench/results/<gpu>_<date>.json and
#                                                  written into README.md and the chapters
#   bash bench/run.sh --stages 02,03 --shapes ...  everything else goes to mla_bench, see build/bench/mla_bench --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=
record=
arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --out) out=${2:?--out needs a file name}; shift 2 ;;
    --out=*) out=${1#--out=}; shift ;;
    --record) record=yes; shift ;;
    --help|-h) sed -n '2,/^set /s/^# \{0,1\}//p' bench/run.sh; arguments=(--help); break ;;
    *) arguments+=("$1"); shift ;;
  esac
done
# What is recorded has every stage and a whole suite.
if [[ -n $record && ! "${arguments[*]}$out" =~ ^(--suite[\ =](main|table))?$ ]]; then
  echo "run.sh: --record takes no argument but --suite main or --suite table" >&2
  exit 2
fi

source tests/setup.sh
build mla_bench mla_run
bench=build/bench/mla_bench
if [[ ${arguments[*]} == --help ]]; then exec "$bench" --help; fi

if gpu=$("$bench" --print-gpu); then
  now=$(date -u +%Y-%m-%d_%H%M%S)
  out=${out:-build/results/${gpu}_$now.json}
  mkdir -p build/results
  "$bench" --out "$out" "${arguments[@]}"
  if [[ ! -e $out ]]; then exit; fi  # --list measures nothing
  echo
  python3 bench/report.py --summary --results "$out"
  if [[ -n $record ]]; then
    cp "$out" "bench/results/${gpu}_${now%_*}.json"
    python3 bench/report.py --update
  fi
elif [[ -n $record ]]; then
  echo "run.sh: nothing to record: no GPU here ($gpu)" >&2
  exit 2
else
  echo "No GPU here ($gpu): a small batch on the CPU model of a GPU. Its times say nothing about a GPU's."
  "$bench" --machine model ${out:+--out "$out"} "${arguments[@]}"
  echo
  echo "Recorded, not measured here (every shape: python3 bench/report.py --table):"
  python3 bench/report.py --summary
fi
