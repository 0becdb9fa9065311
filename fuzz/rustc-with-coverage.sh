#!/usr/bin/env bash
# A RUSTC_WRAPPER: what libFuzzer needs to see goes into this crate and the fuzz targets, everything else is left as it is.
set -euo pipefail
rustc=$1
shift
name=
for ((i = 1; i < $#; i++)); do
  if [ "${!i}" = --crate-name ]; then j=$((i + 1)) name=${!j}; fi
done
case $name in
  qwen_lora | adapter_reader)
    exec "$rustc" "$@" --cfg fuzzing -Cdebug-assertions -Coverflow-checks -Cpasses=sancov-module \
      -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
      -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
    ;;
  *) exec "$rustc" "$@" ;;
esac
