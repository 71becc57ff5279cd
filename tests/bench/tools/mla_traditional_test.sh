#!/usr/bin/env bash
# mla_traditional: what it refuses, what it says without a GPU, and whether its figures are those of the plan.
#
#     mla_traditional_test.sh MLA_TRADITIONAL
set -euo pipefail
traditional=$1
export LC_ALL=C.UTF-8
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
failures=0
fail() {
  echo "FAILED: $1"
  failures=$((failures + 1))
}

# expect CODE TEXT ARGUMENT...
expect() {
  local code=0 output
  output=$("$traditional" "${@:3}" 2>&1) || code=$?
  { [ "$code" -eq "$1" ] && [[ $output == *"$2"* ]]; } ||
    fail "${*:3}: exit code $code, $1 expected; \"$2\" expected in: $output"
}
expect 2 "invalid argument: heads = 0; 1 to 1024 are allowed" --heads 8,0
expect 2 "invalid argument: head_dim = 60; multiples of 8 up to 1024 are allowed" --head-dim 60
expect 2 "invalid argument: tokens = 0; 1 to 1048576 are allowed" --n 0
expect 2 "invalid argument: batch = -1; 1 to 4096 are allowed" --batch -1
expect 2 "invalid argument: heads = 8 is not a multiple of kv_heads = 3" --heads 8 --kv-heads 3
expect 2 "--queries has no effect without --modes cross" --queries 5
expect 2 "invalid argument: queries = 0" --modes cross --queries 0
expect 2 "--forms" --forms sparse
expect 2 "--dtype" --dtype fp8
expect 2 "no/such: cannot be written: there is no folder no" --machine cpu --n 8 --out no/such
expect 0 "Exit code: 0 all right" --help
[ -z "$(ls)" ] || fail "files of refused runs: $(ls)"

# All forms and modes run. A form with too much work is left out by name; that is no failure.
small=(--heads "2,4" --n 40 --batch 2)
code=0; output=$("$traditional" "${small[@]}" --modes prefill,decode,cross --queries 7 --head-dim 16 --machine cpu --out cpu.json) || code=$?
[ "$code" -eq 0 ] || fail "exit code $code: $output"
python3 - << 'END' || fail "cpu.json"
import json
data = json.load(open("cpu.json"))
assert data["context"]["schema"] == "flashmla_traditional/1" and data["context"]["machine"] == "cpu", data["context"]
found = {}
for entry in data["benchmarks"]:
    if entry.get("aggregate_name") == "samples":
        found[tuple(entry["name"].split("/")[:3])] = entry
forms = ["multi_head", "grouped", "latent_plain", "latent_fused", "absorbed"]
for shape in [f"{mode}_h{heads}_d16_n40{'_q7' if mode == 'cross' else ''}_b2" for mode in ("prefill", "decode", "cross")
              for heads in (2, 4)]:
    for form in forms:
        whole = found[form, shape, "cpu"]
        assert 0 < whole["rel_l2"] < 1e-5 and whole["real_time"] > 0, whole
        parts = {mode: one for (of, name, mode), one in found.items() if (of, name) == (form, shape) and mode != "cpu"}
        assert sum(one["flop"] for one in parts.values()) == whole["flop"], (form, shape)
        assert ("cpu_reconstruction" in parts) == (form in ("latent_plain", "latent_fused", "absorbed")), parts.keys()
        assert ("cpu_latent" in parts) == (form in ("latent_plain", "absorbed")), parts.keys()
row = {form: found[form, "decode_h4_d16_n40_b2", "cpu"]["cache_bytes"] / (40 * 2 * 4) for form in forms}
# values per token: K and V of 4 heads of 16, of 1 KV head; two latents of 16; MLA's 576
assert row == {"multi_head": 128, "grouped": 32, "latent_plain": 32, "latent_fused": 32, "absorbed": 576}, row
END
[[ $output == *"cross_h4_d16_n40_q7_b2, CPU, Eigen"* ]] || fail "no cross-attention: $output"
[[ $output == *"over multi-head*"*"core µs per head"*"together"* ]] || fail "tables: $output"
expect 0 "multi_head left out: 0 GFLOP, more than --most-gflop 1e-06" "${small[@]}" --machine cpu --most-gflop 1e-6

output=$("$traditional" "${small[@]}" --head-dim 16,24 --machine cpu --forms grouped,grouped --modes decode,decode)
for shape in h2_d16 h4_d16 h2_d24 h4_d24; do
  [[ $output == *"decode_${shape}_n40_b2, CPU"* ]] || fail "no $shape: $output"
done

# Without a GPU, the default says so and measures the CPU, and a wish for a GPU is refused. With one, every form is right.
code=0; output=$("$traditional" "${small[@]}") || code=$?
{ [ "$code" -eq 0 ] && [[ $output == *"CPU, Eigen"* ]]; } || fail "exit code $code: $output"
if [[ $output == *"GPU left out: "* ]]; then
  expect 2 "mla_traditional: unavailable: no GPU" --machine gpu
else
  for more in "" "--causal" "--dtype fp16" "--kv-heads 1"; do
    # shellcheck disable=SC2086
    expect 0 "GPU, cuBLAS" "${small[@]}" --machine gpu --head-dim 64,128 --modes prefill,decode,cross $more
  done
fi
exit $((failures > 0))
