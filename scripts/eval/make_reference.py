#!/usr/bin/env python3
"""Records what the common Python tools say about small pictures and features, for the tests of `qwen-lora eval`.

    python3 -m venv V && V/bin/pip install scikit-image==0.25.2 numpy==2.2.6 scipy==1.15.3 pillow==11.3.0
    V/bin/python scripts/eval/make_reference.py [OUT]          # OUT: tests/fixtures/eval

Writes `crop.png` (a part of NASA's public-domain portrait of Eileen Collins, `skimage.data.astronaut`), `blurred.png`
(the same under a Gaussian of sigma 1) and `reference.json`. `make_networks.py` records what needs PyTorch.
"""

import json
import pathlib
import sys

import numpy as np
import scipy.linalg
import skimage
from PIL import Image
from scipy.stats import binomtest
from skimage.filters import gaussian
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

GAUSSIAN = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


def pictures(out):
    # An odd width and an even height, both above the 160 pixels that MS-SSIM wants.
    crop = np.ascontiguousarray(skimage.data.astronaut()[40:208, 130:307])
    blurred = np.rint(gaussian(crop, sigma=1, channel_axis=2, preserve_range=True)).astype(np.uint8)
    Image.fromarray(crop).save(out / "crop.png", optimize=True)
    Image.fromarray(blurred).save(out / "blurred.png", optimize=True)
    similarity = lambda **kw: structural_similarity(crop, blurred, channel_axis=2, data_range=255, **kw)
    return {
        "psnr": peak_signal_noise_ratio(crop, blurred, data_range=255),
        "ssim_uniform7": similarity(),
        "ssim_gaussian11": similarity(**GAUSSIAN),
    }


def features(rng, n, d, shift):
    """Correlated rows, rounded so that the file is small and exact."""
    mixing = rng.normal(size=(d, d)) / np.sqrt(d) + np.eye(d)
    return np.round(rng.normal(size=(n, d)) @ mixing + shift, 3)


def frechet(x, y):
    """pytorch-fid 0.3.0, `calculate_frechet_distance`, with the trace term also by the eigenvalues of the product."""
    (m1, s1), (m2, s2) = [(v.mean(0), np.cov(v, rowvar=False)) for v in (x, y)]
    trace_of_root = np.trace(scipy.linalg.sqrtm(s1 @ s2).real)
    eigenvalues = np.sqrt(np.clip(np.linalg.eigvals(s1 @ s2).real, 0, None)).sum()
    rest = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2)
    return {"fid": rest - 2 * trace_of_root, "fid_by_eigenvalues": rest - 2 * eigenvalues}


def kernel_distance(x, y):
    """The unbiased estimate over all rows, as in clean-fid 0.1.35 with one subset of everything."""
    d = x.shape[1]
    k = lambda a, b: (a @ b.T / d + 1) ** 3
    within = lambda a: (k(a, a).sum() - np.trace(k(a, a))) / (len(a) * (len(a) - 1))
    return within(x) + within(y) - 2 * k(x, y).mean()


def sets():
    rng = np.random.default_rng(4)
    cases = []
    # More rows than columns, fewer rows than columns (singular covariances), and of either kind one.
    for n1, n2, d in [(30, 40, 8), (9, 7, 12), (25, 6, 10)]:
        x, y = features(rng, n1, d, 0.0), features(rng, n2, d, 0.5)
        cases.append({"x": x.tolist(), "y": y.tolist(), "kid": kernel_distance(x, y), **frechet(x, y)})
    return cases


def statistics():
    wilson = lambda k, n: [k, n, *binomtest(k, n).proportion_ci(0.95, method="wilson")]
    mcnemar = lambda b, c: [b, c, binomtest(b, b + c).pvalue]
    return {
        "wilson": [wilson(*case) for case in [(0, 20), (3, 20), (81, 263), (20, 20)]],
        "mcnemar": [mcnemar(*case) for case in [(1, 9), (5, 15), (7, 7), (400, 480)]],
    }


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/eval")
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "made_by": f"scikit-image {skimage.__version__}, numpy {np.__version__}, scipy {scipy.__version__}",
        "pictures": pictures(out),
        "sets": sets(),
        "statistics": statistics(),
    }
    (out / "reference.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k != "sets"}, indent=1))
    print([{k: v for k, v in case.items() if k not in "xy"} for case in found["sets"]])


if __name__ == "__main__":
    main()
