#!/usr/bin/env python3
"""Fills in a rating page in headless Chromium as a person would, by clicks, and saves the answers that it exports.

    scripts/ci/rating.py rating.html answers.json [--screenshot FILE.png]

Every pair gets `A` for the first criterion and `equal` for the others. Python's standard library and `chromium` suffice.
"""

import argparse
import json
import pathlib

from page import FOREIGN, finish, look

CLICKS = """
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
  return {
    shown, exported: exported(), state: document.getElementById('state').textContent,
    pressed: document.querySelectorAll('#criteria [aria-pressed=true]').length,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
  };
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=pathlib.Path)
    parser.add_argument("answers", type=pathlib.Path)
    parser.add_argument("--screenshot", type=pathlib.Path)
    args = parser.parse_args()

    page, result = look(args.page, CLICKS, args.screenshot)
    exported = result["exported"]
    total = len(result["shown"]) * len(exported["criteria"])
    wrong = []
    if len(exported["answers"]) != total or result["pressed"] != len(exported["criteria"]):
        wrong.append(f"expected {total} answers, found {len(exported['answers'])}, {result['pressed']} of the last pair")
    if "all answered" not in result["state"]:
        wrong.append(f"the page says {result['state']!r}")
    if any(min(lengths) < 500 for lengths in result["shown"]) or result["overflow"] > 0:
        wrong.append(f"pictures are missing or too wide: {result['shown']}, {result['overflow']}")
    if FOREIGN.search(page):
        wrong.append("the page wants other files")
    args.answers.write_text(json.dumps(exported, ensure_ascii=False) + "\n", encoding="utf-8")
    finish(args.page, wrong, f"{len(result['shown'])} pairs, {total} answers")


if __name__ == "__main__":
    main()
