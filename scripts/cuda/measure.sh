#!/usr/bin/env bash
# Everything that only a GPU can say, in one go of less than eight minutes: whether the networks and kernels compute what
# they should, and how long a training step of the published model takes beside PyTorch's.
#
#   scripts/cuda/measure.sh --binary FILE [--python PYTHON] [--output DIR] [--device cuda:0] [--quick]
#
#   --binary FILE    qwen-lora built with `--features cuda`, or the same in gzip
#   --python PYTHON  an interpreter with PyTorch for CUDA 13 [default: python3]
#   --output DIR     where the results go: table.txt, *.json, *.log [default: cuda-measured]
#   --device NAME    which GPU [default: cuda:0]
#   --quick          512x512 alone, without PyTorch
#
# Needs an NVIDIA driver for CUDA 13 and, beside the binary, libcublas, libcurand and libcudart of CUDA 13; where they are
# not installed, those of the PyTorch installation are taken. 80 GB of GPU memory for every line; what does not fit says so.
# A part that fails is named, the others run all the same; the exit code is 1 if any failed, 2 if there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."

binary='' python=python3 output=cuda-measured device=cuda:0 quick=''
while [ $# -gt 0 ]; do
  case $1 in
    --binary) binary=$2; shift ;;
    --python) python=$2; shift ;;
    --output) output=$2; shift ;;
    --device) device=$2; shift ;;
    --quick) quick=yes ;;
    *) sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$output"
rm -f "$output"/*.json "$output"/*.log "$output"/table.txt
case $binary in
  *.gz) gunzip -c "$binary" >"$output/qwen-lora" && chmod +x "$output/qwen-lora" && binary=$output/qwen-lora ;;
esac
[ -x "$binary" ] || { echo "--binary: \`$binary\` is no program" >&2; exit 2; }

libraries=$("$python" - <<'PYTHON' 2>/dev/null
import glob, os, site, sys
folders = site.getsitepackages() + [site.getusersitepackages()] + sys.path
print(":".join(p for f in dict.fromkeys(folders) for p in glob.glob(os.path.join(f, "nvidia", "*", "lib"))))
PYTHON
)
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64:$libraries

failed=()
began=$SECONDS
# part NAME LIMIT_S COMMAND...: output to NAME.log, and standard output to NAME.json as well.
part() {
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  timeout "$limit" "$@" >"$output/$name.json" 2>"$output/$name.log"
  code=$?
  printf '%-28s %s, %d s\n' "$name" "$([ $code = 0 ] && echo ok || echo "FAILED with $code: see $output/$name.log")" $((SECONDS - started))
  [ $code = 0 ] || { failed+=("$name"); tail -n 5 "$output/$name.log" | sed 's/^/    /'; }
  return $code
}

{ date -u +%Y-%m-%d; nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader; } \
  2>&1 | tee "$output/machine.txt"
"$binary" --version | tee -a "$output/machine.txt"
part kernels 180 "$binary" kernels --device "$device"
case $? in
  0) ;;
  2) echo "there is no GPU to measure" >&2; exit 2 ;;
  *) sed -n '/FAILED/p' "$output/kernels.json" ;;
esac

cases=tests/fixtures/reference
for name in case_a case_b; do
  for dtype in f32 bf16 int8; do
    part "verify-$name-$dtype" 60 "$binary" verify --model $cases/$name/pipe --reference $cases/$name --device "$device" --dtype $dtype --json
  done
done

sides=(512 768 1024)
[ -z "$quick" ] || sides=(512)
for side in "${sides[@]}"; do
  for dtype in bf16 int8; do
    for keep in full selective none; do
      part "bench-$side-$keep-$dtype" 60 "$binary" bench --preset qwen-image --device "$device" --dtype $dtype \
        --grid $((side / 16)),$((side / 16)) --checkpointing $keep --steps 5 --warmup 2
    done
  done
done
if [ -z "$quick" ]; then
  # The claim that a card of 24 GB trains at 1024x1024: under 22 GB.
  part bench-1024-full-int8-streamed 60 "$binary" bench --preset qwen-image --device "$device" --dtype int8 \
    --checkpointing full --modulation streamed --steps 5 --warmup 2
  # The same with half of the blocks in host memory, from where they are copied beside the computation.
  part bench-1024-full-int8-swapped 90 "$binary" bench --preset qwen-image --device "$device" --dtype int8 \
    --checkpointing full --modulation streamed --blocks-to-swap 30 --steps 5 --warmup 2
fi
part bench-512-composed 60 "$binary" bench --preset qwen-image --device "$device" --dtype bf16 --grid 32,32 --layers 12 \
  --checkpointing full --steps 3 --warmup 1 --composed
part steps-1000 90 "$binary" bench --preset qwen-image --device "$device" --dtype bf16 --grid 16,16 --text 64 --layers 4 \
  --checkpointing none --steps 1000 --warmup 2

if [ -z "$quick" ]; then
  left=$((465 - (SECONDS - began)))
  [ $left -gt 60 ] || left=60
  part torch $left "$python" scripts/cuda/bench_torch_gpu.py --device "$device" --seconds $((left - 45)) --sides 1024,512,768
fi

"$python" scripts/cuda/table.py "$output" | tee "$output/table.txt"
printf '\n%d s; results in %s\n' $((SECONDS - began)) "$output"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[*]}" >&2
  exit 1
fi
