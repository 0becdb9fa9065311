"""Compares the twins of hands.py, on assets/hands.safetensors, with TensorFlow.js on the package's own files.

    npm install @tensorflow/tfjs@4.22.0 && NODE_PATH=node_modules python scripts/pose/check_hands.py package/models
"""

import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import hands

ROOT = pathlib.Path(__file__).resolve().parents[2]


def tfjs(models, name, pixels):
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder) / "in", pathlib.Path(folder) / "out"
        pixels.astype(np.float32).tofile(source)
        script = pathlib.Path(__file__).with_name("tfjs_hands.js")
        subprocess.run(["node", script, models, name, str(len(pixels)), source, target], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return {f.suffix[1:]: torch.from_numpy(np.fromfile(f, np.float32)) for f in target.parent.glob("out.*")}


def main():
    models = pathlib.Path(sys.argv[1]).resolve()
    weights = load_file(ROOT / "assets/hands.safetensors")
    for name in ("astronaut.jpg", "grace_hopper.jpg"):
        photo = Image.open(ROOT / "examples/photos" / name).convert("RGB")
        pixels = np.array(photo.resize((256, 256), Image.BILINEAR))
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        flat = lambda t, width: t.permute(0, 2, 3, 1).reshape(-1, width)
        heads = hands.palm(weights, x).values()
        twin = torch.cat([torch.cat([flat(s, 1), flat(b, 18)], 1) for s, b in heads])
        original = tfjs(models, "handdetect", pixels / 127.5 - 1)["Identity"].reshape(-1, 19)
        difference = (twin - original).abs()
        # Logits reach -450; those that are no plain no are what matters.
        near = original[:, 0].abs() < 20
        print(f"{name}: palm: scores {difference[near, 0].max():.1e} of 20 and {difference[:, 0].max():.1e} of"
              f" {original[:, 0].abs().max():.0f}, boxes {difference[:, 1:].max():.1e} of {original[:, 1:].abs().max():.0f}")
        assert difference[near, 0].max() < 1e-4 and difference.max() < 2e-6 * original.abs().max()

        pixels = np.array(photo.resize((224, 224), Image.BILINEAR))
        points, presence, right = hands.landmark(weights, torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        original = tfjs(models, "handlandmark-lite", pixels / 255)
        errors = [(a.flatten() - b).abs().max() for a, b in
                  ((points, original["Identity"]), (presence.sigmoid(), original["Identity_1"]),
                   (right.sigmoid(), original["Identity_2"]))]
        print(f"{name}: points {errors[0]:.1e} of {points.abs().max():.0f}, presence {errors[1]:.1e}, right {errors[2]:.1e}")
        assert max(errors) < 2e-4


with torch.no_grad():
    main()
