#!/usr/bin/env bash
# Does the structured loss do what it is for? Trains adapters on drawn figures with and without its pose and count terms,
# everything else equal, and counts hand and limb errors in pictures of prompts that no training saw. The terms look
# through the world's pose network; the errors are found by plain image geometry.
#
#   bash scripts/world/anatomy.sh [OUT_DIR]      OUT_DIR (build/anatomy); what is there is not done again
#
# QWEN_LORA names a binary to use instead of a fresh release build, SEEDS the training seeds ("1 2 3"), NOISE the noises that
# each of the 120 prompts is drawn with ("0 100 200"), FIGURES the pictures trained on (2000), STEPS the steps of a run (1500),
# WEIGHT the pose_loss_weight (1), GATE the noise level up to which the terms act (0.5), MODEL the base (synthetic:world).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/anatomy}
model=${MODEL:-synthetic:world}
noises=${NOISE:-0 100 200}
steps=${STEPS:-1500}
if [ -z "${QWEN_LORA:-}" ]; then
  cargo build --release --locked
  QWEN_LORA=target/release/qwen-lora
fi
mkdir -p "$out"
[ -d "$out/figures" ] || "$QWEN_LORA" world draw --out "$out/figures" --kind figures --count "${FIGURES:-2000}" --seed 30

score() { # NAME ARGUMENTS...
  local noise
  for noise in $noises; do
    [ -e "$out/$1-$noise.json" ] && continue
    rm -rf "$out/$1-$noise"
    "$QWEN_LORA" world score --model "$model" --split held-out --kind figures --count 120 --seed "$noise" --quiet \
      --out "$out/$1-$noise" "${@:2}" >/dev/null
    "$QWEN_LORA" world check "$out/$1-$noise" --list --json >"$out/part.json"
    mv "$out/part.json" "$out/$1-$noise.json"
  done
}
score base
for seed in ${SEEDS:-1 2 3}; do
  for weight in 0 "${WEIGHT:-1}"; do
    name=$([ "$weight" = 0 ] && echo "without-$seed" || echo "with-$seed")
    "$QWEN_LORA" train --config scripts/world/anatomy.yaml --quiet --resume auto --set seed="$seed" --set model.path="$model" \
      --set data.path="$out/figures" --set data.pose_loss_weight="$weight" --set loss.gate.to="${GATE:-0.5}" \
      --set training.max_steps="$steps" --set save.every="$steps" --set data.cache_dir="$out/cache" --set output="$out/run-$name"
    score "$name" --lora "$out/run-$name/adapter.safetensors"
  done
done
python3 scripts/world/anatomy_table.py "$out" "$noises" ${SEEDS:-1 2 3}
