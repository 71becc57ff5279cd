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
expect 2 "--benchmark_nothing=1 is no flag" --benchmark_nothing=1
expect 2 "name two files" --out a.json --benchmark_out=b.json
expect 2 "unknown argument" --filter=cold
[ -z "$(ls)" ] || { echo "FAILED: files of refused runs: $(ls)"; failures=1; }

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
