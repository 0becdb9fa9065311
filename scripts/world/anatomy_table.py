#!/usr/bin/env python3
"""The table of scripts/world/anatomy.sh: errors per picture with and without the terms, as pairs of pictures that share
prompt, noise and training seed. `anatomy_table.py OUT_DIR NOISES SEED...`"""

import json
import math
import sys
from pathlib import Path

out, noises, seeds = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]


def errors(name):
    """Of each picture: hand error, limb error, either, wrong attributes."""
    files = [out / f"{name}-{noise}.json" for noise in noises]
    pictures = [p for file in files for p in json.loads(file.read_text(encoding="utf-8"))["list"]]
    rows = [(p["hand_error"], p["limb_error"], p["hand_error"] or p["limb_error"], not p["attributes"]) for p in pictures]
    return list(zip(*rows))


def mcnemar(worse, better):
    """Exact two-sided probability of so uneven a split of the pairs that differ."""
    n, k = worse + better, min(worse, better)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def difference(worse, better, n):
    """The difference of paired shares with its 95 % interval (Agresti and Min 2005: half a pair added to each cell)."""
    b, c, m = worse + 0.5, better + 0.5, n + 2
    half = 1.96 * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return (worse - better) / n, (b - c) / m - half, (b - c) / m + half


rows = ["hand errors", "limb errors", "either", "wrong attributes"]
base = errors("base")
without = [sum((errors(f"without-{s}")[i] for s in seeds), ()) for i in range(4)]
with_terms = [sum((errors(f"with-{s}")[i] for s in seeds), ()) for i in range(4)]
print(f"{len(base[0])} pictures of prompts that no training saw (noises {', '.join(noises)}), training seeds {', '.join(seeds)}\n")
print("| pictures with | base | without the terms | with them | difference (95 % interval) | McNemar |")
print("| --- | --- | --- | --- | --- | --- |")
for i, row in enumerate(rows):
    n = len(with_terms[i])
    worse = sum(b and not a for a, b in zip(without[i], with_terms[i]))
    better = sum(a and not b for a, b in zip(without[i], with_terms[i]))
    d, low, high = (100 * v for v in difference(worse, better, n))
    shares = [100 * sum(errors) / len(errors) for errors in (base[i], without[i], with_terms[i])]
    cells = " | ".join(f"{v:.1f} %" for v in shares)
    print(f"| {row} | {cells} | {d:+.1f} ({low:+.1f} to {high:+.1f}) points | p = {mcnemar(worse, better):.2g} |")
