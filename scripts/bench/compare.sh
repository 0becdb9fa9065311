#!/usr/bin/env bash
# Seconds per training step, peak memory and start-up time of qwen-lora and of the PyTorch stack, run in turn on the same
# model folder with the same shapes. Prints a markdown table of medians and spread, then every run's JSON line.
#
#   scripts/bench/compare.sh --model DIR --python PYTHON [options]
#
#   --model DIR            transformer folder, made by `bench_torch.py --make-model DIR`
#   --python PYTHON        interpreter of the environment that scripts/reference/setup_env.sh makes
#   --qwen-lora BINARY     default: target/release/qwen-lora
#   --dtype f32|bf16       default: f32; torch in bf16: bf16 base, f32 adapter, autocast
#   --checkpointing none|selective|full
#                          default: none; torch knows only none and full, and runs full for selective
#   --runs N               counted runs of each engine, default 3
#   --steps N --warmup N --threads N      defaults 8, 2, 2
#   --grid H,W --text N --batch N --rank N    defaults 16,16, 64, 2, 16
#   --max-discarded N      give up after so many disturbed runs, default 10
#
# A run counts only if other processes took at most 5 % of the machine's CPU time while it lasted: torch's by its own
# measure over the timed steps, ours measured here over the whole process. A disturbed run is repeated.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

model='' python='' binary=${CARGO_TARGET_DIR:-target}/release/qwen-lora
dtype=f32 checkpointing=none runs=3 max_discarded=10
steps=8 warmup=2 threads=2 grid=16,16 text=64 batch=2 rank=16
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit ;;
    --model | --python | --dtype | --checkpointing | --runs | --steps | --warmup | --threads | --grid | --text | --batch | \
      --rank | --max-discarded | --qwen-lora)
      [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
      name=${1#--} name=${name//-/_}
      [ "$name" = qwen_lora ] && name=binary
      printf -v "$name" '%s' "$2"
      shift 2 ;;
    *) echo "unknown option \`$1\`; see --help" >&2; exit 2 ;;
  esac
done
[ -f "$model/config.json" ] || { echo "--model wants a transformer folder, found \`$model\`" >&2; exit 2; }
[ -x "$python" ] || { echo "--python wants an interpreter, found \`$python\`" >&2; exit 2; }
[ -x "$binary" ] || { echo "\`$binary\` is not built; see --qwen-lora" >&2; exit 2; }
case $checkpointing in none) torch_checkpointing=() ;; selective | full) torch_checkpointing=(--ckpt) ;;
  *) echo "--checkpointing wants none, selective or full" >&2; exit 2 ;; esac

shapes=(--grid "$grid" --text "$text" --batch "$batch" --rank "$rank" --steps "$steps" --warmup "$warmup" --threads "$threads")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# CPU seconds that the whole machine has worked: user, nice, system, irq, softirq, steal.
busy_seconds() {
  awk -v hz="$(getconf CLK_TCK)" '/^cpu / { printf "%.2f", ($2 + $3 + $4 + $7 + $8 + $9) / hz }' /proc/stat
}

run_torch() {
  "$python" "$here/../reference/bench_torch.py" --model "$model" --dtype "$dtype" "${torch_checkpointing[@]}" \
    "${shapes[@]}" 2>"$work/log" | tail -n 1
}

# The JSON line, with the share of the CPU that others took while the process lasted.
run_qwen_lora() {
  local before after wall user system TIMEFORMAT='%R %U %S'
  before=$(busy_seconds)
  { time "$binary" bench --model "$model" --dtype "$dtype" --checkpointing "$checkpointing" "${shapes[@]}" \
    >"$work/out" 2>"$work/log"; } 2>"$work/times" || return
  after=$(busy_seconds)
  read -r wall user system < <(tail -n 1 "$work/times")
  awk -v before="$before" -v after="$after" -v wall="$wall" -v user_s="$user" -v system_s="$system" \
    -v cpus="$(nproc)" -v line="$(tail -n 1 "$work/out")" 'BEGIN {
      others = (after - before - user_s - system_s) / (wall * cpus)
      sub(/}$/, sprintf(",\"cpu_share_of_other_processes\":%.3f}", others > 0 ? others : 0), line)
      print line
    }'
}

# Runs one engine until a run counts, and appends its line to the results.
counted_run() {
  local engine=$1 line share
  while :; do
    line=$("run_$engine") || { echo "$engine failed:" >&2; tail -n 20 "$work/log" >&2; return 1; }
    share=$(sed -n 's/.*"cpu_share_of_other_processes": *\([0-9.]*\).*/\1/p' <<<"$line")
    [ -n "$share" ] || { echo "$engine printed no result: $line" >&2; return 1; }
    if awk "BEGIN { exit !($share <= 0.05) }"; then
      printf '%s\n' "$line" >>"$work/results.jsonl"
      return
    fi
    discarded=$((discarded + 1))
    echo "$engine: discarded, other processes took $share of the CPU ($discarded of at most $max_discarded)" >&2
    [ "$discarded" -le "$max_discarded" ] || { echo "the machine is too busy to time anything" >&2; return 1; }
  done
}

discarded=0
for ((i = 1; i <= runs; i++)); do
  echo "run $i of $runs" >&2
  counted_run torch
  counted_run qwen_lora
done
"$python" "$here/table.py" "$work/results.jsonl"
