#!/usr/bin/env python3
"""Seeds for the fuzzer from the recorded adapter files: each header behind a byte that makes `reader` put zeros behind it.

  python fuzz/seeds.py        # from the repository's root; writes fuzz/corpus/adapter_reader/
"""
import os, struct, sys

source, out = "tests/fixtures/adapters/diffusers", "fuzz/corpus/adapter_reader"
os.makedirs(out, exist_ok=True)
for name in sorted(os.listdir(source)):
    if not name.endswith(".safetensors"):
        continue
    with open(os.path.join(source, name), "rb") as f:
        data = f.read()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    for choice in (1, 7, 21):
        with open(os.path.join(out, f"{name[:-12]}-{choice}"), "wb") as f:
            f.write(bytes([choice]) + header)
# A whole file, and a header with a configuration beside it.
with open(os.path.join(source, "lora_unet_downup_alpha.safetensors"), "rb") as f:
    whole = f.read()
with open(os.path.join(out, "whole"), "wb") as f:
    f.write(b"\x00" + whole)
with open(os.path.join(source, "peft_ab.safetensors"), "rb") as f:
    data = f.read()
(length,) = struct.unpack("<Q", data[:8])
config = b'{"r": 4, "lora_alpha": 8, "use_rslora": true, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"^x": 2}}'
with open(os.path.join(out, "config"), "wb") as f:
    f.write(b"\x09" + data[8 : 8 + length] + b"\xff" + config)
