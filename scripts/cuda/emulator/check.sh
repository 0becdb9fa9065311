#!/usr/bin/env bash
# Runs the CUDA program on the emulated GPU: some ten minutes on two cores; with --kernels much longer, see below.
#
#   scripts/cuda/emulator/check.sh --binary FILE --emulator DIR [--output DIR] [--kernels]
#
#   --binary FILE    qwen-lora built with `--features cuda`
#   --emulator DIR   what build.sh has built
#   --output DIR     where results and logs go [default: cuda-emulated]
#   --kernels        the self-test of all ops on small tensors as well: more than half an hour; it was never waited for to its end
#
# The exit code is 1 if anything is off.
set -uo pipefail
cd "$(dirname "$0")/../../.."

binary='' emulator='' output=cuda-emulated kernels=''
while [ $# -gt 0 ]; do
  case $1 in
    --binary) binary=$(realpath "$2"); shift ;;
    --emulator) emulator=$2; shift ;;
    --output) output=$2; shift ;;
    --kernels) kernels=yes ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift
done
[ -x "$binary" ] && [ -e "$emulator/settings" ] || { echo "usage: $0 --binary FILE --emulator DIR" >&2; exit 2; }
rm -rf "$output"
mkdir -p "$output"
output=$(realpath "$output")
source "$emulator/settings"
export EMULATOR_LAUNCHED=$output/launched.txt

failed=0
say() {
  printf '%-66s %s\n' "$1" "$2"
  [ "${2%% *}" = ok ] || failed=1
}
# run NAME COMMAND...: the exit code decides.
run() {
  local name=$1 began=$SECONDS
  shift
  if "$@" >"$output/${name// /-}.log" 2>&1; then say "$name" "ok, $((SECONDS - began)) s"
  else say "$name" "FAILED: see $output/${name// /-}.log"; fi
}

cases=tests/fixtures/reference
for name in case_a case_b; do
  for dtype in f32 bf16 int8; do
    run "verify $name $dtype" "$binary" verify --model $cases/$name/pipe --reference $cases/$name --device cuda:0 --dtype $dtype
  done
done

mkdir "$output/images"
cp tests/fixtures/images/{cmyk,exif_1,exif_2}.jpg "$output/images"
"$binary" synth --preset tiny --layers 4 --out "$output/four" >/dev/null
cat >"$output/recipe.yaml" <<RECIPE
model: $output/four
device: cuda:0
seed: 7
training: {batch_size: 2, learning_rate: 2e-3, warmup_steps: 0, max_steps: 4}
lora: {rank: 4, alpha: 6}
data: {path: $output/images, resolution: [64], held_out: 1, default_caption: a picture}
evaluation: {every: 2, num_sigmas: 1}
save: {every: 2}
RECIPE
train() { "$binary" train --config "$output/recipe.yaml" --set "output=$output/$1" "${@:2}"; }
# same NAME YES_OR_NO: whether a run's adapter is that of the plain one, byte for byte.
same() {
  local found=no
  cmp -s "$output/$1/adapter.safetensors" "$output/plain/adapter.safetensors" && found=yes
  say "  $1: the same adapter? $2" "$([ $found = "$2" ] && echo ok || echo "FAILED: $found")"
}
run "train plain" train plain
cp -r "$output/plain" "$output/resumed"
rm -r "$output"/resumed/{adapter.safetensors,checkpoints/step-000004}
run "train resumed after step 2" train resumed --resume auto
same resumed yes
swap=(--set model.blocks_to_swap=3)
for order in in-order copies-late copies-early; do
  EMULATOR_STREAMS=$order run "train swapped $order" train "swapped-$order" "${swap[@]}"
  same "swapped-$order" yes
done
# Without its waits a run must go wrong, or the orders above prove nothing.
for order in copies-late copies-early; do
  EMULATOR_STREAMS=$order EMULATOR_WITHOUT_WAITS=1 train "unordered-$order" "${swap[@]}" >"$output/unordered-$order.log" 2>&1
  same "unordered-$order" no
done
run "train streamed modulation" train streamed --set model.modulation=streamed
same streamed yes
for capability in 80 89 86 120 75; do
  EMULATOR_CAPABILITY=$capability run "train compute capability $capability" train "capability-$capability" --set training.max_steps=1
done
run "generate" "$binary" generate --model "$output/four" --lora "$output/plain/adapter.safetensors" --prompt "a picture" \
  --size 64x64 --steps 2 --device cuda:0 --output "$output/picture.png"

# The published model's memory: nothing is computed.
export EMULATOR_COMPUTE=no EMULATOR_MEMORY_MB=143360
bench() { "$binary" bench --preset qwen-image --device cuda:0 --steps 2 --warmup 1 "$@" 2>>"$output/bench.log" | tail -n 1 >>"$output/bench.json"; }
for side in 512 768 1024; do
  for dtype in bf16 int8; do
    for keep in none selective full; do bench --dtype $dtype --grid $((side / 16)),$((side / 16)) --checkpointing $keep; done
  done
done
for dtype in bf16 int8; do
  bench --dtype $dtype --checkpointing full --modulation streamed
  bench --dtype $dtype --checkpointing full --modulation streamed --blocks-to-swap 30
done
unset EMULATOR_COMPUTE EMULATOR_MEMORY_MB
env -u PYTHONHOME -u PYTHONPATH python3 - "$output/bench.json" <<'PYTHON'
import json
import sys

rows = [json.loads(line) for line in open(sys.argv[1])]
print(f"{'side':>5} {'base':5} {'keeps':10} {'modulation':11} {'swapped':>7} {'held, GB':>9} {'forecast':>9}")
wrong = len(rows) != 22
for row in rows:
    held, forecast = (row[name] * 2**20 / 1e9 for name in ("peak_device_mb", "forecast_mb"))
    ok = held <= forecast <= 1.08 * held
    wrong |= not ok
    side = 16 * round(row["image_tokens"] ** 0.5)
    print(f"{side:5} {row['dtype']:5} {row['checkpointing']:10} {row['modulation']:11} {row['blocks_to_swap']:7} {held:9.1f} "
          f"{forecast:9.1f}{'' if ok else '  FAILED'}")
sys.exit(wrong)
PYTHON
[ $? = 0 ] && say "memory of the published model, against the forecast" ok || say "memory of the published model, against the forecast" FAILED

[ -z "$kernels" ] || run "kernels" "$binary" kernels --device cuda:0 --sizes small

# Kernels that a run of a kind does not launch: those of other tensors, and two that no op uses.
launched=$(grep -oE '^[a-z0-9_]+\.(sm90\.cubin)$' "$EMULATOR_LAUNCHED" | sed 's/\..*//' | sort -u)
all=$(cd src/kernels/cuda/cubin && ls ./*.sm90.cubin | sed 's,^\./,,; s/\..*//' | sort -u)
printf 'kernels launched: %d of %d; not: %s\n' "$(wc -w <<<"$launched")" "$(wc -w <<<"$all")" \
  "$(comm -13 <(echo "$launched") <(echo "$all") | tr '\n' ' ')"
exit $failed
