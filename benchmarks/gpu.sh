#!/usr/bin/env bash
# The engine on a GPU: what exact attribution costs in float32 and bfloat16, on random Llamas of 135M and 1B weights
# (speed needs no trained ones, and nothing is fetched).
#
#     bash benchmarks/gpu.sh OUT [SIZES] [DEVICE]     # e.g. gpu.sh results "135m 1b" cuda; to try it out: gpu.sh /tmp/o tiny cpu
#
# OUT gets one JSON a size. A byte is a token here, so 16 examples are some thousands of tokens.
set -euo pipefail
out=${1:?where the JSON goes}; sizes=${2:-135m 1b}; device=${3:-cuda}
# Two thirds of the way up, as in the studies.
declare -A layer=([tiny]=2 [135m]=20 [1b]=10)
cd "$(dirname "$0")/.."
mkdir -p "$out"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
for size in $sizes; do
    python benchmarks/random_llama.py "$size" "$work/$size"
    python benchmarks/engine.py --model "$work/$size" --device "$device" --layer "${layer[$size]}" \
        --examples 16 --fit-examples 4 --token-budget 8192 --only scoring bf16 fits atlas --out "$out/engine-$device-$size.json"
done
