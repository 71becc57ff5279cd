#!/usr/bin/env bash
# What nvcc made of a Hopper stage: its instructions are there, and nothing is kept in local memory.
#   sass_test.sh CUOBJDUMP OBJECT INSTRUCTION...
# ptxas already refuses spills (-warn-spills), but not arrays whose indices are not constants.
set -uo pipefail
cuobjdump=$1 object=$2
if ! command -v "$cuobjdump" > /dev/null; then
  echo "skipped: no cuobjdump, which the CUDA Toolkit has; MLA_CUOBJDUMP names it"
  exit 77
fi
sass=$("$cuobjdump" -sass "$object") || { echo "FAILED: $cuobjdump -sass $object"; exit 1; }
# An instruction: /*0040*/ @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
used() { grep -cE "^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P[0-9T]+ )?$1[ .]" <<< "$sass"; }
failures=0
for instruction in "${@:3}"; do
  count=$(used "$instruction")
  echo "$instruction: $count"
  [ "$count" -gt 0 ] || { echo "FAILED: there is no $instruction"; failures=1; }
done
for instruction in LDL STL; do
  count=$(used "$instruction")
  [ "$count" -eq 0 ] || { echo "FAILED: local memory is used: $count times $instruction"; failures=1; }
done
[ "$failures" -eq 0 ]
