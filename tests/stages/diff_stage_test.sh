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

fail() { echo "FAILED: $1"; failures=$((failures + 1)); }
plain=$(stages/diff-stage 01 02)
coloured=$(stages/diff-stage --color 01 02)
[[ $plain != *$'\x1b'* ]] || fail "colours in a pipe"
[[ $coloured == *$'\x1b'* ]] || fail "no colours where asked"
added=$(grep -c '^+[^+]\|^+$' <<< "$plain")
[[ ${plain##*$'\n'} == *": +$added -"* ]] || fail "$added lines added, but ${plain##*$'\n'}"
code=0; stages/diff-stage 01 02 > /dev/full 2> /dev/null || code=$?
[ "$code" -eq 1 ] || fail "into a full disk: exit code $code"
[ "$failures" -eq 0 ]
