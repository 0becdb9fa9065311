#!/usr/bin/env python3
"""What diffusers does with adapter files of many spellings: writes small ones, loads each, records the outcome.

  python diffusers_outcomes.py PIPE_DIR OUT_DIR

Every file means the same change of two modules, rank 4 and alpha 8 (scale 2), unless its name says otherwise.
OUT_DIR gets the files and `outcomes.json`: for each file either {"error": first line} or {"modules": number loaded,
"strength": scale in force over the scale meant (a list if modules differ), "warned": whether anything was said}.
`strength` is of the low-rank change; for DoRA `dora` tells whether its norms are used.
"""
import json, logging, os, sys, warnings

import numpy as np
import torch
from safetensors.torch import save_file

PIPE, OUT = sys.argv[1:3]
RANK, ALPHA = 4, 8.0
MODULES = {"transformer_blocks.0.attn.to_q": (48, 48), "transformer_blocks.1.img_mlp.net.2": (48, 192)}
rng = np.random.Generator(np.random.PCG64(5))
PAIRS = {
    m: (
        torch.from_numpy((rng.standard_normal((RANK, i)) * 0.1).astype(np.float32)),
        torch.from_numpy((rng.standard_normal((o, RANK)) * 0.1).astype(np.float32)),
    )
    for m, (o, i) in MODULES.items()
}
STYLES = {
    "ab": ("lora_A.weight", "lora_B.weight"),
    "downup": ("lora_down.weight", "lora_up.weight"),
    "default": ("lora_A.default.weight", "lora_B.default.weight"),
    "default0": ("lora_A.default_0.default.weight", "lora_B.default_0.default.weight"),
    "plain": ("lora_A", "lora_B"),
    "dot": ("lora.down.weight", "lora.up.weight"),
}


def flat(m):
    return m.replace(".", "_")


def named(prefix, m):
    return prefix + (flat(m) if prefix.endswith("_") else m)


def pairs(prefix, style, alpha=False, fold=1.0, modules=PAIRS):
    out = {}
    for m, (a, b) in modules.items():
        name = named(prefix, m)
        out[f"{name}.{STYLES[style][0]}"] = a.clone()
        out[f"{name}.{STYLES[style][1]}"] = b * fold
        if alpha:
            out[f"{name}.alpha"] = torch.tensor(ALPHA)
    return out


def meta(**extra):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in extra.items()})}


PEFT = dict(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES))
first, second = MODULES
half = {first: (PAIRS[first][0][:2].contiguous(), PAIRS[first][1][:, :2].contiguous()), second: PAIRS[second]}
magnitude = {m: torch.full((o, 1), 2.0) for m, (o, _) in MODULES.items()}
lokr = {
    m: dict(lokr_w1=torch.ones(4, 4) * 0.1, lokr_w2_a=torch.ones(o // 4, 2) * 0.1, lokr_w2_b=torch.ones(2, i // 4) * 0.1)
    for m, (o, i) in MODULES.items()
}
loha = {
    m: dict(hada_w1_a=torch.ones(o, 2), hada_w1_b=torch.ones(2, i), hada_w2_a=torch.ones(o, 2), hada_w2_b=torch.ones(2, i))
    for m, (o, i) in MODULES.items()
}


def spread(prefix, parts, alpha):
    out = {f"{named(prefix, m)}.{k}": v for m, ps in parts.items() for k, v in ps.items()}
    if alpha:
        out |= {f"{named(prefix, m)}.alpha": torch.tensor(ALPHA) for m in parts}
    return out


def with_magnitude(prefix, key, shape=None):
    return {f"{named(prefix, m)}.{key}": v.reshape(shape) if shape else v for m, v in magnitude.items()}


top = {"img_in": (torch.ones(RANK, 64) * 0.1, torch.ones(48, RANK) * 0.1)}
strange = {"transformer_blocks.0.attn.to_x": PAIRS[first], second: PAIRS[second]}

FILES = {
    "transformer_ab_metadata": (pairs("transformer.", "ab"), meta(**PEFT)),
    "transformer_ab": (pairs("transformer.", "ab"), None),
    "transformer_ab_folded": (pairs("transformer.", "ab", fold=2.0), None),
    "transformer_ab_alpha": (pairs("transformer.", "ab", alpha=True), None),
    "transformer_ab_alpha_metadata": (pairs("transformer.", "ab", alpha=True), meta(**PEFT)),
    "transformer_downup_alpha": (pairs("transformer.", "downup", alpha=True), None),
    "transformer_downup": (pairs("transformer.", "downup"), None),
    "transformer_dot": (pairs("transformer.", "dot"), None),
    "transformer_plain": (pairs("transformer.", "plain"), None),
    "transformer_default": (pairs("transformer.", "default"), None),
    "diffusion_model_ab_alpha": (pairs("diffusion_model.", "ab", alpha=True), None),
    "diffusion_model_ab_alpha_metadata": (pairs("diffusion_model.", "ab", alpha=True), meta(**PEFT)),
    "diffusion_model_downup_alpha": (pairs("diffusion_model.", "downup", alpha=True), None),
    "diffusion_model_ab": (pairs("diffusion_model.", "ab"), None),
    "diffusion_model_ab_metadata": (pairs("diffusion_model.", "ab"), meta(**PEFT)),
    "diffusion_model_plain": (pairs("diffusion_model.", "plain"), None),
    "lora_unet_downup_alpha": (pairs("lora_unet_", "downup", alpha=True), None),
    "lora_unet_downup": (pairs("lora_unet_", "downup"), None),
    "lora_unet_ab_alpha": (pairs("lora_unet_", "ab", alpha=True), None),
    "lora_unet_top": (pairs("lora_unet_", "downup", alpha=True, modules=top | PAIRS), None),
    "bare_ab": (pairs("", "ab"), None),
    "bare_ab_alpha": (pairs("", "ab", alpha=True), None),
    "bare_downup_alpha": (pairs("", "downup", alpha=True), None),
    "bare_downup": (pairs("", "downup"), None),
    "bare_default": (pairs("", "default"), None),
    "bare_default0": (pairs("", "default0"), None),
    "peft_ab": (pairs("base_model.model.", "ab"), None),
    "peft_ab_alpha": (pairs("base_model.model.", "ab", alpha=True), None),
    "peft_default": (pairs("base_model.model.", "default"), None),
    "lycoris_downup_alpha": (pairs("lycoris_", "downup", alpha=True), None),
    "lora_transformer_downup_alpha": (pairs("lora_transformer_", "downup", alpha=True), None),
    "mixed_ranks": (pairs("transformer.", "ab", modules=half), None),
    "mixed_ranks_single_r": (pairs("transformer.", "ab", modules=half), meta(**PEFT)),
    "mixed_ranks_rank_pattern": (pairs("transformer.", "ab", modules=half), meta(**PEFT, rank_pattern={first: 2})),
    "mixed_ranks_both_patterns": (
        pairs("transformer.", "ab", modules=half), meta(**PEFT, rank_pattern={first: 2}, alpha_pattern={first: 4.0}),
    ),
    "metadata_rslora": (pairs("transformer.", "ab"), meta(**PEFT, use_rslora=True)),
    "metadata_wrong_r": (pairs("transformer.", "ab"), meta(**(PEFT | {"r": 8}))),
    "metadata_no_prefix": (pairs("transformer.", "ab"), {"lora_adapter_metadata": json.dumps(PEFT)}),
    "metadata_unknown_key": (pairs("transformer.", "ab"), meta(**PEFT, no_such_option=1)),
    "dora_scale": (pairs("lora_unet_", "downup", alpha=True) | with_magnitude("lora_unet_", "dora_scale"), None),
    "dora_scale_transformer": (pairs("transformer.", "ab") | with_magnitude("transformer.", "dora_scale"), None),
    "dora_vector": (
        pairs("transformer.", "ab", fold=2.0) | with_magnitude("transformer.", "lora_magnitude_vector", (-1,)), None,
    ),
    "dora_vector_weight": (
        pairs("transformer.", "ab", fold=2.0) | with_magnitude("transformer.", "lora_magnitude_vector.weight", (-1,)), None,
    ),
    "lokr_transformer": (spread("transformer.", lokr, False), None),
    "lokr_lycoris": (spread("lycoris_", lokr, True), None),
    "lokr_lora_unet": (spread("lora_unet_", lokr, True), None),
    "lokr_diffusion_model": (spread("diffusion_model.", lokr, False), None),
    "loha_lora_unet": (spread("lora_unet_", loha, True), None),
    "loha_transformer": (spread("transformer.", loha, False), None),
    "unknown_module": (pairs("transformer.", "ab", modules=strange), None),
    "unknown_module_alpha": (pairs("diffusion_model.", "ab", alpha=True, modules=strange), None),
    "missing_b": ({k: v for k, v in pairs("transformer.", "ab").items() if first not in k or "lora_A" in k}, None),
    "missing_b_alpha": (
        {k: v for k, v in pairs("diffusion_model.", "ab", alpha=True).items() if first not in k or "lora_B" not in k}, None,
    ),
    "with_text_encoder": (
        pairs("transformer.", "ab", fold=2.0)
        | {"text_encoder.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 64),
           "text_encoder.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(128, 2)}, None,
    ),
}


class Said(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def outcome(path, keys):
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(PIPE, text_encoder=None, tokenizer=None, vae=None)
    said = Said()
    loggers = [logging.getLogger("diffusers"), logging.getLogger("peft")]
    for logger in loggers:
        logger.addHandler(said)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe.load_lora_weights(path, adapter_name="x")
    except Exception as e:
        return {"error": f"{type(e).__name__}: {str(e).splitlines()[0].split('{')[0][:80] if str(e) else ''}".strip()}
    finally:
        for logger in loggers:
            logger.removeHandler(said)
    spoken = said.lines + [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    layers = {n: m for n, m in pipe.transformer.named_modules() if hasattr(m, "lora_A") and "x" in m.lora_A}
    strengths = set()
    dora = False
    for name, layer in layers.items():
        dora |= bool(getattr(layer, "use_dora", {}).get("x"))
        if layer.lora_A["x"].weight.is_meta or layer.lora_B["x"].weight.is_meta:
            return {"error": "layers made, but no weights for them: the model cannot run"}
        delta = layer.scaling["x"] * (layer.lora_B["x"].weight @ layer.lora_A["x"].weight)
        source = half if "mixed" in os.path.basename(path) else PAIRS | top
        a, b = source[name]
        scale = 4.0 if "rslora" in os.path.basename(path) else 2.0
        strengths.add(round((delta.norm() / (scale * (b @ a).norm())).item(), 4))
    out = {"modules": len(layers), "strength": sorted(strengths), "warned": bool(spoken)}
    return out | {"dora": True} if dora else out


def main():
    logging.disable(logging.NOTSET)
    os.makedirs(OUT, exist_ok=True)
    outcomes = {}
    for name, (tensors, metadata) in FILES.items():
        path = os.path.join(OUT, f"{name}.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
        outcomes[name] = outcome(path, tensors)
        print(name, outcomes[name], flush=True)
    import diffusers, peft

    record = {"versions": {"diffusers": diffusers.__version__, "peft": peft.__version__}, "outcomes": outcomes}
    with open(os.path.join(OUT, "outcomes.json"), "w") as f:
        json.dump(record, f, indent=1, sort_keys=True)
        f.write("\n")


main()
