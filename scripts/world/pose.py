#!/usr/bin/env python3
"""Trains the world's pose network on the exact joints of drawn figures and writes it as one safetensors file.

  python pose.py --pictures DIR --held-out DIR --out FILE [--steps 500] [--threads 2] [--seed 7]

A plain chain of convolutions, one map per joint at a quarter of the picture's side: cell (i, j) stands for pixel
(4i, 4j). The target of a map is a bump of height 1 around each of its joints; the sigmoid of the output is compared to
it by cross entropy. Colours are changed at random, so that styles are no obstacle. The file says in its metadata how
the layers are put together (docs/pose.md).
"""

import argparse
import json
import math
import time

import torch
from torch import nn
from torch.nn import functional as F

from common import deterministic, pictures, save_half, to_unit

STRIDE = 4
JOINTS = (
    "head neck right_shoulder right_elbow right_hand left_shoulder left_elbow left_hand right_hip right_knee right_foot "
    "left_hip left_knee left_foot"
).split()
# (channels, kernel, stride); the last layer has a channel for each joint.
LAYERS = [(16, 3, 2), (24, 3, 2), (32, 5, 1), (32, 5, 1), (32, 5, 1), (32, 5, 1), (32, 5, 1), (len(JOINTS), 1, 1)]
# A peak counts from here on, and is right within this many pixels.
PEAK, NEAR = 0.5, 4.0


class PoseNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        channels = [3] + [c for c, _, _ in LAYERS]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, kernel, stride, kernel // 2)
            for a, (b, kernel, stride) in zip(channels, LAYERS)
        )  # fmt: skip
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        # Joints are rare: begin with the belief that there are none.
        nn.init.constant_(self.layers[-1].bias, -4.0)

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] -> logits (B, joints, H/4, W/4)"""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)

    def spec(self):
        layers = [
            {"name": f"layers.{i}", "stride": stride, "kernel": kernel, "relu": i + 1 < len(LAYERS)}
            for i, (_, kernel, stride) in enumerate(LAYERS)
        ]
        return {"kind": "heatmap", "stride": STRIDE, "keypoints": JOINTS, "layers": layers}


def joints_of(line):
    """(figures, joints, 2) in cells; the index counts from the corner of a pixel, a cell from its middle."""
    points = [[figure[name] for name in JOINTS] for figure in line["figures"]]
    return (torch.tensor(points).reshape(-1, len(JOINTS), 2) - 0.5) / STRIDE


def bumps(joints, side):
    """(joints, side, side): the highest of the figures' bumps in each cell."""
    cells = torch.arange(side, dtype=torch.float32)
    squared = (cells - joints[..., :1]).square()[..., None, :] + (cells - joints[..., 1:]).square()[..., :, None]
    return torch.exp(-squared / 2).amax(0) if len(joints) else torch.zeros(len(JOINTS), side, side)


def recoloured(pixels, generator):
    """Each picture with its own random contrast, brightness and tint."""
    rand = lambda spread: (2 * torch.rand(len(pixels), 3, 1, 1, generator=generator) - 1) * spread
    return (pixels * (1 + rand(0.15)) + rand(0.1)).clamp(-1, 1)


def peaks(maps):
    """The cells (y, x) of one picture's local maxima above `PEAK`, for each joint."""
    top = F.max_pool2d(maps, 3, 1, 1) == maps
    return [(top[k] & (maps[k] > PEAK)).nonzero() for k in range(len(maps))]


@torch.no_grad()
def accuracy(model, images, lines):
    """Shares of joints found within `NEAR` pixels, of peaks that belong to a joint, and of pictures with all hands and
    no more."""
    found = total = right = all_peaks = hands_right = 0
    hands = [i for i, name in enumerate(JOINTS) if name.endswith("hand")]
    for i in range(0, len(images), 50):
        maps = model(to_unit(images[i : i + 50])).sigmoid()
        for one, line in zip(maps, lines[i : i + 50]):
            truth, at = joints_of(line), peaks(one)
            fits = True
            for k in range(len(JOINTS)):
                distance = torch.cdist(at[k].flip(-1).float(), truth[:, k]) * STRIDE
                hit = (distance <= NEAR).any(0).sum().item() if len(at[k]) and len(truth) else 0
                good = (distance <= NEAR).any(1).sum().item() if len(at[k]) and len(truth) else 0
                found, total = found + hit, total + len(truth)
                right, all_peaks = right + good, all_peaks + len(at[k])
                if k in hands:
                    fits = fits and hit == len(truth) == len(at[k])
            hands_right += fits
    return found / max(total, 1), right / max(all_peaks, 1), hands_right / len(images)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--pictures", required=True)
    ap.add_argument("--held-out", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--steps", type=int, default=500)
    ap.add_argument("--batch", type=int, default=32)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--seed", type=int, default=7)
    a = ap.parse_args()
    deterministic(a.seed, a.threads)
    images, lines = pictures(a.pictures)
    side = images.shape[-1] // STRIDE
    joints = [joints_of(line) for line in lines]
    generator = torch.Generator().manual_seed(a.seed)
    model = PoseNetwork().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(images)} pictures", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=1e-4)
    started = time.time()
    for step in range(a.steps):
        rate = a.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / a.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(images), (a.batch,), generator=generator)
        target = torch.stack([bumps(joints[i], side) for i in chosen.tolist()])
        pixels = recoloured(to_unit(images[chosen]), generator).contiguous(memory_format=torch.channels_last)
        # Cells of a bump weigh more: they are one in a hundred.
        loss = F.binary_cross_entropy_with_logits(model(pixels), target, weight=1 + 8 * target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == a.steps:
            print(f"step {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
    # What is shipped is f16: measure that.
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    recall, precision, hands = accuracy(model, *pictures(a.held_out))
    print(f"held-out: joints found {recall:.4f}, peaks right {precision:.4f}, all hands right {hands:.4f}")
    save_half(a.out, model.state_dict(), {"pose_network": json.dumps(model.spec(), separators=(",", ":"))})


if __name__ == "__main__":
    main()
