#!/usr/bin/env bash
# Does the structured loss do what it is for? Trains adapters on drawn figures with and without its pose and count terms,
# everything else equal, and counts hand and limb errors in pictures of prompts that no training saw. The terms look
# through the world's pose network; the errors are found by plain image geometry.
#
#   bash scripts/world/anatomy.sh [OUT_DIR]      OUT_DIR (build/anatomy); what is there is not done again
#
# QWEN_LORA names a binary to use instead of a fresh release build, SEEDS the training seeds ("1 2 3"), STEPS the steps
# of a run (300), COUNT the prompts scored (120, which is all), WEIGHT the pose_loss_weight (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/anatomy}
if [ -z "${QWEN_LORA:-}" ]; then
  cargo build --release --locked
  QWEN_LORA=target/release/qwen-lora
fi
mkdir -p "$out"
[ -d "$out/figures" ] || "$QWEN_LORA" world draw --out "$out/figures" --kind figures --count 64 --seed 30

score() { # NAME ARGUMENTS...
  [ -d "$out/$1" ] || "$QWEN_LORA" world score --model synthetic:world --split held-out --kind figures --count "${COUNT:-120}" --guidance 2 \
    --quiet --out "$out/$1" "${@:2}" >/dev/null
  "$QWEN_LORA" world check "$out/$1" --list --json >"$out/$1.json"
}
score base
for seed in ${SEEDS:-1 2 3}; do
  for weight in 0 "${WEIGHT:-1}"; do
    name=$([ "$weight" = 0 ] && echo "without-$seed" || echo "with-$seed")
    "$QWEN_LORA" train --config scripts/world/anatomy.yaml --quiet --resume auto --set seed="$seed" --set data.path="$out/figures" \
      --set data.pose_loss_weight="$weight" --set training.max_steps="${STEPS:-300}" --set data.cache_dir="$out/cache" \
      --set output="$out/run-$name"
    score "$name" --lora "$out/run-$name/adapter.safetensors"
  done
done
python3 scripts/world/anatomy_table.py "$out" ${SEEDS:-1 2 3}
