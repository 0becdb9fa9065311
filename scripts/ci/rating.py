#!/usr/bin/env python3
"""Fills in a rating page in headless Chromium as a person would, by clicks, and saves the answers that it exports.

    scripts/ci/rating.py rating.html answers.json [--screenshot FILE.png]

Every pair gets `A` for the first criterion and `equal` for the others. Python's standard library and `chromium` suffice.
"""

import argparse
import html
import json
import pathlib
import re
import sys
import tempfile

from report import chromium

CLICKS = """
<script>
window.addEventListener('load', () => {
  const shown = [];
  for (let i = 0; i < data.pairs.length; i++) {
    for (const [n, criterion] of data.criteria.entries()) {
      const choice = n === 0 ? 'A' : 'tie';
      const buttons = [...document.querySelectorAll('#criteria button')];
      buttons.find(b => b.dataset.criterion === criterion && b.dataset.choice === choice).click();
    }
    shown.push(['a', 'b'].map(side => document.getElementById(side).src.length));
    document.getElementById('next').click();
  }
  document.getElementById('rater').value = 'chromium';
  const pre = document.createElement('pre');
  pre.id = 'probe';
  pre.textContent = JSON.stringify({
    shown, exported: exported(), state: document.getElementById('state').textContent,
    pressed: document.querySelectorAll('#criteria [aria-pressed=true]').length,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
  });
  document.body.append(pre);
});
</script>
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=pathlib.Path)
    parser.add_argument("answers", type=pathlib.Path)
    parser.add_argument("--screenshot", type=pathlib.Path)
    args = parser.parse_args()

    page = args.page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        copy = folder / "rating.html"
        copy.write_text(page.replace("</body>", CLICKS + "</body>"), encoding="utf-8")
        dom = chromium(folder / "profile", "--dump-dom", copy.as_uri())
        if args.screenshot:
            chromium(folder / "profile", f"--screenshot={args.screenshot.resolve()}", args.page.resolve().as_uri())
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    if not found:
        sys.exit("the page did not load")
    result = json.loads(html.unescape(found.group(1)))
    exported = result["exported"]
    total = len(result["shown"]) * len(exported["criteria"])
    wrong = []
    if len(exported["answers"]) != total or result["pressed"] != len(exported["criteria"]):
        wrong.append(f"expected {total} answers, found {len(exported['answers'])}, {result['pressed']} of the last pair")
    if "all answered" not in result["state"]:
        wrong.append(f"the page says {result['state']!r}")
    if any(min(lengths) < 500 for lengths in result["shown"]) or result["overflow"] > 0:
        wrong.append(f"pictures are missing or too wide: {result['shown']}, {result['overflow']}")
    if re.search(r'(?:src|href)="(?!data:)', page):
        wrong.append("the page wants other files")
    for line in wrong:
        print(f"{args.page}: {line}", file=sys.stderr)
    args.answers.write_text(json.dumps(exported, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(result['shown'])} pairs, {total} answers")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
