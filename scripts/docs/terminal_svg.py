#!/usr/bin/env python3
"""Draws captured terminal output as an SVG picture.

  script -qec 'COMMAND' capture.txt       # or any file with the bytes that the terminal received
  python terminal_svg.py capture.txt docs/images/run.svg [--title TEXT] [--columns N] [--last N] [--skip N]

Understands what progress bars use: carriage return, line erase, cursor movement, colours, bold, dim. The picture is
what stands on the screen when the output ends. Needs only the standard library.
"""

import argparse
import re
import unicodedata
from pathlib import Path
from xml.sax.saxutils import escape

FONT_SIZE, CELL_WIDTH, LINE_HEIGHT, MARGIN, TITLE_BAR = 14, 8.43, 20, 16, 32
BACKGROUND, FOREGROUND = "#1b1f27", "#d5dae3"
COLOURS = ["#3b4252", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", "#d5dae3"]
BRIGHT = ["#7f8899", "#f08a92", "#b5d99c", "#f2d59b", "#8cc6f7", "#dba0ec", "#7fd0da", "#ffffff"]
TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()][A-Z0-9]|([\r\n\b\t])|(.)", re.DOTALL)
PLAIN = (None, False, False)


class Screen:
    """Rows of cells; a cell is a character and its style (colour, bold, dim). The second half of a wide one is empty."""

    def __init__(self, columns):
        self.columns, self.rows, self.x, self.y, self.style = columns, [[]], 0, 0, PLAIN

    def feed(self, text):
        for arguments, command, control, char in TOKEN.findall(text):
            if command:
                self.escape(command, [int(a) if a.isdigit() else 0 for a in arguments.split(";")])
            elif control == "\n":
                self.move(0, self.y + 1)
            elif control == "\r":
                self.x = 0
            elif control == "\b":
                self.x = max(self.x - 1, 0)
            elif control == "\t":
                self.x = (self.x // 8 + 1) * 8
            elif char and ord(char) >= 32:
                self.put(char)

    def put(self, char):
        width = 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if self.x + width > self.columns:
            self.move(0, self.y + 1)
        row = self.rows[self.y]
        row.extend([(" ", PLAIN)] * (self.x + width - len(row)))
        row[self.x] = (char, self.style)
        if width == 2:
            row[self.x + 1] = ("", self.style)
        self.x += width

    def move(self, x, y):
        self.x, self.y = x, max(y, 0)
        while len(self.rows) <= self.y:
            self.rows.append([])

    def escape(self, command, arguments):
        count = max(arguments[0], 1)
        row = self.rows[self.y]
        match command:
            case "A" | "F":
                self.move(0 if command == "F" else self.x, self.y - count)
            case "B" | "E":
                self.move(0 if command == "E" else self.x, self.y + count)
            case "C":
                self.x = min(self.x + count, self.columns - 1)
            case "D":
                self.x = max(self.x - count, 0)
            case "G":
                self.x = count - 1
            case "K" if arguments[0] == 2:
                row.clear()
            case "K" if arguments[0] == 0:
                del row[self.x :]
            case "J" if arguments[0] == 0:
                del row[self.x :], self.rows[self.y + 1 :]
            case "m":
                self.restyle(arguments)

    def restyle(self, arguments):
        colour, bold, dim = self.style
        for argument in arguments:
            match argument:
                case 0:
                    colour, bold, dim = PLAIN
                case 1:
                    bold = True
                case 2:
                    dim = True
                case 22:
                    bold = dim = False
                case 39:
                    colour = None
                case _ if 30 <= argument <= 37:
                    colour = COLOURS[argument - 30]
                case _ if 90 <= argument <= 97:
                    colour = BRIGHT[argument - 90]
        self.style = (colour, bold, dim)

    def lines(self):
        """The rows without blank ends, and without blank rows at the end."""
        rows = [row[: max((i + 1 for i, (char, _) in enumerate(row) if char.strip()), default=0)] for row in self.rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows


def runs(row):
    """Stretches of one style: column, text, width in cells, style. Wide characters stand alone, so that they cannot
    push what follows out of its column."""
    stretches = []
    for column, (char, style) in enumerate(row):
        if not char:
            continue
        wide = column + 1 < len(row) and row[column + 1][0] == ""
        joined = stretches and not wide and stretches[-1][3] == style and stretches[-1][0] + stretches[-1][2] == column
        if joined and stretches[-1][2] == len(stretches[-1][1]):
            start, text, width, _ = stretches[-1]
            stretches[-1] = (start, text + char, width + 1, style)
        else:
            stretches.append((column, char, 2 if wide else 1, style))
    return [s for s in stretches if s[1].strip()]


def svg(rows, columns, title):
    width, height = columns * CELL_WIDTH + 2 * MARGIN, len(rows) * LINE_HEIGHT + 2 * MARGIN + TITLE_BAR
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" '
        f'font-size="{FONT_SIZE}" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f'<rect width="100%" height="100%" rx="10" fill="{BACKGROUND}"/>',
    ]
    out += [f'<circle cx="{MARGIN + 6 + 20 * i}" cy="18" r="6" fill="{c}"/>' for i, c in enumerate(("#ff5f57", "#febc2e", "#28c840"))]
    out.append(f'<text x="{width / 2:.1f}" y="23" fill="#8a93a5" text-anchor="middle">{escape(title)}</text>')
    for number, row in enumerate(rows):
        y = TITLE_BAR + MARGIN + number * LINE_HEIGHT + FONT_SIZE
        for column, text, cells, (colour, bold, dim) in runs(row):
            weight, opacity = ' font-weight="bold"' if bold else "", ' opacity="0.6"' if dim else ""
            out.append(
                f'<text x="{MARGIN + column * CELL_WIDTH:.1f}" y="{y}" fill="{colour or FOREGROUND}" '
                f'textLength="{cells * CELL_WIDTH:.1f}" xml:space="preserve"{weight}{opacity}>{escape(text)}</text>'
            )
    return "\n".join([*out, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capture", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--title", default="qwen-lora")
    parser.add_argument("--columns", type=int, default=110)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many lines at the start")
    parser.add_argument("--last", type=int, default=0, help="keep only so many lines at the end")
    a = parser.parse_args()
    text = a.capture.read_bytes().decode("utf-8", "replace")
    # what `script` writes of its own
    text = re.sub(r"\AScript started on .*\n|\n?Script done on .*\n?\Z", "", text)
    screen = Screen(a.columns)
    screen.feed(text)
    rows = screen.lines()[a.skip :]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(svg(rows[-a.last :] if a.last else rows, a.columns, a.title), encoding="utf-8")


if __name__ == "__main__":
    main()
