#!/usr/bin/env bash
# The main job: decodes the same paged batches with every stage, checked, in one table per shape.
#
#   bash bench/run.sh                              on a GPU: the shapes of suite main (minutes)
#                                                  without: a small batch on the CPU model of a GPU, then recorded results
#   bash bench/run.sh --out results.json           where to write the results (default on a GPU:
#                                                  build/results/<gpu>_<date>_<time>.json)
#   bash bench/run.sh --record                     every figure of the project anew, on a GPU (some twenty minutes): all
#                                                  suites, the decode service, decodes over 2, 4 and 8 GPUs (as many as there
#                                                  are), the model of scale, other implementations if PyTorch is installed;
#                                                  kept in bench/results, written into README.md, docs and the chapters
#   bash bench/run.sh --record-parallel            only the decodes over several GPUs, those of ranks that share a GPU, and
#                                                  the model of scale (minutes)
#   bash bench/run.sh --no-install                 ends with what is missing instead of installing it
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
    --record-parallel) record=parallel; shift ;;
    --no-install) no_install=yes; shift ;;
    --help|-h) sed -n '2,/^set /s/^# \{0,1\}//p' bench/run.sh; arguments=(--help); break ;;
    *) arguments+=("$1"); shift ;;
  esac
done
if [[ -n $record && -n "${arguments[*]}$out" ]]; then  # what is recorded is whole
  echo "run.sh: --record takes no other argument" >&2
  exit 2
fi

source stages/cmake/setup.sh
build mla_bench mla_run ${record:+mla_service mla_traditional mla_parallel}
bench=build/bench/mla_bench

# Decodes over 2, 4 and 8 GPUs, as there are, and NCCL: all rows go to one report, which is kept when it is whole. A
# timeline's decode is a row without times.
find_gpus() {  # into gpus: 0 (without NCCL, too), 1, 2, 4 or 8
  local nccl
  for gpus in 8 4 2 1; do
    nccl=$(build/bench/mla_parallel --ranks $gpus --print-nccl) && return
    if ((gpus == 2)); then echo "Nothing is measured over several GPUs: $nccl."; fi
  done
  gpus=0
}
record_parallel() {  # not to be called in a condition, where errors end nothing
  local report=build/results/${gpu}x${gpus}_parallel_$now.json
  local run=(build/bench/mla_parallel --append --out "$report" --ranks)
  local three=all_gather,all_to_all,reduce_scatter two=all_gather,all_to_all
  local ranks faults=(kill:1 kill-later:1 kill-later:0 shape:1 error:1 stop:1)
  mkdir -p build/results
  "${run[@]}" 1 --conformance
  for ((ranks = 2; ranks <= gpus; ranks *= 2)); do
    "${run[@]}" $ranks --conformance
    "${run[@]}" $ranks --times --exchange $three --shape h128_q1_b1_k1000000,h128_q1_b8_k131072,h16_q1_b1_k1000000,h16_q1_b8_k131072
    "${run[@]}" $ranks --times --exchange $three --shape h128_q1_b128_k8192 --slices 1,2
    "${run[@]}" $ranks --times --mode heads,batch --shape h128_q1_b128_k8192,h16_q1_b128_k8192
    "${run[@]}" $ranks --times --mode heads --shape h128_q1_b1_k65536,h128_q1_b1_k1000000
    "${run[@]}" $ranks --times --exchange $two --shape h128_q1_b1_k8192,h128_q1_b1_k65536,h16_q1_b1_k65536,h128_q1_b16_k8192
  done
  for slices in 1 2; do
    "${run[@]}" 2 --slices $slices --shape h128_q1_b16_k8192 --timeline "${report%.json}_trace_$slices.json"
  done
  for fault in "${faults[@]}"; do
    if "${run[@]}" 2 --fault "$fault" --time-limit 4000 --shape h128_q1_b2_k8192; then
      echo "run.sh: mla_parallel --fault $fault did not fail" >&2
      exit 1
    fi
  done
  if [[ $(grep -o '"fault":' "$report" | wc -l) -ne ${#faults[@]} ]]; then
    echo "run.sh: a fault is not in $report" >&2
    exit 1
  fi
  cp "$report" "bench/results/${gpu}x${gpus}_parallel_${now%_*}.json"
}
record_shared() {  # whether ranks that share GPUs decode right over NCCL
  local report=build/results/${gpu}_ranks_$now.json ranks
  for ranks in 2 3 4 8; do
    build/bench/mla_parallel --append --out "$report" --ranks $ranks --share-gpus --conformance
  done
  cp "$report" "bench/results/${gpu}_ranks_${now%_*}.json"
}
record_ranks() {
  find_gpus
  if ((gpus > 0)); then record_shared; fi
  if ((gpus > 1)); then record_parallel; fi
}
predict_scale() {  # from what is recorded by now
  build/bench/mla_parallel --predict --out bench/results/parallel_scale.json --shape \
    h128_q1_b1_k1000000,h128_q1_b8_k131072,h16_q1_b1_k1000000,h16_q1_b8_k131072,h128_q1_b128_k8192,h16_q1_b128_k8192,h128_q1_b1_k8192,h128_q1_b1_k65536,h16_q1_b1_k65536,h128_q1_b16_k8192
}

for argument in "${arguments[@]}"; do  # what measures nothing writes nothing
  case $argument in
    --help|--list|--print-gpu|--save-inputs*|--benchmark_list_tests*) exec "$bench" "${arguments[@]}" ;;
  esac
done

if gpu=$("$bench" --print-gpu); then
  now=$(date -u +%Y-%m-%d_%H%M%S)
  if [[ $record == parallel ]]; then
    record_ranks
    if ((gpus == 0)); then exit 2; fi
    predict_scale
    exec python3 bench/report/report.py --update
  fi
  if [[ -n $record ]]; then arguments=(--suite all); fi
  out=${out:-build/results/${gpu}_$now.json}
  mkdir -p build/results
  "$bench" --out "$out" "${arguments[@]}"
  echo
  python3 bench/report/report.py --summary --results "$out"
  if [[ -n $record ]]; then
    cp "$out" "bench/results/${gpu}_${now%_*}.json"
    for suite in cross texts; do  # for the chooser alone, cold
      "$bench" --out "bench/results/${gpu}_${suite}_${now%_*}.json" --suite "$suite" --stages auto --no-peers \
        --benchmark_filter=/cold --benchmark_report_aggregates_only=true
    done
    build/bench/mla_traditional --out "bench/results/${gpu}_traditional_${now%_*}.json"
    while read -r what queries tokens batch; do
      build/bench/mla_traditional --out "bench/results/${gpu}_traditional_${what}_${now%_*}.json" --machine gpu \
        --modes cross --queries "$queries" --n "$tokens" --batch "$batch" --heads 16 --head-dim 64,128,256 \
        --forms multi_head,grouped,absorbed
    done << 'END'
text_image 77 1024 8
image_text 1024 77 8
audio_text 1500 448 4
END
    build/bench/mla_service --out "bench/results/${gpu}_service_${now%_*}.json" --engine gpu --scenario all
    build/bench/mla_service --out "bench/results/${gpu}_requests_${now%_*}.json" --engine gpu \
      --scenario service,chat_1000,shared_prompt --seconds 30 --price-per-hour 3
    build/bench/mla_service --out "bench/results/${gpu}_service_formats_${now%_*}.json" --engine gpu \
      --scenario small_device_full --cache-format 16bit,fp8_tile128,fp8_tensor,int8_tile128
    record_ranks
    predict_scale
    if python3 -c 'import torch' 2> /dev/null; then
      python3 bench/report/peers.py --out "bench/results/peers_${gpu}_${now%_*}.json"
    else
      echo "Other implementations are not measured: no PyTorch here."
    fi
    if python3 -c 'import torch, mla_stages' 2> /dev/null; then
      python3 bench/report/host_time.py --out "bench/results/python_${gpu}_${now%_*}.json"
    else
      echo "The Python package's calls are not timed: it is not installed beside PyTorch (docs/python.md)."
    fi
    python3 bench/report/estimates.py --write  # by the ceilings just measured
    if python3 -c 'import matplotlib' 2> /dev/null; then
      python3 bench/report/report.py --plots
    else
      echo "Figures are not drawn: no matplotlib here. Where it is: python3 bench/report/report.py --plots"
    fi
    python3 bench/report/report.py --update
  fi
elif [[ -n $record ]]; then
  echo "run.sh: nothing to record: no GPU here ($gpu)" >&2
  exit 2
else
  echo "No GPU here ($gpu): a small batch on the CPU model of a GPU. Its times say nothing about a GPU's."
  "$bench" --machine model ${out:+--out "$out"} "${arguments[@]}"
  echo
  echo "Recorded, not measured here (every shape: python3 bench/report/report.py --table):"
  python3 bench/report/report.py --summary
fi
