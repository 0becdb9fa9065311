"""What the scripts of the small world share: its pictures, its weight files, its folder."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

DIFFUSERS_VERSION = "0.35.0"


def pictures(folder, limit=None):
    """The drawn pictures of `folder` in the order of its index: uint8 (N, 3, H, W), and the lines of index.jsonl."""
    folder = Path(folder)
    lines = [json.loads(line) for line in open(folder / "index.jsonl", encoding="utf-8")][:limit]
    images = np.stack([np.asarray(Image.open(folder / picture_name(line)).convert("RGB")) for line in lines])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), lines


def picture_name(line):
    """The file of an entry of index.jsonl."""
    return line["file"]


def to_unit(images):
    """uint8 pixels as the networks take them: f32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def save_half(path, tensors, metadata=None):
    """Writes `tensors` in f16, in the order of their names, so that equal weights give equal files."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {name: tensors[name].detach().to(torch.float16).contiguous() for name in sorted(tensors)}
    for name, tensor in half.items():
        if not torch.isfinite(tensor).all():
            raise SystemExit(f"{path}: {name} does not fit f16")
    part = path.with_name(path.name + ".part")
    save_file(half, part, metadata={"format": "pt", **(metadata or {})})
    part.chmod(0o644)
    os.replace(part, path)


def save_json(path, value):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def deterministic(seed, threads):
    """The same arguments give the same weights on the same machine."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
