#!/usr/bin/env python3
"""Opens a report.html in headless Chromium and asserts that its curves and pictures are there.

    scripts/ci/report.py report.html [--images N] [--charts [ID ...]] [--screenshot FILE.png] [--dark]

Python's standard library and the command `chromium` are all it needs.
"""

import argparse
import pathlib

from page import FOREIGN, finish, look

CHARTS = ["loss", "held-out", "learning-rate", "speed"]

LOOK = """
  const charts = {};
  for (const figure of document.querySelectorAll('figure')) {
    const paths = [...figure.querySelectorAll('path')].map(p => ({length: p.getTotalLength(), width: p.getBBox().width}));
    const svg = figure.querySelector('svg');
    const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
    charts[figure.id] = {paths, width: box.width, height: box.height, labels: figure.querySelectorAll('text').length};
  }
  const images = [...document.images].map(i => ({width: i.naturalWidth, shown: i.getBoundingClientRect().width}));
  return {charts, images, overflow: document.documentElement.scrollWidth - window.innerWidth,
    requests: performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:'))};
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--images", type=int, default=0, help="pictures that the page must show")
    parser.add_argument("--charts", nargs="*", default=CHARTS, help="charts that the page must show; none for a page without")
    parser.add_argument("--screenshot", type=pathlib.Path)
    parser.add_argument("--dark", action="store_true", help="take the screenshot in the dark scheme")
    args = parser.parse_args()

    page, result = look(args.report, LOOK, args.screenshot, args.dark)
    wrong = []
    for name in args.charts:
        chart = result["charts"].get(name)
        if chart is None:
            wrong.append(f"no chart `{name}`")
            continue
        if not chart["paths"] or any(p["length"] < 50 or p["width"] < 50 for p in chart["paths"]):
            wrong.append(f"`{name}` has no whole curve: {chart['paths']}")
        if chart["width"] < 300 or chart["height"] < 100 or chart["labels"] < 6:
            wrong.append(f"`{name}` is not laid out: {chart}")
    shown = [i for i in result["images"] if i["width"] > 0 and i["shown"] > 0]
    if len(shown) != len(result["images"]) or len(shown) < args.images:
        wrong.append(f"expected {args.images} pictures or more, {len(shown)} of {len(result['images'])} are shown")
    if result["requests"] or FOREIGN.search(page):
        wrong.append(f"the page wants other files: {result['requests']}")
    if result["overflow"] > 0:
        wrong.append(f"the page is {result['overflow']} pixels wider than the window")
    finish(args.report, wrong, f"{len(result['charts'])} charts, {len(shown)} pictures, {len(page) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
