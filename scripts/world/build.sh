#!/usr/bin/env bash
# Rebuilds assets/world from nothing but the code: draws the pictures, trains the autoencoder and the pose network in
# PyTorch and the transformer by this program, and rounds all to f16. docs/world.md says how long it takes.
#
#   bash scripts/reference/setup_env.sh DIR             once: the Python environment, in DIR/venv
#   bash scripts/world/build.sh DIR/venv/bin/python [WORK_DIR [MODEL_DIR]]
#
# WORK_DIR (build/world) holds what is made on the way; a step whose result is there is not done again, and a training
# run that was cut off goes on. QWEN_LORA names a binary to use instead of a fresh release build, THREADS the number of
# threads (2): on a machine that does other things as well, 1 is faster.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:?the Python of the reference environment}
work=${2:-build/world}
model=${3:-assets/world}
threads=${THREADS:-2}
scripts=scripts/world
export RAYON_NUM_THREADS=$threads OMP_NUM_THREADS=$threads
if [ -z "${QWEN_LORA:-}" ]; then
  cargo build --release --locked
  QWEN_LORA=target/release/qwen-lora
fi
mkdir -p "$work"
clock() { printf '%s  %s\n' "$(date +%T)" "$*"; }

draw() { # FOLDER ARGUMENTS...
  [ -d "$work/$1" ] || "$QWEN_LORA" world draw --out "$work/$1" "${@:2}"
}
clock "pictures"
draw pictures --count 12000 --seed 1
draw styles --count 4000 --seed 2 --style plain,ink,hat
draw held-out --count 600 --seed 3 --split held-out --style plain,ink,hat

start=$work/start
clock "tokenizer and text encoder"
[ -e "$start/text_encoder/model.safetensors" ] || "$python" $scripts/text_encoder.py --pictures "$work/pictures" --out "$start"
clock "autoencoder"
[ -e "$start/vae/config.json" ] || "$python" $scripts/train_vae.py --pictures "$work/styles" --out "$start" --threads "$threads"
"$python" $scripts/check_vae.py "$start"
clock "pose network"
[ -e "$start/pose.safetensors" ] || "$python" $scripts/pose.py --pictures "$work/styles" --held-out "$work/held-out" \
  --out "$start/pose.safetensors" --threads "$threads"
clock "transformer"
[ -e "$start/model_index.json" ] || "$python" $scripts/transformer.py init --out "$start"
train() { # RUN PICTURES ARGUMENTS...
  "$QWEN_LORA" train --config $scripts/train.yaml --resume auto --set "model.path=$start" --set "output=$work/$1" \
    --set "data.path=$work/$2" --set "data.cache_dir=$work/cache" "${@:3}"
}
train run pictures
clock "transformer, with more of what is hard to draw"
[ -d "$work/emphasis" ] || "$python" $scripts/emphasis.py "$work/pictures" "$work/emphasis"
train run-2 emphasis --set "model.transformer=$work/run/transformer" --set training.learning_rate=6e-4 \
  --set training.max_steps=4000 --set training.warmup_steps=50 --set seed=2

clock "f16"
mkdir -p "$model"
cp -r "$start"/{model_index.json,scheduler,tokenizer,text_encoder,vae,pose.safetensors} "$model"
"$python" $scripts/transformer.py half "$work/run-2/transformer" --out "$model"
du -cb "$model"/*/* "$model"/*.* | tail -1
clock "done"
