#!/usr/bin/env bash
# A CUDA compiler and libraries to build with, on a machine that has no CUDA toolkit (and needs no GPU): NVIDIA's own
# wheels from PyPI, pinned together at 13.0, laid out as a toolkit. 1.3 GB.
#
#   scripts/cuda/toolchain.sh DIR           install into DIR, then say what to set
#   eval "$(scripts/cuda/toolchain.sh DIR)" the same, and set it in this shell
#
# Needs pip for Python 3 and a C compiler. A newer nvcc than 13.0 would write PTX that drivers of CUDA 13.0 refuse.
set -euo pipefail

[ $# = 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
mkdir -p "$1"
directory=$(cd "$1" && pwd)
root=$directory/nvidia/cu13
capability=${CUDA_COMPUTE_CAP:-90}

if [ ! -e "$directory/whole" ]; then
  python3 -m pip install --quiet --no-deps --upgrade --target "$directory" \
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-cccl==13.0.85 nvidia-curand==10.4.0.35 nvidia-cublas==13.1.0.3 nvidia-cuda-nvrtc==13.0.88 \
    nvidia-cuda-profiler-api==13.0.85 >&2
  [ -x "$root/bin/nvcc" ] || chmod +x "$root"/bin/* "$root"/nvvm/bin/* 2>/dev/null || true
  # As a toolkit names them.
  ln -sfn lib "$root/lib64"
  for library in "$root"/lib/lib*.so.*; do
    plain=${library%%.so.*}.so
    [ -e "$plain" ] || ln -s "$(basename "$library")" "$plain"
  done
  # The driver's library is part of the driver. To link, names are enough: every function returns 100, no device.
  names=$(grep -ohE '\bcu[A-Z][A-Za-z0-9_]*\b' "$root"/include/cuda.h | sort -u)
  stub=$directory/libcuda.c
  { for name in $names; do printf 'int %s(void) { return 100; }\n' "$name"; done; } >"$stub"
  mkdir -p "$root/lib/stubs"
  cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$root/lib/stubs/libcuda.so" "$stub"
  ln -sfn stubs/libcuda.so "$root/lib/libcuda.so"
  touch "$directory/whole"
fi

cat <<SETTINGS
export CUDA_HOME='$root' CUDA_PATH='$root' CUDA_ROOT='$root' CUDA_TOOLKIT_ROOT_DIR='$root'
export CUDA_COMPUTE_CAP='$capability'
export PATH='$root/bin':"\$PATH"
export LIBRARY_PATH='$root/lib':'$root/lib/stubs'\${LIBRARY_PATH:+:"\$LIBRARY_PATH"}
SETTINGS
