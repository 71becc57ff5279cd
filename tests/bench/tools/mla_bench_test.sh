#!/usr/bin/env bash
# mla_bench's command line on the GPU model: what Google Benchmark's flags do before and after measuring.
#
#     mla_bench_test.sh MLA_BENCH
set -euo pipefail
bench=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
shape=h2_q1_b1_k70
failures=0

# expect CODE TEXT ARGUMENT...: mla_bench ends with CODE and prints TEXT
expect() {
  local code=0 output
  output=$("$bench" --machine model --shapes "$shape" --stages 02,03 "${@:3}" 2>&1) || code=$?
  if [ "$code" -ne "$1" ] || [[ $output != *"$2"* ]]; then
    echo "FAILED: ${*:3}: exit code $code, $1 expected; \"$2\" expected in: $output"
    failures=$((failures + 1))
  fi
}

listed=$("$bench" --machine model --shapes "$shape" --stages 02,03 --benchmark_list_tests --benchmark_filter=cold)
[ "$listed" = "02_shared_tiled/$shape/cold/manual_time
03_online_softmax/$shape/cold/manual_time" ] || { echo "FAILED: listed: $listed"; failures=1; }

expect 2 "Failed to match any benchmarks against regex: nothing" --benchmark_filter=nothing
expect 2 "--benchmark_format=json cannot be honoured" --benchmark_format=json
expect 2 "--benchmark_nothing=1 is not a flag" --benchmark_nothing=1
expect 2 "name two files" --out a.json --benchmark_out=b.json
expect 2 "unknown argument" --filter=cold
expect 2 "--out has no effect: --list measures nothing" --list --out a.json
expect 2 "--samples has no effect: --benchmark_list_tests measures nothing" --benchmark_list_tests --samples a.csv
expect 2 "--list and --save-inputs exclude each other" --list --save-inputs .
expect 2 "--stages has no effect: --save-inputs runs no stage" --save-inputs .
expect 2 "--out and --samples are the same file" --out a --samples a
expect 2 "--quick is for suite paged alone" --quick
expect 2 "--shapes has no effect: suite paged has no shapes" --suite paged
# again SHAPE CODE TEXT ARGUMENT...: as expect, with another shape
again() {
  local before=$shape
  shape=$1
  expect "${@:2}"
  shape=$before
}
again h1_q1_b1_k64 2 "--explain has no effect: decodes of suite plan are not timed" --suite plan --explain
again h16_q1_b0_k64 2 "invalid argument: shape 'h16_q1_b0_k64' has b = 0; 1 to 2147483647 are allowed"
again h16_q1_b1_k2000000000 2 "has k = 2000000000; 1 to 1073741824 are allowed"
again h16_q1_b1_k64_split100 2 "has split = 100; multiples of 64 are allowed"
again h1_q1_b1_k64_fp16 2 "--shapes h1_q1_b1_k64_fp16 ends with _fp16, but --dtype says bf16" --dtype bf16
again h2_q1_b1_k70_fp8_tile128 2 "none of these stages can read a cache of these shapes"
again h2_q1_b1_k70_fp8_tile128_fp16 2 "fp8_tile128 needs bf16"
again h2_q1_b1_k70_fp8_tile128 2 "fp8_tile128 needs bf16" --dtype fp16
again h128_q1_b1048576_k1073741824 2 "needs 2.59 EB of host memory; "
again h1_q1_b1_k1073741824 2 "TB of host memory; "
[ -z "$(ls)" ] || { echo "FAILED: files of refused runs: $(ls)"; failures=1; }

# A stage on the CPU needs no GPU, and reports on how many cores it ran.
code=0; output=$("$bench" --stages 00 --shapes "$shape" 2>&1) || code=$?
[[ $code -eq 0 && $output =~ 00_reference.*"CPU, "[0-9]+" core" && $output != *"no GPU"* ]] ||
  { echo "FAILED: --stages 00: exit code $code: $output"; failures=$((failures + 1)); }
code=0; output=$("$bench" --list) || code=$?
[[ $output == *"00_reference  the formula on the CPU"* ]] || { echo "FAILED: --list: $output"; failures=$((failures + 1)); }

expect 0 "results: a.json" --benchmark_filter='02.*cold' --benchmark_repetitions=3 --benchmark_out=a.json
python3 - "$shape" << 'END' || failures=1
import json, sys
rows = json.load(open("a.json"))["benchmarks"]
assert {row["name"].split("/")[0] for row in rows} == {"02_shared_tiled"}, rows
kinds = [row.get("aggregate_name", "round") for row in rows]
assert kinds == ["round"] * 3 + ["mean", "median", "stddev", "cv", "samples"], kinds
rounds = [row["real_time"] for row in rows[:3]]
assert len(set(rounds)) == 3, "three rounds with one time"
by_kind = dict(zip(kinds, rows))
assert by_kind["stddev"]["real_time"] > 0 and by_kind["samples"]["n"] == 3
assert abs(by_kind["samples"]["real_time"] - sorted(rounds)[1]) < 1e-6 * rounds[0]
assert not {"host_name", "executable"} & json.load(open("a.json"))["context"].keys()
END
exit $((failures > 0))
