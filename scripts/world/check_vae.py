#!/usr/bin/env python3
"""Does diffusers read `vae/` as the network that was trained? Exit code 1 if not.

  python check_vae.py MODEL_DIR
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file

from vae import Vae, planar_tensors

LIMIT = 2e-5


@torch.no_grad()
def main():
    folder = Path(sys.argv[1]) / "vae"
    planar = Vae()
    planar.load_state_dict(planar_tensors(load_file(folder / "diffusion_pytorch_model.safetensors")))
    published = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=torch.float32).eval()
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    mean, logvar = planar.encode(pixels)
    theirs = published.encode(pixels.unsqueeze(2)).latent_dist
    decoded, decoded_theirs = planar.decode(mean).clamp(-1, 1), published.decode(mean.unsqueeze(2)).sample[:, :, 0]
    errors = {
        "mean": (mean - theirs.mean[:, :, 0]).abs().max() / mean.abs().max(),
        "logvar": (logvar - theirs.logvar[:, :, 0]).abs().max() / logvar.abs().max(),
        "pixels": (decoded - decoded_theirs).abs().max(),
    }
    print("  ".join(f"{name} {error.item():.1e}" for name, error in errors.items()))
    sys.exit(any(not error <= LIMIT for error in errors.values()))


if __name__ == "__main__":
    main()
