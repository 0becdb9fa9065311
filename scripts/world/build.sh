#!/usr/bin/env bash
# Rebuilds assets/world from nothing but the code: draws the pictures, trains the autoencoder and the pose network in
# PyTorch and the transformer by this program, and rounds all to f16. docs/world.md says how long it takes.
#
#   bash scripts/reference/setup_env.sh DIR             once: the Python environment, in DIR/venv
#   bash scripts/world/build.sh DIR/venv/bin/python [WORK_DIR [MODEL_DIR]]
#
# WORK_DIR (build/world) holds what is made on the way; a step whose result is there is not done again, and a training
# run that was cut off goes on. QWEN_LORA names a binary to use instead of a fresh release build, THREADS the number of
# threads (2): on a machine that does other things as well, 1 is faster. SHARE (100) is the percentage of pictures and
# training steps: 1 tries in minutes whether every part works, and makes a model that draws nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:?the Python of the reference environment}
work=${2:-build/world}
model=${3:-assets/world}
threads=${THREADS:-2}
share=${SHARE:-100}
scripts=scripts/world
export RAYON_NUM_THREADS=$threads OMP_NUM_THREADS=$threads
if [ -z "${QWEN_LORA:-}" ]; then
  cargo build --release --locked
  QWEN_LORA=target/release/qwen-lora
fi
mkdir -p "$work"
part() { echo $(($1 * share > 100 ? $1 * share / 100 : 1)); }
clock() { printf '%s  %s\n' "$(date +%T)" "$*"; }

draw() { # FOLDER ARGUMENTS...
  [ -d "$work/$1" ] || "$QWEN_LORA" world draw --out "$work/$1" "${@:2}"
}
clock "pictures"
draw pictures --count "$(part 12000)" --seed 1
draw styles --count "$(part 4000)" --seed 2 --style plain,ink,hat
draw held-out --count "$(part 600)" --seed 3 --split held-out --style plain,ink,hat

start=$work/start
clock "tokenizer and text encoder"
[ -e "$start/text_encoder/model.safetensors" ] || "$python" $scripts/text_encoder.py --pictures "$work/pictures" --out "$start"
clock "autoencoder"
[ -e "$start/vae/config.json" ] || "$python" $scripts/train_vae.py --pictures "$work/styles" --out "$start" --threads "$threads" \
  --steps "$(part 2500)" --decoder-steps "$(part 1500)"
"$python" $scripts/check_vae.py "$start"
clock "pose network"
[ -e "$start/pose.safetensors" ] || "$python" $scripts/pose.py --pictures "$work/styles" --held-out "$work/held-out" \
  --out "$start/pose.safetensors" --threads "$threads" --steps "$(part 500)"
clock "transformer"
[ -e "$start/model_index.json" ] || "$python" $scripts/transformer.py init --out "$start"
train() { # RUN PICTURES STEPS WARMUP ARGUMENTS...
  "$QWEN_LORA" train --config $scripts/train.yaml --resume auto --set "model.path=$start" --set "output=$work/$1" \
    --set "data.path=$work/$2" --set "data.cache_dir=$work/cache" --set "training.max_steps=$(part "$3")" \
    --set "training.warmup_steps=$(part "$4")" "${@:5}"
}
emphasis() { # FOLDER STARS
  [ -d "$work/$1" ] || "$python" $scripts/emphasis.py "$work/pictures" "$work/$1" "$2"
}
train run pictures 10000 200
clock "transformer, with more of what is hard to draw"
emphasis stars-3 3
train run-2 stars-3 4000 50 --set "model.transformer=$work/run/transformer" --set training.learning_rate=6e-4 --set seed=2
emphasis stars-5 5
train run-3 stars-5 7000 50 --set "model.transformer=$work/run-2/transformer" --set training.learning_rate=7e-4 --set seed=3

clock "f16"
mkdir -p "$model"
cp -r "$start"/{model_index.json,scheduler,tokenizer,text_encoder,vae,pose.safetensors} "$model"
"$python" $scripts/transformer.py half "$work/run-3/transformer" --out "$model"
du -cb "$model"/*/* "$model"/*.* | tail -1
clock "done"
