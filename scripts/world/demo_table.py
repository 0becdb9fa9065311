#!/usr/bin/env python3
"""The table of scripts/world/demo.sh from its files: `demo_table.py OUT_DIR SECONDS_OF_TRAINING`."""

import json
import sys
from pathlib import Path

out, seconds = Path(sys.argv[1]), int(sys.argv[2])
read = lambda name: json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def share(name, row):
    s = read(name)["shares"][row]
    return f"{100 * s['rate']:.1f} % ({100 * s['low']:.1f} to {100 * s['high']:.1f})"


def both(kind, value):
    return f"{value(f'{kind}-before')} | {value(f'{kind}-after')}"


hat = lambda name: f"{read(name)['styles']['hat']:.2f}"
distance = lambda name: f"{read(name)['distance']['to_drawn']:.2f}"
pictures = read("figures-after")["pictures"]
print(f"Training took {seconds} s; {pictures} held-out prompts of each kind.\n")
print("| | before | after |")
print("| --- | --- | --- |")
print(f"| `kubo, ...`: hat on each head (1 is a whole one) | {both('figures', hat)} |")
print(f"| distance to drawn pictures with hats | {both('figures', distance)} |")
print(f"| all attributes right | {both('figures', lambda n: share(n, 'all attributes'))} |")
print(f"| figures without the trigger: hat | {both('plain', hat)} |")
print(f"| distance to drawn pictures | {both('plain', distance)} |")
print(f"| all attributes right | {both('plain', lambda n: share(n, 'all attributes'))} |")
print(f"| objects: distance to drawn pictures | {both('objects', distance)} |")
print(f"| all attributes right | {both('objects', lambda n: share(n, 'all attributes'))} |")
