#!/usr/bin/env bash
# mla_tune's search on the GPU model, whose times mean nothing: what it writes, how it resumes, and what it refuses. The
# programs then choose by its table.
#
#     mla_tune_test.sh MLA_TUNE MLA_RUN MLA_BENCH
set -euo pipefail
tune=$1 run=$2 bench=$3
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset MLA_CHOICE_TABLE
failures=0

# expect CODE TEXT COMMAND...: the command ends with CODE and prints TEXT, wherever its lines break
expect() {
  local code=0 output
  output=$("${@:3}" 2>&1) || code=$?
  if [ "$code" -ne "$1" ] || [[ $(tr -s '[:space:]' ' ' <<< "$output") != *"$2"* ]]; then
    echo "FAILED: ${*:3}: exit code $code, $1 expected; \"$2\" expected in: $output"
    failures=$((failures + 1))
  fi
}
search=("$tune" --machine model --stages 05,10)

expect 0 "h16_q1_b1_k512" "$tune" --plan --machine model --stages 10
expect 0 "1 shapes, at most" "$tune" --plan --machine model --stages 05,10 --shapes h16_q1_b4_k512
expect 2 "--out or --resume must say where" "$tune" --machine model
expect 2 "--plan writes nothing" "$tune" --plan --out t.json
expect 2 "--budget 3h is no time" "${search[@]}" --out t.json --budget 3h
expect 2 "only stages that make a plan are timed" "$tune" --machine model --stages 01 --out t.json
expect 2 "only stages that make a plan are timed" "$tune" --machine model --stages auto --out t.json
expect 2 "no stage that makes a plan and runs here can read its cache" \
  "$tune" --machine model --stages 10 --shapes h16_q1_b1_k64_fp8_tile128 --out t.json
expect 2 "there is no stage '77'" "$tune" --machine model --stages 77 --out t.json
expect 2 "equal lengths" "${search[@]}" --out t.json --shapes h16_q1_b2_kvaried64
expect 2 "cannot be read" "${search[@]}" --resume t.json --shapes h16_q1_b1_k64
[ ! -e t.json ] || { echo "FAILED: a file was written"; failures=1; }

expect 0 "t.json: 1 shapes" "${search[@]}" --out t.json --shapes h16_q1_b1_k128
cp t.json first.json
# Rows that are there stay as they are, and are not timed again.
expect 0 "t.json: 2 shapes" "${search[@]}" --resume t.json --shapes h16_q1_b1_k128,h20_q1_b2_k64
[ "$(grep -c '"rows"' t.json)" = 2 ] && grep -qF "$(grep '"rows"' first.json)" t.json ||
  { echo "FAILED: resumed: $(cat t.json)"; failures=1; }
expect 0 "1 shapes are left; go on by mla_tune --resume t.json" "${search[@]}" --resume t.json --budget 0.000001 \
  --shapes h16_q1_b1_k128,h16_q1_b3_k64
sed 's/"multiprocessors": "132"/"multiprocessors": "78"/' t.json > other.json
expect 2 "was begun with multiprocessors 78, but this is 132" "${search[@]}" --resume other.json --shapes h16_q1_b3_k64

# Choosing by the table. Edited to name stage 05, so that the model's times do not decide the test.
sed 's/"stage":"10_few_heads"/"stage":"05_tensor_core"/g' t.json > only05.json
expect 0 "choice 05_tensor_core" "$run" explain --stage auto --shape h16_q1_b1_k128 --choice-table only05.json
expect 0 "in only05.json" env MLA_CHOICE_TABLE=only05.json "$run" explain --stage auto --shape h16_q1_b1_k128
expect 0 "PASS" "$run" decode --stage auto --machine model --shape h16_q1_b1_k64 --choice-table only05.json
expect 0 "05_tensor_core" "$bench" --machine model --stages auto --shapes h16_q1_b1_k64 --choice-table only05.json
expect 0 "Measured on NVIDIA H200" "$run" explain --stage auto --shape h16_q1_b1_k128
# A bad file from the environment gives a note, and the built-in table is used. As an option it is an error.
echo '{"schema": 1}' > bad.json
expect 0 "note: MLA_CHOICE_TABLE: bad.json: no table to choose by: the table: schema must be a text" \
  env MLA_CHOICE_TABLE=bad.json "$run" explain --stage auto --shape h16_q1_b1_k128
expect 0 "Measured on NVIDIA H200" env MLA_CHOICE_TABLE=bad.json "$run" explain --stage auto --shape h16_q1_b1_k128
expect 2 "bad.json: no table to choose by" "$run" explain --stage auto --shape h16_q1_b1_k128 --choice-table bad.json
expect 2 "nowhere.json cannot be read" "$bench" --machine model --stages auto --choice-table nowhere.json

# Every subcommand takes auto as a stage.
expect 0 "auto, plan made on" "$run" plan --stage auto --machine model --shape h16_q1_b1_k128
expect 0 "auto: own limit" "$run" predict --stage auto --machine model --shape h16_q1_b1_k128
expect 0 "wrote r.json" "$run" trace --stage auto --shape h16_q1_b1_k64 -o r.json
exit $((failures > 0))
