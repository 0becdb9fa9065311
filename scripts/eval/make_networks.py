#!/usr/bin/env python3
"""Records what PyTorch's implementations of the evaluation networks compute, for the tests of `qwen-lora eval`.

In the environment of scripts/reference/setup_env.sh (torch 2.9.1, transformers 5.23.0), with these beside it:

    pip install --no-deps --target T torchvision==0.24.1 pytorch-fid==0.3.0 lpips==0.1.4 pytorch-msssim==1.0.0 \
        scipy==1.15.3 tqdm==4.67.1 pillow==11.3.0
    PYTHONPATH=T python scripts/eval/make_networks.py [OUT]       # OUT: tests/fixtures/eval, with make_reference.py's files

No weights are stored: every tensor is a function of its name (`formula`), which the tests compute again. The networks
are pytorch-fid's InceptionV3, the AlexNet of lpips, and small CLIP and Chinese CLIP models with small vocabularies.
"""

import json
import math
import pathlib
import sys

import numpy as np
import torch
from PIL import Image

OUT = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/eval")


def formula(name, shape):
    """Uniform numbers from a hash of the name (FNV-1a) and the index (Murmur3's finaliser), scaled by what they are."""
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = (seed ^ byte) * 0x01000193 & 0xFFFFFFFF
    with np.errstate(over="ignore"):
        h = np.arange(math.prod(shape), dtype=np.uint32) + np.uint32(seed)
        for shift, factor in [(16, 0x85EBCA6B), (13, 0xC2B2AE35)]:
            h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
        h = h ^ (h >> np.uint32(16))
    u = h.astype(np.float64) / 2.0**32 - 0.5  # [-0.5, 0.5)
    last = name.rsplit(".", 1)[-1]
    if last == "running_var" or (last == "weight" and len(shape) == 1):
        values = 1.0 + 0.5 * u
    elif name.startswith("lin"):
        values = u + 0.5
    elif last == "weight" and len(shape) > 1:
        values = u * math.sqrt(24.0 / math.prod(shape[1:]))
    else:
        values = 0.4 * u
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def fill(module):
    """Gives every floating tensor of a module its formula's values; returns names and shapes."""
    shapes = {}
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(formula(name, tuple(tensor.shape)))
                shapes[name] = list(tensor.shape)
    return shapes


def picture(name):
    """(1, 3, H, W) in [0, 1]."""
    pixels = np.asarray(Image.open(OUT / name).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def similarity():
    from pytorch_msssim import ms_ssim

    a, b = [(255 * picture(name)).double() for name in ("crop.png", "blurred.png")]
    return ms_ssim(a, b, data_range=255).item()


def inception():
    import pytorch_fid.inception as fid

    state = {}
    fid.load_state_dict_from_url = lambda *_, **__: state
    patched = fid._inception_v3

    def empty(*args, **kwargs):
        model = patched(*args, **kwargs)
        model.load_state_dict = lambda _: None
        return model

    fid._inception_v3 = empty
    built = fid.fid_inception_v3()
    shapes = fill(built)
    fid.fid_inception_v3 = lambda: built
    network = fid.InceptionV3([3]).eval()
    with torch.no_grad():
        features = {name: network(picture(name))[0].flatten() for name in ("crop.png", "blurred.png")}
    return {
        "num_tensors": len(shapes),
        "num_values": sum(math.prod(s) for s in shapes.values()),
        "stride": 8,
        "features": {name: f[::8].tolist() for name, f in features.items()},
    }


def perceptual():
    import lpips

    network = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    torch.nn.Module.eval(network)
    # The names that the published files have: torchvision's features.N and lpips' own heads.
    with torch.no_grad():
        for slice_ in network.net.children():
            for number, layer in slice_.named_children():
                for kind, tensor in layer.named_parameters():
                    tensor.copy_(formula(f"features.{number}.{kind}", tuple(tensor.shape)))
        for i, head in enumerate(network.lins):
            head.model[1].weight.copy_(formula(f"lin{i}.model.1.weight", tuple(head.model[1].weight.shape)))
        a, b = picture("crop.png"), picture("blurred.png")
        value, layers = network(a, b, retPerLayer=True, normalize=True)
    return {"distance": value.item(), "layers": [layer.item() for layer in layers]}


TEXTS = {
    "clip": ["a red cat", "Astronaut in an orange suit, smiling at the camera", "word " * 40],
    "chinese_clip": ["一只红色的猫", "宇航员 ABC，微笑", "猫" * 40],
}


def clip_pixels(name, side, crop):
    """OpenAI's preprocessing, by Pillow."""
    image = Image.open(OUT / name).convert("RGB")
    if crop:
        w, h = image.size
        short = min(w, h)
        image = image.resize((max(side, side * w // short), max(side, side * h // short)), Image.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.resize((side, side), Image.BICUBIC)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def unit(features):
    features = getattr(features, "pooler_output", features)[0]
    return (features / features.norm()).tolist()


def clip(kind):
    """A small model of random weights: its config and its words go into a folder, the features into the record."""
    import transformers as tf

    folder = OUT / kind
    folder.mkdir(exist_ok=True)
    side = 48
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=side, patch_size=16)
    text = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=24)
    if kind == "clip":
        byte_letters = sorted(set("abcdefghijklmnopqrstuvwxyz,"))
        merges = [("a", "n</w>"), ("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("w", "o")]
        words = byte_letters + [c + "</w>" for c in byte_letters] + ["".join(m) for m in merges]
        words += ["<|startoftext|>", "<|endoftext|>"]
        tokenizer = tf.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        ends = dict(vocab_size=len(words), eos_token_id=len(words) - 1, bos_token_id=len(words) - 2)
        config = tf.CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=16)
        model = tf.CLIPModel(config).eval()
    else:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一只红色的猫宇航员微笑，", "ab", "##c"]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        tokenizer = tf.BertTokenizer(vocab={w: i for i, w in enumerate(words)}, do_lower_case=True)
        config = tf.ChineseCLIPConfig(text_config={**text, "vocab_size": len(words)}, vision_config=vision, projection_dim=16)
        model = tf.ChineseCLIPModel(config).eval()
    shapes = fill(model)
    wanted = {
        "model_type": kind,
        "projection_dim": 16,
        "text_config": {**text, "vocab_size": len(words)},
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    out = {"shapes": shapes, "texts": [], "images": {}}
    with torch.no_grad():
        for words in TEXTS[kind]:
            ids = tokenizer(words, truncation=True, max_length=24)["input_ids"]
            features = model.get_text_features(input_ids=torch.tensor([ids]))
            out["texts"].append({"text": words, "ids": ids, "features": unit(features)})
        for name in ("crop.png", "blurred.png"):
            pixels = clip_pixels(name, side, crop=kind == "clip")
            out["images"][name] = unit(model.get_image_features(pixel_values=pixels))
    return out


def main():
    found = {
        "made_by": f"torch {torch.__version__.split('+')[0]}",
        "ms_ssim": similarity(),
        "inception": inception(),
        "lpips": perceptual(),
        "clip": clip("clip"),
        "chinese_clip": clip("chinese_clip"),
    }
    (OUT / "networks.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k in ("made_by", "ms_ssim", "lpips")}))
    for kind in TEXTS:
        for case in found[kind]["texts"]:
            print(kind, case["ids"], case["features"][:3])
    for name, features in found["inception"]["features"].items():
        print(name, features[:4], "mean", sum(features) / len(features))


if __name__ == "__main__":
    main()
