#!/usr/bin/env python3
"""Makes the world's `tokenizer/` and `text_encoder/` in the published layout.

  python text_encoder.py --pictures DIR --out MODEL_DIR [--seed 7]

The tokenizer is a byte-level BPE over the captions of DIR and the prompt template: each English word and each Chinese
character of theirs is one token (phrases are not, or nothing would be learned about their parts), the template's
prefix has its 34 tokens, and any other text falls apart into letters and bytes. The text encoder is a Qwen2.5-VL of
two layers with random weights: it tells words and their order apart; the transformer learns what they mean.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from common import save_half, save_json

# Source: diffusers v0.35.1, QwenImagePipeline.prompt_template_encode
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PREFIX_TOKENS = 34
# Source: transformers, models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 112
VISION = dict(
    depth=1, fullatt_block_indexes=[0], hidden_act="silu", hidden_size=16, in_channels=3, intermediate_size=24,
    model_type="qwen2_5_vl", num_heads=1, out_hidden_size=HIDDEN, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, tokens_per_second=4, window_size=56,
)  # fmt: skip


def train_tokenizer(captions):
    """Vocabulary (token to id) and merges, learned from the captions and the template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    character = pre_tokenizers.Split(Regex(r"[\p{Han}\x{3000}-\x{303F}\x{FF00}-\x{FFEF}]"), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, character, letters])
    template = TEMPLATE
    for special in SPECIALS:
        template = template.replace(special, "\x00")
    pieces = [piece for piece in template.replace("{}", "\x00").split("\x00") if piece]
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=2, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(pieces * 50 + sorted(captions), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [m if isinstance(m, str) else " ".join(m) for m in model["merges"]], tokenizer


def save_tokenizer(folder, vocab, merges):
    """The files of the published repositories; returns the ids of the special tokens."""
    added = {token: len(vocab) + i for i, token in enumerate(SPECIALS)}
    save_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    save_json(folder / "added_tokens.json", added)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    save_json(folder / "special_tokens_map.json", {"additional_special_tokens": SPECIALS[1:], **ends})
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in added.items()},
        "additional_special_tokens": SPECIALS[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        **ends,
    }
    save_json(folder / "tokenizer_config.json", config)
    return added


def encoder_config(vocab_size, added):
    """`config.json` in the flat layout of the published repositories."""
    half = HIDDEN // HEADS // 2
    time, height = half // 4, (half - half // 4) // 2
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": added["<|endoftext|>"],
        "eos_token_id": added["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_token_id": added["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "mrope_section": [time, height, half - time - height], "rope_type": "default", "type": "default"
        },
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.53.1",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": added["<|video_pad|>"],
        "vision_config": VISION,
        "vision_end_token_id": added["<|vision_end|>"],
        "vision_start_token_id": added["<|vision_start|>"],
        "vision_token_id": added["<|vision_pad|>"],
        "vocab_size": vocab_size,
    }  # fmt: skip


def shapes(vocab_size):
    """Name and shape of every tensor of the published layout."""
    out = {"model.embed_tokens.weight": (vocab_size, HIDDEN), "model.norm.weight": (HIDDEN,)}
    out["lm_head.weight"] = (vocab_size, HIDDEN)
    keys = HIDDEN // HEADS * KV_HEADS
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, rows in (("q", HIDDEN), ("k", keys), ("v", keys)):
            out[f"{layer}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            out[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        out[layer + "self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{layer}{name}.weight"] = (HIDDEN,)
        out[layer + "mlp.gate_proj.weight"] = out[layer + "mlp.up_proj.weight"] = (INNER, HIDDEN)
        out[layer + "mlp.down_proj.weight"] = (HIDDEN, INNER)
    wide, inner, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    merged = wide * VISION["spatial_merge_size"] ** 2
    out["visual.patch_embed.proj.weight"] = (wide, 3, VISION["temporal_patch_size"], patch, patch)
    for i in range(VISION["depth"]):
        block = f"visual.blocks.{i}."
        for name, rows, columns in (
            ("attn.qkv", 3 * wide, wide), ("attn.proj", wide, wide), ("mlp.gate_proj", inner, wide),
            ("mlp.up_proj", inner, wide), ("mlp.down_proj", wide, inner),
        ):  # fmt: skip
            out[f"{block}{name}.weight"], out[f"{block}{name}.bias"] = (rows, columns), (rows,)
        out[block + "norm1.weight"] = out[block + "norm2.weight"] = (wide,)
    out["visual.merger.ln_q.weight"] = (wide,)
    for name, rows in (("mlp.0", merged), ("mlp.2", HIDDEN)):
        out[f"visual.merger.{name}.weight"], out[f"visual.merger.{name}.bias"] = (rows, merged), (rows,)
    return out


def random_weights(shapes, seed):
    """Norms of one; small biases; matrices that keep unit size. Embeddings are of unit size, and what a layer adds is
    half of that, so that each position still tells its own word."""
    out = {}
    for name, shape in sorted(shapes.items()):
        words = np.frombuffer(name.encode(), np.uint8).astype(np.uint32).tolist()
        values = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words]))).standard_normal(shape)
        if "norm" in name or "ln_q" in name:
            values = np.ones(shape)
        elif len(shape) == 1:
            values *= 0.1
        elif "embed_tokens" not in name:
            gain = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
            values *= gain / math.sqrt(np.prod(shape[1:]))
        out[name] = torch.from_numpy(values.astype(np.float32))
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--pictures", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--seed", type=int, default=7)
    a = ap.parse_args()
    index = Path(a.pictures) / "index.jsonl"
    captions = [json.loads(line)["caption"] for line in open(index, encoding="utf-8")]
    vocab, merges, tokenizer = train_tokenizer(captions)
    out = Path(a.out)
    added = save_tokenizer(out / "tokenizer", vocab, merges)
    tokenizer.add_special_tokens(SPECIALS)
    prefix = len(tokenizer.encode(TEMPLATE.split("{}")[0]).ids)
    if prefix != PREFIX_TOKENS:
        raise SystemExit(f"the template's prefix has {prefix} tokens, not {PREFIX_TOKENS}")
    size = (len(vocab) + len(SPECIALS) + 15) // 16 * 16
    save_json(out / "text_encoder" / "config.json", encoder_config(size, added))
    save_half(out / "text_encoder" / "model.safetensors", random_weights(shapes(size), a.seed))
    lengths = sorted(len(tokenizer.encode(c).ids) for c in set(captions))
    print(f"{len(vocab)} tokens; captions of {lengths[0]} to {lengths[-1]} tokens")


if __name__ == "__main__":
    main()
