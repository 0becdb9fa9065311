#!/usr/bin/env python3
"""A folder of links to drawn pictures in which what is hard to draw stands more than once: stars STARS times, figures
twice. `emphasis.py PICTURES OUT_DIR STARS`"""

import json
import os
import sys
from pathlib import Path

pictures, out, stars = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])


def times(scene):
    if scene["kind"] == "figures":
        return 2
    return stars if scene["shape"] == "star" else 1


out.mkdir(parents=True)
for line in open(pictures / "index.jsonl", encoding="utf-8"):
    entry = json.loads(line)
    picture = pictures / entry["file"]
    for i in range(times(entry["scene"])):
        for source in (picture, picture.with_suffix(".txt")):
            os.link(source, out / f"{source.stem}-{i}{source.suffix}")
