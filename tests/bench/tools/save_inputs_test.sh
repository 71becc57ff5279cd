#!/usr/bin/env bash
# mla_run can decode the inputs that mla_bench saves of a shape. Beside them are the results that some rows should give:
#   save_inputs_test.sh MLA_BENCH MLA_RUN
bench=$1 run=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
fail() { echo "FAILED: $1"; exit 1; }

said=$("$bench" --machine model --shapes h16_q2_k0+1+65+200_causal --save-inputs "$scratch") || fail "$said"
[[ -z $said ]] || fail "it should say nothing: $said"
said=$("$run" decode --machine model --stage 03 --dtype bf16 --scale 0.0416667 --causal --q "$scratch/q.npy" \
  --cache "$scratch/cache.npy" --block-table "$scratch/block_table.npy" --seqlens "$scratch/seqlens.npy")
[[ $said == *"b=4 s_q=2 h_q=16 h_kv=1, 0 to 200 tokens"*PASS* ]] || fail "$said"
grep -aq "'<f8', 'fortran_order': False, 'shape': (8, 16, 512)" "$scratch/out.npy" || fail "out.npy"
grep -aq "'<i4', 'fortran_order': False, 'shape': (8, 2)" "$scratch/rows.npy" || fail "rows.npy"

# A quantised cache is bytes.
for format in fp8_tile128 fp8_tensor; do
  "$bench" --machine model --shapes "h16_q2_k0+1+65+200_causal_$format" --save-inputs "$scratch" || fail "$format"
  scale=()
  [[ $format == fp8_tile128 ]] || scale=(--cache-scale 0.001339)
  said=$("$run" decode --stage reference --dtype bf16 --scale 0.0416667 --causal --q "$scratch/q.npy" \
    --cache "$scratch/cache.npy" --cache-format "$format" "${scale[@]}" --block-table "$scratch/block_table.npy" \
    --seqlens "$scratch/seqlens.npy") || fail "$said"
  [[ $said == *"0 to 200 tokens"*"cache $format"* ]] || fail "$said"
done

# Of a large batch, the results of some rows are saved.
"$bench" --machine model --shapes h1_q1_b100_k3 --save-inputs "$scratch" || fail "a batch of 100"
grep -aq "(64, 1, 512)" "$scratch/out.npy" || fail "64 rows"

said=$("$bench" --machine model --shapes h1_q1_b1_k1,h1_q1_b1_k2 --save-inputs "$scratch" 2>&1) && fail "two shapes"
[[ $said == *"one shape; it names 2"* ]] || fail "$said"
said=$("$bench" --machine model --shapes h1_q1_b1_k1 --save-inputs "$scratch/none" 2>&1) && fail "no folder"
[[ $said == *"there is no folder"* ]] || fail "$said"
