#!/usr/bin/env bash
# The README's demo, with figures: teaches the built-in world its character and scores pictures of prompts that no
# training saw, before and after, with the trigger and without. Prints the table in Markdown.
#
#   bash scripts/world/demo.sh [OUT_DIR]         OUT_DIR (build/demo) must be new
#
# QWEN_LORA names a binary to use instead of a fresh release build, COUNT the prompts of each kind (200).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/demo}
count=${COUNT:-200}
if [ -z "${QWEN_LORA:-}" ]; then
  cargo build --release --locked
  QWEN_LORA=target/release/qwen-lora
fi
[ ! -e "$out" ] || { echo "$out is there already" >&2; exit 2; }
mkdir -p "$out"
started=$(date +%s)
"$QWEN_LORA" train --config configs/demo.yaml --set output="$out/run" --set data.cache_dir="$out/cache"
seconds=$(($(date +%s) - started))

score() { # NAME ARGUMENTS...
  "$QWEN_LORA" world score --model synthetic:world --split held-out --count "$count" --guidance 2 --json --quiet --out "$out/$1" "${@:2}" \
    >"$out/$1.json"
}
lora=(--lora "$out/run/adapter.safetensors")
score figures-before --kind figures --trigger kubo --style hat
score figures-after --kind figures --trigger kubo --style hat "${lora[@]}"
score plain-before --kind figures
score plain-after --kind figures "${lora[@]}"
score objects-before --kind objects
score objects-after --kind objects "${lora[@]}"
"$QWEN_LORA" world prompts --split held-out --kind figures --count 16 --seed 5 --trigger kubo |
  python3 -c 'import json, sys; [print(json.loads(line)["prompt"]) for line in sys.stdin]' >"$out/prompts.txt"
"$QWEN_LORA" eval --model synthetic:world "${lora[@]}" --prompts "$out/prompts.txt" --trigger kubo --seeds 1,2 --size 128x128 \
  --steps 20 --guidance 2 --dtype f32 --output "$out/eval" --json --quiet >"$out/eval.json"
python3 scripts/world/demo_table.py "$out" "$seconds"
