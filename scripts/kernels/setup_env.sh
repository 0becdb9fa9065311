#!/usr/bin/env bash
# Python for the GPU kernels: the pinned Triton, which brings its own ptxas, and numpy. No torch, no GPU, 0.7 GB.
#   bash setup_env.sh DIR        then: DIR/bin/python build.py ...
#
# Triton 3.6.0 emits PTX 8.7 and cubins that a driver for CUDA 12.8 and later loads; newer ones ask for newer drivers.
set -euo pipefail
dir=${1:?target folder}
python3 -m venv "$dir"
"$dir/bin/pip" install -q --no-deps --disable-pip-version-check triton==3.6.0 numpy==2.3.5
