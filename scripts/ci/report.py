#!/usr/bin/env python3
"""Opens a report.html in headless Chromium and asserts that its curves and pictures are there.

    scripts/ci/report.py report.html [--images N] [--charts [ID ...]] [--screenshot FILE.png] [--dark]

A copy of the page gets one more script, which measures what was laid out and writes it into the page; Chromium prints
the page after that. Python's standard library and the command `chromium` are all it needs.
"""

import argparse
import html
import json
import pathlib
import re
import subprocess
import sys
import tempfile

CHARTS = ["loss", "held-out", "learning-rate", "speed"]

PROBE = """
<script>
window.addEventListener('load', () => {
  const charts = {};
  for (const figure of document.querySelectorAll('figure')) {
    const paths = [...figure.querySelectorAll('path')].map(p => ({length: p.getTotalLength(), width: p.getBBox().width}));
    const svg = figure.querySelector('svg');
    const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
    charts[figure.id] = {paths, width: box.width, height: box.height, labels: figure.querySelectorAll('text').length};
  }
  const images = [...document.images].map(i => ({width: i.naturalWidth, shown: i.getBoundingClientRect().width}));
  const result = {charts, images, overflow: document.documentElement.scrollWidth - window.innerWidth,
    requests: performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:'))};
  const pre = document.createElement('pre');
  pre.id = 'probe';
  pre.textContent = JSON.stringify(result);
  document.body.append(pre);
});
</script>
"""


def chromium(profile, *arguments):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={profile}", "--window-size=1200,1600"]
    done = subprocess.run(["chromium", *flags, *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        sys.exit(f"chromium failed: {done.stderr[-2000:]}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--images", type=int, default=0, help="pictures that the page must show")
    parser.add_argument("--charts", nargs="*", default=CHARTS, help="charts that the page must show; none for a page without")
    parser.add_argument("--screenshot", type=pathlib.Path)
    parser.add_argument("--dark", action="store_true", help="take the screenshot in the dark scheme")
    args = parser.parse_args()

    page = args.report.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        copy = folder / "report.html"
        copy.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
        dom = chromium(folder / "profile", "--dump-dom", copy.as_uri())
        if args.screenshot:
            scheme = ["--blink-settings=preferredColorScheme=0"] if args.dark else []
            shot = f"--screenshot={args.screenshot.resolve()}"
            chromium(folder / "profile", *scheme, shot, args.report.resolve().as_uri())
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    if not found:
        sys.exit("the page did not load")
    result = json.loads(html.unescape(found.group(1)))

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
    if result["requests"] or re.search(r'(?:src|href)="(?!data:)', page):
        wrong.append(f"the page wants other files: {result['requests']}")
    if result["overflow"] > 0:
        wrong.append(f"the page is {result['overflow']} pixels wider than the window")
    for line in wrong:
        print(f"{args.report}: {line}", file=sys.stderr)
    print(f"{len(result['charts'])} charts, {len(shown)} pictures, {len(page) / 1e6:.2f} MB")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
