#!/usr/bin/env python3
"""Turns the JSON lines of compare.sh into a markdown table: medians over the runs, their spread, and the ratio.

  python table.py RESULTS.jsonl
"""

import json
import statistics
import sys

# what is shown, the field that both engines print, digits
ROWS = [
    ("time per step, s", "step_s_median", 4),
    ("fastest step, s", "step_s_min", 4),
    ("start to first step, s", "start_to_first_step_s", 3),
    ("peak memory, MiB", "peak_rss_mb", 1),
]


def cell(values, digits):
    """The median, and the smallest and largest value if there are several."""
    text = f"{statistics.median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    runs = [json.loads(line) for line in lines]
    torch = [run for run in runs if run["engine"] == "torch"]
    ours = [run for run in runs if run["engine"] == "qwen-lora"]
    for field in ("batch", "image_tokens", "text_tokens", "rank", "threads", "dtype", "steps", "trainable_params"):
        seen = {run[field] for run in runs}
        if len(seen) != 1:
            sys.exit(f"the runs do not measure the same thing: `{field}` is {sorted(map(str, seen))}")

    shared = runs[0]
    print(
        f"{shared['dtype']}, checkpointing {ours[0]['checkpointing']}, {shared['threads']} threads, batch {shared['batch']}, "
        f"{shared['image_tokens']} image + {shared['text_tokens']} text tokens, rank {shared['rank']}; "
        f"medians of {len(torch)} and {len(ours)} alternated runs of {shared['steps']} steps (smallest to largest):\n"
    )
    print("| | torch | qwen-lora | qwen-lora / torch |\n| --- | --- | --- | --- |")
    for title, field, digits in ROWS:
        theirs, mine = [run[field] for run in torch], [run[field] for run in ours]
        ratio = statistics.median(mine) / statistics.median(theirs)
        print(f"| {title} | {cell(theirs, digits)} | {cell(mine, digits)} | {ratio:.2f} |")
    print("\n```json")
    print("\n".join(lines))
    print("```")


if __name__ == "__main__":
    main()
