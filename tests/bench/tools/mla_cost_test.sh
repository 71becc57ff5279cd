#!/usr/bin/env bash
# What mla_cost prints: nothing is wider than a terminal, and the ceilings are the recorded ones.
set -euo pipefail
cost=$1 results=$2
export LC_ALL=C.UTF-8
wider() { python3 -c 'import sys; most = int(sys.argv[1]); sys.exit(any(len(l.rstrip("\n")) > most and not print(l)
                                                                        for l in sys.stdin))' "$1"; }
"$cost" --models v3,v2,v2-lite,mha32 --not-causal --batch 128 | wider 88
"$cost" --models v3,v2,v2-lite,mha32 --picture | wider 100
newest=$(grep -l '"ceiling_read_gbps"' "$results"/h200_20*.json | sort | tail -1)
ceiling() { sed -n "s/.*\"ceiling_$1\": \"\(.*\)\".*/\1/p" "$newest"; }
"$cost" | grep -F "FLOP at $(ceiling matrix_cold_tflops) TFLOP/s and bytes at $(ceiling read_gbps) GB/s"
"$cost" | grep "the cold ceilings of NVIDIA"
"$cost" --tflops 5 --gbps 7 | grep "FLOP at 5.00 TFLOP/s and bytes at 7.000 GB/s, as given"
"$cost" --tflops 5 | grep "where not given the ceiling of NVIDIA"
