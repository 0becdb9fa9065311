"""Records what PyTorch computes with the pose networks and the tiny decoder, for the tests beside them.

    python scripts/pose/make_reference.py tests/fixtures/pose

Needs torch, numpy, pillow and safetensors (versions: scripts/reference/setup_env.sh). PoseNet runs on the weights that
are built into the binary; OpenPose and the tiny decoder on weights that a formula gives (`formula` below, and
in src/pose/weights.rs), so that no large file is needed. All twins are plain torch.nn.functional calls.
"""

import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import hands

ROOT = pathlib.Path(__file__).resolve().parents[2]


def formula(name, shape):
    """Values of a tensor from its name: FNV-1a of the name, then two multiply-xorshift rounds per element."""
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = (seed ^ byte) * 0x01000193 % 2**32
    fan_in = int(np.prod(shape[1:]))
    # Like He's rule for weights, so that signals keep their size through fifty layers; biases within 0.1.
    bound = (6.0 / fan_in) ** 0.5 if len(shape) > 1 else 0.1
    h = (np.arange(int(np.prod(shape)), dtype=np.uint64) + seed) * 0x9E3779B1 % 2**32
    h = (h ^ (h >> 15)) * 0x85EBCA77 % 2**32
    h ^= h >> 13
    values = (h.astype(np.float64) / 2.0**32 * 2.0 - 1.0) * bound
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def conv(x, name, out, kernel, relu=True, bias=True):
    w = formula(f"{name}.weight", (out, x.shape[1], kernel, kernel))
    b = formula(f"{name}.bias", (out,)) if bias else None
    x = F.conv2d(x, w, b, padding=kernel // 2)
    return F.relu(x) if relu else x


def photo(name, width, height):
    image = Image.open(ROOT / "examples/photos" / name).convert("RGB").resize((width, height), Image.BILINEAR)
    return torch.from_numpy(np.array(image))  # (H, W, 3) u8


def posenet(pixels):
    w = load_file(ROOT / "assets/posenet_mv1_075.safetensors")
    x = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1.0
    x = F.hardtanh(F.conv2d(x, w["Conv2d_0.weight"], w["Conv2d_0.bias"], 2, 1), 0, 6)
    for i in range(1, 14):
        k, stride = w[f"Conv2d_{i}_depthwise.weight"], 2 if i in (2, 4, 6) else 1
        x = F.hardtanh(F.conv2d(x, k, w[f"Conv2d_{i}_depthwise.bias"], stride, 1, groups=k.shape[0]), 0, 6)
        x = F.hardtanh(F.conv2d(x, w[f"Conv2d_{i}_pointwise.weight"], w[f"Conv2d_{i}_pointwise.bias"]), 0, 6)
    heads = ("heatmap_2", "offset_2", "displacement_fwd_2", "displacement_bwd_2")
    return {h: F.conv2d(x, w[f"{h}.weight"], w[f"{h}.bias"]) for h in heads}


def trunk(pixels):
    # BGR, padded with 128 at the right and at the bottom to a multiple of 8.
    x = pixels.permute(2, 0, 1)[[2, 1, 0]][None].float()
    h, w = x.shape[2:]
    x = F.pad(x, (0, -w % 8, 0, -h % 8), value=128.0) / 256 - 0.5
    for name, out, pooled in [("conv1_1", 64, False), ("conv1_2", 64, False), ("conv2_1", 128, True),
                              ("conv2_2", 128, False), ("conv3_1", 256, True), ("conv3_2", 256, False),
                              ("conv3_3", 256, False), ("conv3_4", 256, False), ("conv4_1", 512, True),
                              ("conv4_2", 512, False)]:
        x = conv(F.max_pool2d(x, 2) if pooled else x, name, out, 3)
    return x


def stage(x, i, ending, out, last_relu):
    for j in range(1, 6):
        x = conv(x, f"Mconv{j}_stage{i}{ending}", 128, 7)
    x = conv(x, f"Mconv6_stage{i}{ending}", 128, 1)
    return conv(x, f"Mconv7_stage{i}{ending}", out, 1, relu=last_relu)


def body(pixels):
    features = conv(conv(trunk(pixels), "conv4_3_CPM", 256, 3), "conv4_4_CPM", 128, 3)
    first = {}
    for ending, out in (("L1", 38), ("L2", 19)):
        x = features
        for j in range(1, 4):
            x = conv(x, f"conv5_{j}_CPM_{ending}", 128, 3)
        first[ending] = conv(conv(x, f"conv5_4_CPM_{ending}", 512, 1), f"conv5_5_CPM_{ending}", out, 1, relu=False)
    fields, heatmaps = first["L1"], first["L2"]
    for i in range(2, 7):
        joined = torch.cat([fields, heatmaps, features], 1)
        fields, heatmaps = stage(joined, i, "_L1", 38, False), stage(joined, i, "_L2", 19, i == 6)
    return fields, heatmaps


def hand(pixels):
    x = trunk(pixels)
    for name in ("conv4_3", "conv4_4", "conv5_1", "conv5_2"):
        x = conv(x, name, 512, 3)
    features = conv(x, "conv5_3_CPM", 128, 3)
    maps = conv(conv(features, "conv6_1_CPM", 512, 1), "conv6_2_CPM", 22, 1, relu=False)
    for i in range(2, 7):
        maps = stage(torch.cat([maps, features], 1), i, "", 22, False)
    return maps


def mem_block(x, name):
    """A block that sees each frame beside the one before it, over all frames at once."""
    past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    c = x.shape[1]
    y = conv(conv(torch.cat([x, past], 1), f"{name}.conv.0", c, 3), f"{name}.conv.2", c, 3)
    return F.relu(conv(y, f"{name}.conv.4", c, 3, relu=False) + x)


def taehv_decode(z):
    """taew2_1's decoder over frames (T, 16, h, w) of normalised latents, the first three frames trimmed, before the
    clamp to [0, 1]."""
    x = conv(torch.tanh(z / 3) * 3, "decoder.1", 256, 3)
    index = 3
    for width, grows in ((128, 1), (64, 2), (64, 2)):
        for _ in range(3):
            x = mem_block(x, f"decoder.{index}")
            index += 1
        x = F.interpolate(x, scale_factor=2)
        grown = formula(f"decoder.{index + 1}.conv.weight", (x.shape[1] * grows, x.shape[1], 1, 1))
        x = F.conv2d(x, grown).reshape(-1, *x.shape[1:])
        x = conv(x, f"decoder.{index + 2}", width, 3, relu=False, bias=False)
        index += 3
    x = conv(F.relu(x), "decoder.22", 3, 3, relu=False)
    return x[3:]


@torch.no_grad()
def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    pixels = photo("grace_hopper.jpg", 97, 113)
    heads = posenet(pixels)
    save_file({"pixels": pixels, **{k: v.contiguous() for k, v in heads.items()}}, out / "posenet.safetensors")

    pixels = photo("astronaut.jpg", 60, 44)
    fields, heatmaps = body(pixels)
    tensors = {"pixels": pixels, "fields": fields, "heatmaps": heatmaps, "hand": hand(pixels)}
    for k, v in tensors.items():
        print(k, tuple(v.shape), float(v.float().abs().mean()))
    save_file(tensors, out / "openpose.safetensors")

    # 96 x 64 with the grey that fills up to multiples of 32; the network of points looks at all of it.
    pixels = photo("astronaut.jpg", 60, 90)
    w = load_file(ROOT / "assets/hands.safetensors")
    filled = F.pad(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1.0, (0, 4, 0, 6))
    tensors = {"pixels": pixels}
    for stride, (scores, boxes) in hands.palm(w, filled).items():
        tensors |= {f"score.{stride}": scores.contiguous(), f"box.{stride}": boxes.contiguous()}
    tensors |= dict(zip(("points", "presence", "right"), hands.landmark(w, filled * 0.5 + 0.5)))
    save_file(tensors, out / "hands.safetensors")

    # As the formula gives them, but of the size of normalised latents.
    z = formula("latents", (1, 16, 4, 5)) * (16 * 4 * 5 / 6.0) ** 0.5 * 2.0
    image = taehv_decode(z)
    print("tiny decoder", tuple(image.shape), float(image.mean()), float(image.std()))
    save_file({"latents": z.contiguous(), "image": image.contiguous()}, out / "tiny_decoder.safetensors")

    # A PyTorch file in the form of the public ones, two layers of it.
    state = {f"{n}.{p}": formula(f"{n}.{p}", s) for n in ("conv1_1", "conv1_2")
             for p, s in (("weight", (4, 3, 3, 3)), ("bias", (4,)))}
    torch.save(state, out / "tiny.pth")


main()
