"""Twins of the two hand networks in plain torch.nn.functional calls, on the weights of assets/hands.safetensors."""

import torch
import torch.nn.functional as F


def same(x, w, bias=None, stride=1, groups=1):
    """A convolution with TensorFlow's SAME padding."""
    kernel, pads = w.shape[-1], []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), w, bias, stride, groups=groups)


def palm(w, x):
    """Images (B, 3, H, W) in [-1, 1], sides multiples of 32 -> {stride: (scores, boxes)}."""
    w = {name.removeprefix("palm."): t.float() for name, t in w.items() if name.startswith("palm.")}

    def block(x, i, stride=1):
        depthwise = w[f"blocks.{i}.depthwise.weight"]
        y = same(x, depthwise, None, stride, depthwise.shape[0])
        y = F.conv2d(y, w[f"blocks.{i}.pointwise.weight"], w[f"blocks.{i}.pointwise.bias"])
        if stride == 2:
            x = F.max_pool2d(x, 2)
        x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return F.relu(x + y)

    def up(x, i):
        kernel = w[f"up.{i}.weight"].permute(1, 0, 2, 3)  # (in, out, 2, 2)
        y = F.conv_transpose2d(x, kernel, stride=2)
        scale, bias = (w[f"up.{i}.{kind}"][None, :, None, None] for kind in ("scale", "bias"))
        return F.relu(y * scale + bias)

    x = F.relu(same(x, w["first.weight"], w["first.bias"], 2))
    skips = {}
    for i in range(39):
        skips[i] = x
        x = block(x, i, 2 if i in (7, 15, 23, 31) else 1)
    y = block(skips[31] + up(x, 0), 39)
    z = block(skips[23] + up(y, 1), 40)
    head = lambda x, s: [F.conv2d(x, w[f"{kind}.{s}.weight"], w[f"{kind}.{s}.bias"]) for kind in ("score", "box")]
    return {8: head(z, 8), 16: head(y, 16), 32: head(x, 32)}


# Kernel and stride of the depthwise convolutions of the fourteen blocks.
BLOCKS = [(3, 2), (3, 1), (5, 2), (5, 1), (3, 2), (3, 1), (3, 1), (5, 1), (5, 1), (5, 1), (5, 2), (5, 1), (5, 1), (5, 1)]


def landmark(w, x):
    """Crops (B, 3, H, W) in [0, 1], sides multiples of 32 -> points (B, 63), logits of presence and right hand (B, 1)."""
    w = {name.removeprefix("landmark."): t.float() for name, t in w.items() if name.startswith("landmark.")}

    def conv(x, name, stride=1):
        kernel = w[f"{name}.weight"]
        groups = kernel.shape[0] if "depthwise" in name else 1
        return same(x, kernel, w[f"{name}.bias"], stride, groups)

    relu6 = lambda x: x.clamp(0, 6)
    x = relu6(conv(x, "first", 2))
    x = conv(relu6(conv(x, "first_depthwise")), "first_pointwise")
    for i, (kernel, stride) in enumerate(BLOCKS):
        assert w[f"blocks.{i}.depthwise.weight"].shape[-1] == kernel
        y = relu6(conv(x, f"blocks.{i}.expand"))
        y = conv(relu6(conv(y, f"blocks.{i}.depthwise", stride)), f"blocks.{i}.project")
        if i == 0:
            y = y + F.max_pool2d(x, 2)
        elif x.shape == y.shape:
            y = y + x
        x = y
    x = relu6(conv(x, "last"))
    x = relu6(conv(x, "last_depthwise")).mean((2, 3), keepdim=True)
    return tuple(conv(x, name).flatten(1) for name in ("points", "presence", "right"))
