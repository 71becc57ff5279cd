#!/usr/bin/env bash
# mla_parallel on the model, where ranks are threads: results are checked against the reference, a fault of one rank
# must be reported by all, wrong arguments are refused, and a report is written.
#   mla_parallel_test.sh PROGRAM
set -uo pipefail
program=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0

# expect CODE TEXT ARGUMENT...: the exit code, and what is printed
expect() {
  local code=$1 text=$2 said got
  shift 2
  said=$("$program" --machine model "$@" 2>&1)
  got=$?
  if [[ $got -ne $code || $said != *"$text"* ]]; then
    printf 'mla_parallel %s: exit code %s, "%s" expected; %s:\n%s\n' "$*" "$code" "$text" "$got" "$said" >&2
    failed=1
  fi
}

small=(--stage 04 --shape h8_q2_k200+3+0+65_causal)
expect 0 "context  all_to_all     slices 2 04_split_kv               right" --ranks 2 "${small[@]}" --exchange all_gather,all_to_all,reduce_scatter --slices 1,2
expect 0 "right" --ranks 3 "${small[@]}" --pages-per-turn 0
expect 0 "both     all_gather" --ranks 4 "${small[@]}" --mode both
expect 0 "batch " --ranks 2 "${small[@]}" --mode heads,batch
expect 0 "right" --ranks 2 --shape h4_q1_k130+64_fp8_tile128 --stage 12

for rank in 0 1 2; do
  expect 1 "mla_parallel: rank $rank, " --ranks 3 "${small[@]}" --fault shape:1
done
expect 1 "s after the fault: " --ranks 3 "${small[@]}" --fault shape:1
expect 1 "rank 0 calls all_gather of" --ranks 3 "${small[@]}" --fault shape:1
expect 1 "rank 2 failed: workspace too small" --ranks 3 "${small[@]}" --fault error:2
expect 1 "did not come to all_gather of" --ranks 2 "${small[@]}" --fault stop:1 --time-limit 1000

expect 2 "no --shape" --ranks 2
expect 2 "none not in {context,heads,batch,both}" --ranks 3 "${small[@]}" --mode both,none
expect 2 "ranks = 3 must be 4 or more, and even" --ranks 3 "${small[@]}" --mode both
expect 2 "the model has none" --ranks 2 "${small[@]}" --times
expect 2 "ranks on the model share no GPU" --ranks 2 "${small[@]}" --share-gpus
expect 2 "--times excludes --share-gpus" --ranks 2 "${small[@]}" --share-gpus --times
expect 2 "--timeline excludes --share-gpus" --ranks 2 "${small[@]}" --share-gpus --timeline ranks.json
expect 2 "a thread cannot be killed" --ranks 2 "${small[@]}" --fault kill:1
# What nobody could notice: a sequence less of one, and where nothing is exchanged.
expect 2 "h8_q1_b1_k200 has no two" --ranks 2 --stage 04 --shape h8_q1_b1_k200 --fault shape:1
expect 2 "--fault is of two ranks or more that share pages" --ranks 2 "${small[@]}" --mode batch --fault shape:1
expect 2 "--fault is of two ranks or more that share pages" --ranks 1 "${small[@]}" --fault error:0
# A conformance run has cases of its own.
for other in "--mode heads" "--shape h8_q1_b1_k64" "--exchange all_gather" "--slices 2" "--pages-per-turn 0" --times --no-check; do
  expect 2 " excludes --" --ranks 2 --conformance $other
done
expect 2 'fault "shape:2" must be' --ranks 2 "${small[@]}" --fault shape:2
expect 2 'fault "burn:1" must be' --ranks 2 "${small[@]}" --fault burn:1
expect 2 "there is no stage" --ranks 2 --stage 77 --shape h8_q1_b1_k64
expect 1 "num_heads_q = 8 must be a multiple of" --ranks 3 "${small[@]}" --exchange all_to_all
expect 1 "batch = 4 is less than the ranks" --ranks 5 "${small[@]}" --mode batch
# Each says so, and is then a rank that fails: it waits for the other, to tell it.
MLA_RANK=0 MLA_RANKS=2 expect 2 "ranks on the model are threads" "${small[@]}" --time-limit 100
MLA_RANK=0 MLA_RANKS=2 expect 2 "but this process is one of 2" --ranks 3 "${small[@]}" --time-limit 100

report=$folder/report.json
expect 0 "right" --ranks 2 "${small[@]}" --out "$report"
grep -q '"schema": "flashmla_parallel/1"' "$report" && grep -q '"wrong": \[\]' "$report" || {
  echo "$report is missing, or not the report of this run" >&2
  failed=1
}
# A second run is added to a report. A file that is no report is refused.
expect 0 "heads " --ranks 2 "${small[@]}" --mode context,heads,batch --out "$report" --append
[[ $(grep -c '"wrong"' "$report") -eq 4 ]] || {
  echo "$report does not have four rows after a second run" >&2
  failed=1
}
# Rows say what was run: one sequence has one slice, and ranks that share no pages exchange nothing.
expect 0 "slices 1" --ranks 3 --stage 04 --shape h8_q1_b1_k200 --slices 2 --out "$report" --append
python3 - "$report" << 'END' || failed=1
import json, sys
report = json.load(open(sys.argv[1]))
assert [row["exchange"] for row in report["rows"]] == ["all_gather", "all_gather", "none", "none", "all_gather"], report["rows"]
assert report["rows"][-1]["slices"] == 1, report["rows"][-1]
assert [row["ranks"] for row in report["rows"]] == [2, 2, 2, 2, 3] and report["context"]["ranks"] == 3, report
END
# What another commit, or a GPU, has recorded is not added to.
for what in commit machine; do
  sed "s/\"$what\": \"[^\"]*\"/\"$what\": \"other\"/" "$report" > "$folder/$what.json"
  expect 2 "the report that is there is of $what \"other\", this run of" --ranks 2 "${small[@]}" --out "$folder/$what.json" --append
done
# A fault is a row of the report: what another rank made of it, and when.
faults=$folder/faults.json
expect 1 "after the fault: " --ranks 2 "${small[@]}" --fault shape:1 --out "$faults" --append
expect 1 "after the fault: " --ranks 2 "${small[@]}" --fault error:0 --out "$faults" --append
expect 1 "after the fault: " --ranks 2 "${small[@]}" --fault stop:1 --time-limit 1000 --out "$faults" --append
python3 - "$faults" << 'END' || failed=1
import json, sys
report = json.load(open(sys.argv[1]))
shape, error, stop = report["faults"]
assert report["rows"] == [], report
assert shape["fault"] == "decodes another shape" and shape["rank"] == 1 and "rank 0 calls all_gather of" in shape["status"], shape
assert error["rank"] == 0 and "rank 0 failed: workspace too small" in error["status"], error  # rank 1 tells it
assert "did not come" in stop["status"] and 1 <= stop["seconds"] < 3, stop
END
echo '{}' > "$folder/other.json"
expect 2 "is no report of mla_parallel" --ranks 2 "${small[@]}" --out "$folder/other.json" --append
expect 0 "context, all_gather" --predict --shape h128_q1_b1_k1000000 --out "$report"
grep -q '"schema": "flashmla_scale/1"' "$report" || failed=1
expect 2 "--predict needs a --shape" --predict
be="are " # one GPU is, others are
if [[ $("$program" --machine model --print-nccl --ranks 1000) == *" is 1" ]]; then be="is 1"; fi
expect 1 "1000 ranks need as many GPUs; there $be" --print-nccl --ranks 1000

# A timeline: written, and told of; or refused before anything is decoded.
trace=$folder/trace.json
expect 0 "rank 1 was in exchanges for" --ranks 2 "${small[@]}" --timeline "$trace" --out "$folder/timeline.json"
python3 - "$trace" "$folder/timeline.json" << 'END' || failed=1
import json, sys
trace, report = (json.load(open(name)) for name in sys.argv[1:])
slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
assert {event["pid"] for event in slices} == {0, 1}, slices
assert {"bulk decode", "tail decode", "exchange", "merge"} <= {event["name"] for event in slices}, slices
assert trace["otherData"]["machine"] == "model" and trace["otherData"]["measured"].startswith("one decode on the GPU model")
assert len(report["timelines"]) == len(report["rows"]) == 1, report
END
rm "$trace"
one="--timeline is of one decode"
expect 2 "$one" --ranks 2 "${small[@]}" --timeline "$trace" --slices 1,2
expect 2 "$one" --ranks 2 --conformance --timeline "$trace"
expect 2 "two ranks or more that share pages" --ranks 1 "${small[@]}" --timeline "$trace"
expect 2 "two ranks or more that share pages" --ranks 2 "${small[@]}" --timeline "$trace" --mode heads
expect 2 "two ranks or more that share pages" --ranks 4 "${small[@]}" --timeline "$trace" --mode both
expect 2 "no --shape" --ranks 2 --timeline "$trace"
expect 2 "$folder/none/trace.json" --ranks 2 "${small[@]}" --timeline "$folder/none/trace.json"
[[ ! -e $trace ]] || {
  echo "a timeline of what was refused" >&2
  failed=1
}
exit $failed
