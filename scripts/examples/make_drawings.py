#!/usr/bin/env python3
"""Draws the example data set: twelve small captioned pictures of simple shapes, in several sizes.

  python make_drawings.py OUT_DIR            needs Pillow; the pictures in examples/tiny-drawings were made with 13.0.0

Each picture is drawn at four times its size and reduced, so edges are smooth. What looks random (stars, grass, waves)
comes from a generator seeded with the picture's name: the same arguments give the same pixels.
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

ENLARGED = 4


class Canvas:
    """A picture whose coordinates run from 0 to 1 in both directions, whatever its size in pixels."""

    def __init__(self, name, width, height, background):
        self.size = (width, height)
        self.random = random.Random(name)
        self.image = Image.new("RGB", (width * ENLARGED, height * ENLARGED), background)
        self.draw = ImageDraw.Draw(self.image)

    def point(self, x, y):
        return (x * self.image.width, y * self.image.height)

    def circle(self, x, y, radius, colour):
        """A circle with its radius as a share of the shorter side, so that it stays round."""
        cx, cy = self.point(x, y)
        r = radius * min(self.image.size)
        self.draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=colour)

    def ellipse(self, left, top, right, bottom, colour):
        self.draw.ellipse((*self.point(left, top), *self.point(right, bottom)), fill=colour)

    def box(self, left, top, right, bottom, colour):
        self.draw.rectangle((*self.point(left, top), *self.point(right, bottom)), fill=colour)

    def polygon(self, points, colour):
        self.draw.polygon([self.point(x, y) for x, y in points], fill=colour)

    def line(self, points, colour, width):
        self.draw.line([self.point(x, y) for x, y in points], fill=colour, width=round(width * min(self.image.size)))

    def arc(self, left, top, right, bottom, start, end, colour, width):
        box = (*self.point(left, top), *self.point(right, bottom))
        self.draw.arc(box, start, end, fill=colour, width=round(width * min(self.image.size)))

    def finished(self):
        return self.image.resize(self.size, Image.LANCZOS)


def red_circle(c):
    c.circle(0.5, 0.5, 0.36, "#d62828")


def blue_square(c):
    c.box(0.2, 0.3, 0.8, 0.7, "#1d4ed8")


def green_triangle(c):
    c.polygon([(0.5, 0.15), (0.88, 0.82), (0.12, 0.82)], "#2a9d3a")


def house(c):
    c.box(0, 0.78, 1, 1, "#5fb04f")
    c.box(0.25, 0.45, 0.75, 0.85, "#f3dfb5")
    c.polygon([(0.18, 0.47), (0.5, 0.15), (0.82, 0.47)], "#c0392b")
    c.box(0.44, 0.62, 0.56, 0.85, "#6b4226")
    c.box(0.31, 0.54, 0.4, 0.66, "#8fd0f0")
    c.box(0.6, 0.54, 0.69, 0.66, "#8fd0f0")


def tree(c):
    c.box(0, 0.86, 1, 1, "#8dc26f")
    c.box(0.44, 0.55, 0.56, 0.9, "#7a4a21")
    for x, y, radius in ((0.5, 0.3, 0.24), (0.33, 0.44, 0.2), (0.67, 0.44, 0.2)):
        c.circle(x, y, radius, "#2f7d32")


def sun(c):
    rays = [(0, -1), (0.7, -0.7), (1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7), (-1, 0), (-0.7, -0.7)]
    for x, y in rays:
        c.line([(0.5 + 0.28 * x, 0.5 + 0.28 * y), (0.5 + 0.42 * x, 0.5 + 0.42 * y)], "#ffd60a", 0.05)
    c.circle(0.5, 0.5, 0.22, "#ffd60a")


def fish(c):
    c.polygon([(0.66, 0.5), (0.92, 0.28), (0.92, 0.72)], "#e76f00")
    c.ellipse(0.14, 0.26, 0.74, 0.74, "#f98c1d")
    c.circle(0.27, 0.45, 0.055, "white")
    c.circle(0.265, 0.45, 0.028, "black")
    for _ in range(6):
        c.circle(c.random.uniform(0.04, 0.96), c.random.uniform(0.05, 0.2), 0.03, "#cfeeff")


def smile(c):
    c.circle(0.5, 0.5, 0.4, "#ffd93b")
    c.circle(0.36, 0.4, 0.055, "#222222")
    c.circle(0.64, 0.4, 0.055, "#222222")
    c.arc(0.28, 0.3, 0.72, 0.74, 25, 155, "#222222", 0.04)


def sailing_boat(c):
    c.box(0, 0.68, 1, 1, "#2274a5")
    for _ in range(9):
        x, y = c.random.uniform(0, 0.9), c.random.uniform(0.78, 0.97)
        c.line([(x, y), (x + 0.08, y)], "#8fc7e8", 0.015)
    c.polygon([(0.22, 0.62), (0.78, 0.62), (0.68, 0.76), (0.32, 0.76)], "#8b3a1e")
    c.line([(0.5, 0.62), (0.5, 0.12)], "#4a2c17", 0.025)
    c.polygon([(0.52, 0.14), (0.52, 0.57), (0.76, 0.57)], "white")
    c.polygon([(0.48, 0.22), (0.48, 0.57), (0.32, 0.57)], "#f2f2f2")


def cat(c):
    for side in (-1, 1):
        c.polygon([(0.5 + side * 0.32, 0.14), (0.5 + side * 0.36, 0.48), (0.5 + side * 0.08, 0.3)], "#7d7f85")
        c.polygon([(0.5 + side * 0.29, 0.22), (0.5 + side * 0.31, 0.4), (0.5 + side * 0.15, 0.31)], "#f2b8c0")
    c.circle(0.5, 0.56, 0.36, "#8f9197")
    for side in (-1, 1):
        c.circle(0.5 + side * 0.15, 0.5, 0.07, "#4caf50")
        c.ellipse(0.485 + side * 0.15, 0.455, 0.515 + side * 0.15, 0.545, "black")
        for lift in (-0.03, 0.03):
            c.line([(0.5 + side * 0.1, 0.66), (0.5 + side * 0.4, 0.66 + lift)], "#f4f4f4", 0.012)
    c.polygon([(0.46, 0.61), (0.54, 0.61), (0.5, 0.66)], "#f08a9b")


def flower(c):
    c.line([(0.5, 0.42), (0.5, 0.96)], "#3a8f3a", 0.05)
    c.ellipse(0.5, 0.66, 0.78, 0.76, "#3a8f3a")
    for x, y in ((0.5, 0.19), (0.7, 0.29), (0.66, 0.45), (0.34, 0.45), (0.3, 0.29)):
        c.circle(x, y, 0.16, "#8e44ad")
    c.circle(0.5, 0.335, 0.13, "#f4c430")


def night_sky(c):
    for _ in range(40):
        c.circle(c.random.random(), c.random.uniform(0, 0.75), c.random.uniform(0.004, 0.011), "#fff6c8")
    c.circle(0.72, 0.28, 0.15, "#f6e7a1")
    c.circle(0.66, 0.24, 0.13, "#14213d")
    c.polygon([(0, 1), (0, 0.8), (0.25, 0.7), (0.5, 0.84), (0.8, 0.74), (1, 0.82), (1, 1)], "#0b132b")


# name, width, height, background, what is drawn, caption
DRAWINGS = [
    ("01-red-circle", 96, 64, "white", red_circle, "a red circle on a white background"),
    ("02-blue-square", 64, 96, "#f9e26b", blue_square, "黄色背景上的一个蓝色方块"),
    ("03-green-triangle", 80, 80, "#e5e5e5", green_triangle, "a green triangle on a light grey background"),
    ("04-house", 128, 96, "#a9dcf5", house, "a small house with a red roof and two windows on a green lawn, blue sky"),
    ("05-tree", 96, 128, "#d6effa", tree, "一棵大树，绿色的树冠，棕色的树干，浅蓝色的天空"),
    ("06-sun", 112, 112, "#f4814a", sun, "a yellow sun with eight rays on an orange background"),
    ("07-fish", 160, 96, "#5db7de", fish, "an orange fish that swims to the left, bubbles above it, blue water"),
    ("08-smile", 120, 120, "#f7b7c9", smile, "粉色背景上的一张黄色笑脸"),
    ("09-boat", 192, 128, "#bfe3f2", sailing_boat, "a brown sailing boat with two white sails on a calm blue sea"),
    ("10-cat", 144, 160, "#f6ead7", cat, "一只灰色小猫的脸，绿色的眼睛，粉色的鼻子"),
    ("11-flower", 96, 144, "#eaf6e4", flower, "a purple flower with a yellow centre and one leaf"),
    ("12-night", 256, 192, "#14213d", night_sky, "夜空中的弯月和星星，下面是黑色的山丘"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, width, height, background, paint, caption in DRAWINGS:
        canvas = Canvas(name, width, height, background)
        paint(canvas)
        canvas.finished().save(out / f"{name}.png", optimize=True)
        (out / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
