"""The world's autoencoder as a 2-D network, with the names of `AutoencoderKLQwenImage`, and its export in the
published layout.

The published network is a causal video network: 5-D kernels (out, in, time, h, w), a single frame preceded by zeros in
time. So one picture sees the last temporal tap only, and a 2-D network with those taps computes the same. B batch,
C channels, H and W height and width.
"""

import torch
from torch import nn
from torch.nn import functional as F

Z_DIM = 16
BASE_DIM = 16
# Widths 16, 32, 32, 32: as fast as the published 1, 2, 4, 4 with a base of 8 (CPU kernels work in sixteens), with
# twice the channels where pixels are drawn.
DIM_MULT = (1, 2, 2, 2)
NUM_RES_BLOCKS = 1


class ChannelNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.gamma.shape[0] ** 0.5 * self.gamma.view(1, -1, 1, 1)


class ResBlock(nn.Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(dim_in), nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm2, self.conv2 = ChannelNorm(dim_out), nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """The middle attention. Its output projection is zero and stays so: pictures of the world need none, and without
    it the network may be trained on crops."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.to_qkv, self.proj = ChannelNorm(dim), nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.requires_grad_(False)

    def forward(self, x):
        return x


class MidBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(dim, dim), ResBlock(dim, dim)])
        self.attentions = nn.ModuleList([Attention(dim)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    """Halves (a row and a column of zeros at the end, stride 2) or doubles (nearest, then a convolution)."""

    def __init__(self, dim_in, dim_out, down):
        super().__init__()
        self.down = down
        conv = nn.Conv2d(dim_in, dim_out, 3, stride=2 if down else 1, padding=0 if down else 1)
        self.resample = nn.ModuleDict({"1": conv})

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2, mode="nearest")
        return self.resample["1"](x)


class UpBlock(nn.Module):
    def __init__(self, dim_in, dim, upsample):
        super().__init__()
        dims = [dim_in] + [dim] * (NUM_RES_BLOCKS + 1)
        self.resnets = nn.ModuleList([ResBlock(a, b) for a, b in zip(dims, dims[1:])])
        self.upsamplers = nn.ModuleList([Resample(dim, dim // 2, down=False)] if upsample else [])

    def forward(self, x):
        for part in [*self.resnets, *self.upsamplers]:
            x = part(x)
        return x


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        dims = [BASE_DIM * m for m in DIM_MULT]
        self.conv_in = nn.Conv2d(3, BASE_DIM, 3, padding=1)
        blocks, channels = [], BASE_DIM
        for level, dim in enumerate(dims):
            for _ in range(NUM_RES_BLOCKS):
                blocks.append(ResBlock(channels, dim))
                channels = dim
            if level + 1 < len(dims):
                blocks.append(Resample(dim, dim, down=True))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(channels)
        self.norm_out, self.conv_out = ChannelNorm(channels), nn.Conv2d(channels, 2 * Z_DIM, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        dims = [BASE_DIM * m for m in reversed(DIM_MULT)]
        self.conv_in = nn.Conv2d(Z_DIM, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        # Each level but the first starts from what the doubling before it left: half the channels.
        dims_in = [dims[0]] + [dim // 2 for dim in dims[:-1]]
        last = len(dims) - 1
        self.up_blocks = nn.ModuleList([UpBlock(a, b, i < last) for i, (a, b) in enumerate(zip(dims_in, dims))])
        self.norm_out, self.conv_out = ChannelNorm(dims[-1]), nn.Conv2d(dims[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.quant_conv = Encoder(), nn.Conv2d(2 * Z_DIM, 2 * Z_DIM, 1)
        self.post_quant_conv, self.decoder = nn.Conv2d(Z_DIM, Z_DIM, 1), Decoder()
        for name, part in self.named_modules():
            if isinstance(part, nn.Conv2d) and ".attentions." not in name:
                # What a block adds begins at half the size of what it is added to.
                nn.init.kaiming_normal_(part.weight, nonlinearity="linear")
                part.weight.data.mul_(0.5 if name.endswith("conv2") else 1.0)
        # Begin with little noise: with a deviation of 1 the decoder would first have to find a signal in it.
        nn.init.constant_(self.quant_conv.bias[Z_DIM:], -6.0)

    def encode(self, pixels):
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance, (B, 16, H/8, W/8) each."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents):
        """(B, 16, h, w) -> (B, 3, 8h, 8w), not clamped."""
        return self.decoder(self.post_quant_conv(latents))


def published_tensors(vae):
    """The weights under the published names, in the published shapes."""
    out = {}
    for name, tensor in vae.state_dict().items():
        planar = ".resample." in name or ".attentions." in name
        if name.endswith(".gamma"):
            # (C, 1, 1) in the attention, (C, 1, 1, 1) elsewhere.
            tensor = tensor.view(-1, *[1] * (2 if planar else 3))
        elif name.endswith(".weight") and not planar:
            taps = tensor.new_zeros(*tensor.shape[:2], tensor.shape[-1], *tensor.shape[2:])
            taps[:, :, -1] = tensor
            tensor = taps
        out[name] = tensor
    return out


def published_config(latents_mean, latents_std, diffusers_version):
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "_diffusers_version": diffusers_version,
        "attn_scales": [],
        "base_dim": BASE_DIM,
        "dim_mult": list(DIM_MULT),
        "dropout": 0.0,
        "latents_mean": [round(v, 4) for v in latents_mean],
        "latents_std": [round(v, 4) for v in latents_std],
        "num_res_blocks": NUM_RES_BLOCKS,
        # No halving in time: a model of still pictures, without the `time_conv` that they never reach.
        "temperal_downsample": [False, False, False],
        "z_dim": Z_DIM,
    }


def planar_tensors(published):
    """The 2-D network's tensors from the published ones: the inverse of `published_tensors`."""
    out = {}
    for name, tensor in published.items():
        if name.endswith(".gamma"):
            tensor = tensor.flatten()
        elif tensor.ndim == 5:
            tensor = tensor[:, :, -1]
        out[name] = tensor.float()
    return out
