#!/usr/bin/env python3
"""The world's transformer: an untrained one to start from, and the trained one in f16.

  python transformer.py init --out MODEL_DIR [--seed 7]      writes transformer/, scheduler/, model_index.json
  python transformer.py half TRAINED_DIR --out MODEL_DIR     rounds a trained transformer/ to f16

The start is that of a DiT: Xavier matrices, biases of zero, modulation and output of zero, so that every block begins
as the identity. `qwen-lora train` with `training.mode: full` does the training.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from common import DIFFUSERS_VERSION, save_half, save_json

CONFIG = {
    "_class_name": "QwenImageTransformer2DModel",
    "_diffusers_version": DIFFUSERS_VERSION,
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 64,
    "num_attention_heads": 5,
    "num_layers": 4,
    "out_channels": 16,
    "patch_size": 2,
}
# That of the published repositories.
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
MODEL_INDEX = {
    "_class_name": "QwenImagePipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def init(out, seed):
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(**{k: v for k, v in CONFIG.items() if not k.startswith("_")})
    for name, p in model.named_parameters():
        if any(part in name for part in ("_mod.1.", "norm_out.linear.", "proj_out.")) or name.endswith(".bias"):
            torch.nn.init.zeros_(p)
        elif p.ndim == 2:
            torch.nn.init.xavier_uniform_(p)
        else:
            torch.nn.init.ones_(p)
    save_half(out / "transformer" / WEIGHTS, model.state_dict())
    save_json(out / "transformer" / "config.json", CONFIG)
    save_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    save_json(out / "model_index.json", MODEL_INDEX)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")


def half(trained, out):
    save_half(out / "transformer" / WEIGHTS, load_file(trained / WEIGHTS))
    shutil.copyfile(trained / "config.json", out / "transformer" / "config.json")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = ap.add_subparsers(dest="verb", required=True)
    start, end = verbs.add_parser("init"), verbs.add_parser("half")
    start.add_argument("--seed", type=int, default=7)
    end.add_argument("trained", type=Path)
    for verb in (start, end):
        verb.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    init(a.out, a.seed) if a.verb == "init" else half(a.trained, a.out)


if __name__ == "__main__":
    main()
