#!/usr/bin/env python3
"""The training step of `qwen-lora bench --preset qwen-image` in PyTorch on one GPU: one JSON line a configuration.

    bench_torch_gpu.py [--sides 512,768,1024] [--modes full,none,full+compile] [--layers 60] [--seconds 240]

bf16 base with random weights made on the GPU, f32 adapter of rank 16 on the twelve linears of each block under autocast,
fused AdamW, scaled-dot-product attention; a step is noising, forward, loss, backward, clipping, AdamW. With diffusers and
peft installed the model is diffusers', else the same blocks written out below ("model" in the output says which). Modes:
`full` recomputes every block in the backward pass, `none` keeps everything; `+compile` compiles each block with
torch.compile. What does not fit in memory says so. `--device cpu` with a few layers tries the script itself.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

TARGETS = (
    "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,"
    "img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2"
).split(",")


class LoraLinear(nn.Linear):
    """A frozen linear with an adapter, as peft computes it."""

    rank = 16

    def __init__(self, width_in, width_out):
        super().__init__(width_in, width_out)
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(self.rank, width_in, dtype=torch.float32) / self.rank)
        self.up = nn.Parameter(torch.zeros(width_out, self.rank, dtype=torch.float32))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


def frozen(width_in, width_out):
    return nn.Linear(width_in, width_out).requires_grad_(False)


def rotate(x, angles):
    """Adjacent pairs of (B, S, H, head) by angles (S, head / 2), in f32 as diffusers does."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles[None, :, None]).flatten(3).to(x.dtype)


class Stream(nn.Module):
    """One of the two streams of a block."""

    def __init__(self, dim, head):
        super().__init__()
        self.mod = frozen(dim, 6 * dim)
        self.q, self.k, self.v, self.out = (LoraLinear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(head, eps=1e-6).requires_grad_(False) for _ in range(2))
        self.up, self.down = LoraLinear(dim, 4 * dim), LoraLinear(4 * dim, dim)

    def project(self, x, mods, angles, heads):
        shift, scale, _ = mods
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        q, k, v = (layer(x).unflatten(-1, (heads, -1)) for layer in (self.q, self.k, self.v))
        return rotate(self.norm_q(q), angles), rotate(self.norm_k(k), angles), v

    def finish(self, x, attended, gate, mods):
        x = x + gate[:, None] * self.out(attended)
        shift, scale, gate = mods
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return x + gate[:, None] * self.down(F.gelu(self.up(y), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.img, self.txt = Stream(dim, dim // heads), Stream(dim, dim // heads)

    def forward(self, img, txt, temb, img_angles, txt_angles):
        img_mods, txt_mods = (s.mod(F.silu(temb)).chunk(6, -1) for s in (self.img, self.txt))
        qkv = [
            torch.cat(pair, 1).transpose(1, 2)
            for pair in zip(
                self.txt.project(txt, txt_mods[:3], txt_angles, self.heads),
                self.img.project(img, img_mods[:3], img_angles, self.heads),
            )
        ]
        out = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        txt_out, img_out = out.split([txt.shape[1], img.shape[1]], 1)
        img = self.img.finish(img, img_out, img_mods[2], img_mods[3:])
        return img, self.txt.finish(txt, txt_out, txt_mods[2], txt_mods[3:])


class Written(nn.Module):
    """The blocks and their ends, without diffusers."""

    def __init__(self, layers, heads, head, joint):
        super().__init__()
        dim = heads * head
        self.img_in, self.txt_in, self.time = frozen(64, dim), frozen(joint, dim), frozen(256, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.out = frozen(dim, 64)
        self.head, self.recompute = head, False

    def forward(self, x, text, sigma):
        steps = torch.arange(128, device=x.device)
        features = 1000 * sigma[:, None] * torch.exp(-9.21 * steps / 128)
        temb = self.time(torch.cat([features.cos(), features.sin()], -1).to(x.dtype))
        img, txt = self.img_in(x), self.txt_in(text)
        angles = [torch.randn(t.shape[1], self.head // 2, device=x.device) for t in (img, txt)]
        angles = [torch.polar(torch.ones_like(a), a) for a in angles]
        for block in self.blocks:
            if self.recompute:
                img, txt = checkpoint(block, img, txt, temb, *angles, use_reentrant=False)
            else:
                img, txt = block(img, txt, temb, *angles)
        return self.out(img)


def build(args, device, dtype):
    """(kind, model, function of (x, text, sigma, grid))"""
    torch.manual_seed(7)
    heads, head, joint = args.heads, 128, 3584
    try:
        from diffusers import QwenImageTransformer2DModel
        from peft import LoraConfig
    except ImportError:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = Written(args.layers, heads, head, joint)
        torch.set_default_dtype(torch.float32)
        return "written out", model, lambda x, text, sigma, grid: model(x, text, sigma)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = QwenImageTransformer2DModel(num_layers=args.layers, num_attention_heads=heads, joint_attention_dim=joint)
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=TARGETS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.to(device).train()

    def run(x, text, sigma, grid):
        mask = torch.ones(text.shape[:2], dtype=torch.int64, device=x.device)
        return model(
            hidden_states=x,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[[(1, *grid)]],
            return_dict=False,
        )[0]

    return "diffusers + peft", model, run


def recompute(model, on):
    if isinstance(model, Written):
        model.recompute = on
    elif on:
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()


def compile_blocks(model):
    blocks = model.blocks if isinstance(model, Written) else model.transformer_blocks
    for block in blocks:
        block.compile()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sides", default="512,768,1024")
    parser.add_argument("--modes", default="full,none,full+compile,none+compile")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="no configuration begins after this time")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    began = time.time()
    on_gpu = args.device.startswith("cuda")
    device, dtype = torch.device(args.device), torch.bfloat16
    kind, model, run = build(args, device, dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=on_gpu)
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    compiled = False
    # Compiled blocks stay compiled: those modes come last.
    for mode in sorted(args.modes.split(","), key=lambda m: m.endswith("+compile")):
        keep, _, compile_too = mode.partition("+")
        if compile_too and not compiled:
            compile_blocks(model)
            compiled = True
        recompute(model, keep == "full")
        for side in (int(s) for s in args.sides.split(",")):
            line = {"engine": "torch", "model": kind, "side": side, "mode": mode, "layers": args.layers}
            line |= {"torch": torch.__version__, "device": torch.cuda.get_device_name() if on_gpu else "cpu"}
            if time.time() - began > args.seconds:
                print(json.dumps(line | {"skipped": "out of time"}), flush=True)
                continue
            grid = (side // 16, side // 16)
            x0 = torch.randn(1, grid[0] * grid[1], 64, device=device)
            text = torch.randn(1, args.text, 3584, device=device).to(dtype)
            times, losses = [], []
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                for _ in range(args.warmup + args.steps):
                    synchronize()
                    start = time.time()
                    noise, sigma = torch.randn_like(x0), 0.02 + 0.96 * torch.rand(1, device=device)
                    noisy = ((1 - sigma) * x0 + sigma * noise).to(dtype)
                    with torch.autocast(device.type, dtype):
                        prediction = run(noisy, text, sigma, grid)
                    loss = (prediction.float() - (noise - x0)).pow(2).mean()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    losses.append(loss.item())
                    synchronize()
                    times.append(time.time() - start)
            except torch.OutOfMemoryError:
                optimizer.zero_grad(set_to_none=True)
                loss = prediction = None
                print(json.dumps(line | {"skipped": "out of memory"}), flush=True)
                continue
            timed = sorted(times[args.warmup :])
            peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
            line |= {"step_s_median": timed[len(timed) // 2], "step_s_min": timed[0], "peak_device_mb": peak}
            print(json.dumps(line | {"loss_first": losses[0], "loss_last": losses[-1]}), flush=True)


if __name__ == "__main__":
    main()
