#!/usr/bin/env bash
# stages/diff-stage: what it shows, and what it says to bad arguments.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
command -v git > /dev/null || { echo "skipped: no git"; exit 77; }

failures=0
# expect CODE TEXT [argument]...: diff-stage ends with CODE and says TEXT
expect() {
  local code=0 output
  output=$(stages/diff-stage "${@:3}" 2>&1) || code=$?
  if [ "$code" -ne "$1" ] || [[ $output != *"$2"* ]]; then
    echo "FAILED: diff-stage ${*:3}: exit code $code, $1 expected; \"$2\" expected in: ${output:0:500}"
    failures=$((failures + 1))
  fi
}
expect 0 "--- a/01_naive/kernel.cuh" 01 02
expect 0 "01_naive -> 02_shared_tiled: +" 01 02
expect 0 "02_shared_tiled -> 03_online_softmax: +" 02_shared_tiled 03
expect 0 "02_shared_tiled -> 03_online_softmax: +" 03
expect 0 "02_shared_tiled -> 02_shared_tiled: +0 -0 lines" 02 02
expect 0 "1 file changed" --stat 01 02
expect 0 "usage" --help
expect 2 "one or two stages are needed"
expect 2 "one or two stages are needed" 01 02 03
expect 2 "there is no stage 99" 01 99
expect 2 "stages: 00_reference 01_naive 02_shared_tiled" 01 99
expect 0 "00_reference -> 01_naive: +" 00 01
expect 0 "+++ b/01_naive/kernel.cuh" 01
expect 2 "there is no stage before 00_reference" 00
expect 2 "no-such-option" --no-such-option 01 02
expect 0 "05_tensor_core/steps/1_plain_mma -> 05_tensor_core/steps/2_ldmatrix: +" step_05_2
expect 0 "04_split_kv -> 05_tensor_core/steps/1_plain_mma: +" step_05_1_plain_mma
expect 2 "there is no step step_05_9" step_05_9 05

fail() { echo "FAILED: $1"; failures=$((failures + 1)); }
plain=$(stages/diff-stage 01 02)
coloured=$(stages/diff-stage --color 01 02)
[[ $plain != *$'\x1b'* ]] || fail "colours in a pipe"
[[ $coloured == *$'\x1b'* ]] || fail "no colours where asked"
added=$(grep -c '^+[^+]\|^+$' <<< "$plain")
[[ ${plain##*$'\n'} == *": +$added -"* ]] || fail "$added lines added, but ${plain##*$'\n'}"
code=0; stages/diff-stage 01 02 > /dev/full 2> /dev/null || code=$?
[ "$code" -eq 1 ] || fail "into a full disk: exit code $code"

# A step is one idea: each changes at most 150 lines of the kernel before it, and the stage at most 150 of the last step. A
# line that replaces another counts once; white space does not count. The page of the steps must give the same counts.
small() {
  local counts
  counts=$(stages/diff-stage "$@" | tail -1)
  echo "$counts"
  [[ $counts =~ \+([0-9]+)\ -([0-9]+)\ lines$ ]] || { fail "no counts of $*"; return; }
  [ "${BASH_REMATCH[1]}" -gt 0 ] && [ "${BASH_REMATCH[1]}" -le 150 ] && [ "${BASH_REMATCH[2]}" -le 150 ] ||
    fail "$* changes more than 150 lines, or none"
  grep -qF "| +${BASH_REMATCH[1]} −${BASH_REMATCH[2]} |" "$folder/README.md" || fail "$folder/README.md has other counts"
}
steps=0
for folder in stages/[0-9][0-9]_*/steps; do
  number=${folder#stages/}
  number=${number%%_*}
  last=$(find "$folder" -mindepth 1 -maxdepth 1 -name '[0-9]_*' | wc -l)
  for ((step = 1; step <= last; ++step)); do small "step_${number}_$step"; done
  small "step_${number}_$last" "$number"
  steps=$((steps + last))
done
[ "$steps" -gt 0 ] || fail "no steps were found"

# A chapter gives the counts of what makes its stage of another.
chapters=0
while read -r from to added removed; do
  counts=$(stages/diff-stage "$from" "$to" | tail -1)
  [[ $counts == *": +$added -$removed lines" ]] || fail "a chapter says +$added −$removed, but $counts"
  chapters=$((chapters + 1))
done < <(sed -nE 's/.*`stages\/diff-stage ([0-9]+) ([0-9]+)` counts \+([0-9]+) −([0-9]+) lines.*/\1 \2 \3 \4/p' stages/[0-9][0-9]_*/README.md)
[ "$chapters" -gt 0 ] || fail "no chapter with counts was found"
[ "$failures" -eq 0 ]
