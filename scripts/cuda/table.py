#!/usr/bin/env python3
"""The results of scripts/cuda/measure.sh as one table (Markdown): table.py DIR"""

import json
import sys
from pathlib import Path


# What the ends of the files' names say: which weights are not held on the GPU.
AWAY = {"streamed": "modulation", "swapped": "modulation, 30 blocks"}


def lines(path):
    """The JSON objects of a file, one a line; other lines are skipped."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [f for f in found if isinstance(f, dict)]


def gib(mib):
    return "" if mib is None else f"{mib / 1024:.1f}"


def main():
    folder = Path(sys.argv[1])
    torch = {}
    for line in lines(folder / "torch.json"):
        torch.setdefault(line["side"], {})[line["mode"]] = line
    print("| image | base | kept | not on the GPU | s/step | TFLOP/s | of the matmul peak | GiB | forecast, GiB | torch s/step | torch GiB | time of torch's best |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for side in (512, 768, 1024):
        theirs = torch.get(side, {})
        timed = [t["step_s_median"] for t in theirs.values() if "step_s_median" in t]
        cases = [(d, k, "") for d in ("bf16", "int8") for k in ("full", "selective", "none")]
        cases += [("int8", "full", away) for away in AWAY if side == 1024]
        for dtype, keep, away in cases:
            ours = next(iter(lines(folder / f"bench-{side}-{keep}-{dtype}{away and '-' + away}.json")), None)
            # PyTorch runs with a base in bf16 on the GPU; its best is what all are held against.
            modes = {m: t for m, t in theirs.items() if m.split("+")[0] == keep and dtype == "bf16" and not away}
            seconds = ", ".join(f"{t['step_s_median']:.3f} ({m})" if "step_s_median" in t else f"{t['skipped']} ({m})" for m, t in modes.items())
            memory = ", ".join(gib(t.get("peak_device_mb")) for t in modes.values())
            if ours is None:
                row = [""] * 5
                ratio = ""
            else:
                row = [f"{ours['step_s_median']:.3f}", f"{ours['model_tflops']:.0f}", f"{ours['model_share']:.0%}", gib(ours.get("peak_device_mb")), gib(ours.get("forecast_mb"))]
                ratio = f"{ours['step_s_median'] / min(timed):.2f}" if timed else ""
            print(f"| {side}x{side} | {dtype} | {keep} | {AWAY.get(away, '')} | " + " | ".join([*row, seconds, memory, ratio]) + " |")
    for path in sorted(folder.glob("bench-*.json")) + [folder / "steps-1000.json"]:
        for line in lines(path):
            phases = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in sorted(line["phase_s"].items(), key=lambda p: -p[1]))
            print(f"\n{path.stem}: {line['step_s_median'] * 1e3:.1f} ms = {phases} (ms); loss {line['loss_first']:.3f} to {line['loss_last']:.3f}")


if __name__ == "__main__":
    main()
