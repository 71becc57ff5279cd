#!/usr/bin/env bash
# mla_timeline on the model, with a stage of two warpgroups that take turns: it writes files that other programs can read,
# and they say who was where in what order.
#   mla_timeline_test.sh PROGRAM
set -uo pipefail
program=$1
command -v python3 > /dev/null || { echo "skipped: no python3"; exit 77; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
run() { "$program" --stage 99 --machine model --shape h1_q1_b1_k64 "$@"; }
run --block 1,3 --trace "$scratch/trace.json" --svg "$scratch/picture.svg" | tee "$scratch/said" || exit 1
grep -q "block 3, .* clocks" "$scratch/said" || { echo "FAILED: no block 3"; exit 1; }
python3 - "$scratch" << 'END' || exit 1
import json, sys, xml.etree.ElementTree
folder = sys.argv[1]
events = json.load(open(folder + "/trace.json"))["traceEvents"]
names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
assert sorted(names) == [1, 3], names
for block in names:
    own = [e for e in events if e["pid"] == block and e["ph"] == "X"]
    assert [e["name"] for e in own if e["tid"] == 2] == ["issue copy"], own
    for track in 0, 1:
        turns = ["Q K^T", "softmax", "wait for other"]
        turns = turns if track == 0 else turns[2:] + turns[:2]
        assert [e["name"] for e in own if e["tid"] == track] == 3 * turns, own
    # Turns do not overlap: each Q K^T ends before the other warpgroup's next one begins.
    order = [e["tid"] for e in sorted(own, key=lambda e: e["ts"]) if e["name"] == "Q K^T"]
    assert order == 3 * [0, 1], order
root = xml.etree.ElementTree.parse(folder + "/picture.svg").getroot()
assert root.tag.endswith("svg")
tooltips = [e for e in root.iter() if e.tag.endswith("title")]
assert len(tooltips) == 2 * (1 + 2 * 9), len(tooltips)
END
expect_refusal() {
  said=$(run "${@:2}" 2>&1) && { echo "FAILED: accepted ${*:2}"; exit 1; }
  [[ $said == *"$1"* ]] || { echo "FAILED: $1 expected in: $said"; exit 1; }
}
expect_refusal "block 9 left no record" --block 9
expect_refusal "/no/such: cannot be written: there is no folder /no" --trace /no/such
expect_refusal "shape" --shape nonsense
expect_refusal "the same file" --trace "$scratch/a" --svg "$scratch/a"
expect_refusal "nothing would be shown" --from-us 3 --to-us 2
said=$("$program" --stage 99 --machine model --shape h1_q1_b1048576_k1073741824 2>&1)
[[ $said == *"EB of host memory; "* ]] || { echo "FAILED: $said"; exit 1; }
said=$("$program" --stage 55 --machine model 2>&1)
[[ $said == *"no stage 55 that records; there are: 99_ping_pong"* ]] || { echo "FAILED: $said"; exit 1; }
