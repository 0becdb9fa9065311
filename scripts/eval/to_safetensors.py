#!/usr/bin/env python3
"""Rewrites a PyTorch file of weights (.pth, .pt, .bin) as safetensors, for `qwen-lora eval`.

    pip install torch safetensors
    python scripts/eval/to_safetensors.py pt_inception-2015-12-05-6726825d.pth inception.safetensors
"""

import sys

import torch
from safetensors.torch import save_file

if len(sys.argv) != 3:
    sys.exit(__doc__)
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
state = state.get("state_dict", state)
save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, sys.argv[2])
print(f"{len(state)} tensors")
