#!/usr/bin/env python3
"""The job of `qwen-lora merge` as a short PyTorch script: adapters into a transformer folder, shard by shard.

  python merge_torch.py BASE_DIR OUT_DIR ADAPTER... --weights W,...

Adapters have kohya's keys with alpha. Threads: 2 (or MERGE_THREADS). Prints seconds and peak private memory.
"""
import argparse, json, os, resource, shutil, time

start = time.time()
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

torch.set_num_threads(int(os.environ.get("MERGE_THREADS", "2")))
ap = argparse.ArgumentParser()
ap.add_argument("base"); ap.add_argument("out"); ap.add_argument("adapters", nargs="+"); ap.add_argument("--weights")
a = ap.parse_args()
weights = [float(w) for w in a.weights.split(",")]
adapters = [load_file(p) for p in a.adapters]
os.makedirs(a.out)
with torch.no_grad():
    for name in sorted(os.listdir(a.base)):
        path = os.path.join(a.base, name)
        if not name.endswith(".safetensors"):
            shutil.copy(path, os.path.join(a.out, name))
            continue
        merged = {}
        with safe_open(path, "pt") as f:
            metadata = f.metadata()
            for key in f.keys():
                w = f.get_tensor(key)
                stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
                for lora, weight in zip(adapters, weights):
                    if f"{stem}.lora_down.weight" in lora:
                        down, up = lora[f"{stem}.lora_down.weight"], lora[f"{stem}.lora_up.weight"]
                        scale = weight * lora[f"{stem}.alpha"].item() / down.shape[0]
                        w = (w.float() + scale * (up.float() @ down.float())).to(w.dtype)
                merged[key] = w
        save_file(merged, os.path.join(a.out, name), metadata=metadata)
        fd = os.open(os.path.join(a.out, name), os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
print(json.dumps({"seconds": round(time.time() - start, 2), "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
