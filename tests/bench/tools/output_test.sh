#!/usr/bin/env bash
# No program of the bench loses what it prints or writes without saying so, be it by a full disk, a closed stream or a
# reader that leaves. If writing a file fails, the old file is left, and nothing else.
#   output_test.sh MLA_BENCH MLA_RUN MLA_COST MLA_SERVICE PING_PONG_TIMELINE MLA_TRADITIONAL
set -uo pipefail
bench=$1 run=$2 cost=$3 service=$4 timeline=$5 traditional=$6
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 1
failures=0
fail() {
  echo "FAILED: $1" >&2  # stdout may be the one that fails
  failures=$((failures + 1))
}

layer=(--machine cpu --heads 1 --head-dim 8 --n 8 --batch 1)
small=(--machine model --shapes h1_q1_b1_k64 --stages 02)
decode=(decode --machine model --stage 02 --shape h1_q1_b1_k64)
# says TEXT COMMAND...: ends with 1 and TEXT on stderr; its stdout is the caller's
says() {
  local code=0
  "${@:2}" 2> said || code=$?
  { [ "$code" -eq 1 ] && [[ $(< said) == *"$1"* ]]; } || fail "${*:2}: exit code $code; $1 expected in: $(< said)"
}
while read -r -a arguments; do
  program=${!arguments[0]}
  command=("$program" "${arguments[@]:1}")
  says "standard output cannot be written" "${command[@]}" > /dev/full
  says "standard output cannot be written" "${command[@]}" >&-
  # A reader that is gone before anything is printed.
  { sleep 0.5; code=0; "${command[@]}" 2> said || code=$?; echo "$code" > code; } | true
  { [ "$(< code)" -ne 0 ] && [ ! -s said ]; } || fail "${arguments[*]} | true: exit code $(< code): $(< said)"
done << 'END'
bench --help
bench --list
bench --list --json
bench --machine model --shapes h1_q1_b1_k64 --benchmark_list_tests
run list
run decode --help
run decode --machine model --stage 02 --shape h1_q1_b1_k64
run predict --machine model --stage 02 --shape h1_q1_b1_k64 --json
cost
service --list
timeline --stage 99 --machine model --shape h1_q1_b1_k64
traditional --machine cpu --heads 1 --head-dim 8 --n 8 --batch 1
END

# Results are written even if nobody reads what is printed.
{ sleep 0.3; "$bench" "${small[@]}" --out unread.json; } 2> /dev/null | true
grep -q '"name": "02_shared_tiled' unread.json || fail "a broken pipe cost the results"

# loses_nothing FILES COMMAND...: no file may grow past 1 KiB, as on a full disk. Each of FILES stays what it was.
loses_nothing() {
  local file
  rm -rf full && mkdir full
  for file in $1; do echo old > "full/$file"; done
  (ulimit -f 1 && says "cannot be written: File too large" "${@:2}" > /dev/null; exit "$failures") || failures=$?
  for file in $1; do [ "$(< "full/$file")" = old ] || fail "${*:2}: $file is no longer what it was"; done
  [ "$(ls full)" = "$(tr ' ' '\n' <<< "$1")" ] || fail "${*:2}: left $(ls full)"
}
loses_nothing "a.json" "$bench" "${small[@]}" --out full/a.json
loses_nothing "a.json" "$service" --engine simulated --scenario chat_1000 --seconds 1 --out full/a.json
loses_nothing "a.json" "$traditional" "${layer[@]}" --out full/a.json
loses_nothing "lse.npy out.npy" "$run" "${decode[@]}" --lse full/lse.npy --out full/out.npy
loses_nothing "a.json" "$timeline" --stage 99 --machine model --shape h1_q1_b1_k64 --trace full/a.json
loses_nothing "a.json b.json" "$run" trace --stage 02 --shape h1_q1_b1_k64 -o full/a.json --chrome full/b.json
loses_nothing "" "$bench" --machine model --shapes h1_q1_b1_k64 --save-inputs full
says "/dev/full: cannot be written: No space left on device" "$bench" "${small[@]}" --out /dev/full --samples kept.csv \
  > /dev/null
grep -q "^02_shared_tiled,h1_q1_b1_k64,cold,0," kept.csv || fail "a failing --out cost the samples"
# Results may go to standard output: they follow what was printed before.
"$bench" "${small[@]}" --out /dev/stdout > both || fail "--out /dev/stdout"
python3 - << 'END' || fail "both: $(< both)"
import json
text = open("both").read()
begin, end = text.index("\n{\n"), text.rindex("\n}\n")
assert "02_shared_tiled" in text[:begin] and "results: /dev/stdout" in text[end:], text
assert json.loads(text[begin:end + 2])["benchmarks"]
END

# refuses TEXT COMMAND...: ends with 2 and TEXT before anything runs
refuses() {
  local code=0 said
  said=$("${@:2}" 2>&1) || code=$?
  { [ "$code" -eq 2 ] && [[ $said == *"$1"* ]]; } || fail "${*:2}: exit code $code; $1 expected in: $said"
}
for command in "$bench ${small[*]} --out" "$run ${decode[*]} --out" \
  "$run trace --stage 02 --shape h1_q1_b1_k64 --out" "$service --engine simulated --out" \
  "$timeline --stage 99 --machine model --svg" "$traditional ${layer[*]} --out"; do
  # shellcheck disable=SC2086
  refuses "no/such: cannot be written: there is no folder no" $command no/such
done
exit $((failures > 0))
