#!/usr/bin/env python3
"""Trains the world's autoencoder on drawn pictures and writes `vae/` in the published layout.

  python train_vae.py --pictures DIR --out MODEL_DIR [--threads 2] [--seed 7]

Loss: L1 and squared error on pixels (L1 alone first learns the ground and stays there), L1 on their differences to the
right and below (edges), and a little KL divergence. Crops are changed in colour, mirrored, enlarged, and mixed with
scribbles of lines and polygons, so that a style that an adapter learns later can be drawn too. After `--steps` steps the
encoder is left as it is, and the decoder goes on for `--decoder-steps` on whole pictures as they are, three of four of
the world: what it is there to draw.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.nn import functional as F

from common import DIFFUSERS_VERSION, deterministic, pictures, save_half, save_json, to_unit
from vae import Vae, planar_tensors, published_config, published_tensors

CROP = 64


def scribbles(count, side, seed):
    """Pictures of random lines, polygons and ellipses on plain or shaded ground: uint8 (N, 3, H, W)."""
    rng = np.random.default_rng(seed)
    out = np.empty((count, side, side, 3), np.uint8)
    for i in range(count):
        big = side * 2
        colour = lambda: tuple(int(v) for v in rng.integers(0, 256, 3))
        image = Image.new("RGB", (big, big), colour())
        if rng.random() < 0.3:
            ramp = np.linspace(0, 1, big)[:, None, None] * np.ones((1, big, 1))
            a, b = np.array(colour()), np.array(colour())
            image = Image.fromarray((a + (b - a) * ramp).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(rng.integers(3, 14)):
            points = [tuple(p) for p in rng.integers(0, big, (rng.integers(3, 6), 2)).tolist()]
            kind, width = rng.integers(0, 4), int(rng.integers(1, 12))
            if kind == 0:
                draw.polygon(points, fill=colour())
            elif kind == 1:
                draw.line(points, fill=colour(), width=width)
            elif kind == 2:
                x, y = points[0]
                r = int(rng.integers(4, big // 4))
                draw.ellipse((x - r, y - r, x + r, y + r), fill=colour(), outline=colour(), width=width)
            else:
                # Hatching: parallel lines, as pencils leave them.
                x, y = points[0]
                c, gap = colour(), int(rng.integers(4, 12))
                for k in range(int(rng.integers(4, 12))):
                    draw.line([(x + k * gap, y), (x + k * gap + 30, y + 60)], fill=c, width=1 + width // 4)
        out[i] = np.asarray(image.resize((side, side), Image.LANCZOS))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def crops(images, batch, generator):
    """A batch of random crops in [-1, 1]: mirrored, enlarged and changed in colour at random."""
    side = images.shape[-1]
    draw = lambda n: int(torch.randint(n, (1,), generator=generator))
    out = []
    for _ in range(batch):
        size = CROP if draw(4) else CROP * 3 // 4
        y, x = draw(side - size + 1), draw(side - size + 1)
        crop = to_unit(images[draw(len(images)), :, y : y + size, x : x + size])
        if size != CROP:
            crop = F.interpolate(crop[None], size=CROP, mode="bilinear")[0]
        if draw(2):
            crop = crop.flip(-1)
        if draw(2):
            crop = crop[torch.randperm(3, generator=generator)]
            gain = 0.6 + 0.4 * torch.rand(3, 1, 1, generator=generator)
            shift = (1 - gain) * (2 * torch.rand(3, 1, 1, generator=generator) - 1)
            crop = crop * gain * (1 - 2 * draw(2)) + shift
        out.append(crop)
    return torch.stack(out)


def edges(x):
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def errors(out, pixels):
    l1, squared = (out - pixels).abs().mean(), (out - pixels).square().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(edges(out), edges(pixels)))
    return l1, squared, edge


def loss_terms(vae, pixels, generator):
    mean, logvar = vae.encode(pixels)
    noise = torch.randn(mean.shape, generator=generator)
    out = vae.decode(mean + (logvar / 2).exp() * noise)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return *errors(out, pixels), kl


def train(weights, steps, rate, loss):
    """AdamW over `weights`, the rate falling to 0 along a cosine; `loss` gives the terms by name and their sum."""
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        terms, total = loss()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            line = " ".join(f"{name} {value.item():.5f}" for name, value in terms.items())
            print(f"step {step} {line} {time.time() - started:.0f} s", flush=True)


@torch.no_grad()
def measure(vae, images, batch=50):
    """Statistics of the latents (per channel) and PSNR in dB of whole pictures, decoded from the mean."""
    means, error, count = [], 0.0, 0
    for i in range(0, len(images), batch):
        pixels = to_unit(images[i : i + batch])
        mean, _ = vae.encode(pixels)
        out = vae.decode(mean).clamp(-1, 1)
        error += ((out - pixels) / 2).square().sum().item()
        count += pixels.numel()
        means.append(mean)
    means = torch.cat(means).transpose(0, 1).flatten(1)
    return means.mean(1).tolist(), means.std(1).tolist(), -10 * math.log10(error / count)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--pictures", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--steps", type=int, default=2500)
    ap.add_argument("--decoder-steps", type=int, default=1500, help="steps of the decoder alone, after the others")
    ap.add_argument("--decoder-of", metavar="MODEL_DIR", help="take this model's autoencoder and train its decoder only")
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--lr", type=float, default=1.5e-3)
    ap.add_argument("--kl", type=float, default=1e-4)
    ap.add_argument("--count", type=int, default=4000, help="pictures used")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--seed", type=int, default=7)
    a = ap.parse_args()
    deterministic(a.seed, a.threads)
    drawn, _ = pictures(a.pictures, a.count)
    held_out, drawn = drawn[: len(drawn) // 20], drawn[len(drawn) // 20 :]
    images = torch.cat([drawn, scribbles(len(drawn) // 5, drawn.shape[-1], a.seed)])
    generator = torch.Generator().manual_seed(a.seed)
    vae = Vae().to(memory_format=torch.channels_last)
    weights = [p for p in vae.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in vae.parameters())} parameters, {len(images)} pictures", flush=True)

    def whole():
        pixels = crops(images, a.batch, generator).contiguous(memory_format=torch.channels_last)
        l1, squared, edge, kl = loss_terms(vae, pixels, generator)
        terms = {"l1": l1, "mse": squared, "edge": edge, "kl": kl}
        return terms, l1 + 5 * squared + 0.5 * edge + a.kl * kl

    def decoder_only():
        index = torch.cat([
            torch.randint(len(drawn), (6,), generator=generator),
            torch.randint(len(drawn), len(images), (2,), generator=generator),
        ])
        pixels = to_unit(images[index]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            mean, _ = vae.encode(pixels)
            # What a model samples is not quite what the encoder gives.
            mean += 0.05 * mean.std() * torch.randn(mean.shape, generator=generator)
        l1, squared, edge = errors(vae.decode(mean), pixels)
        return {"l1": l1, "mse": squared, "edge": edge}, l1 + 5 * squared + 0.5 * edge

    if a.decoder_of:
        tensors = load_file(Path(a.decoder_of) / "vae" / "diffusion_pytorch_model.safetensors")
        vae.load_state_dict(planar_tensors(tensors))
    else:
        train(weights, a.steps, a.lr, whole)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    train([p for p in weights if p.requires_grad], a.decoder_steps, a.lr, decoder_only)
    # What is shipped is f16: measure that.
    vae.load_state_dict({k: v.half().float() for k, v in vae.state_dict().items()})
    mean, std, psnr = measure(vae, drawn[:1000])
    print(f"held-out PSNR {measure(vae, held_out)[2]:.2f} dB (1000 seen: {psnr:.2f})")
    print("latent std per channel:", " ".join(f"{v:.2f}" for v in std))
    out = Path(a.out) / "vae"
    save_half(out / "diffusion_pytorch_model.safetensors", published_tensors(vae))
    save_json(out / "config.json", published_config(mean, std, DIFFUSERS_VERSION))


if __name__ == "__main__":
    main()
