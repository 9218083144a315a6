"""Numbers on signs and receipt lines: pictures of every shape in which a few small digits have to be read.

The digits are drawn from a 5 x 7 bitmap, so they look the same on every machine. All lengths but `scale` are in pixels
of a picture of 36 patches of 12 px, whatever its shape: the digits are as large on a long strip as on a square. Each
digit stands in a cell of 12 px, a little off its middle; a tower of the demo's size does not learn in minutes to read
digits that stand across patches anyhow.

Everything here is a pure function of a `random.Random`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

PATCH = 12
SQUARE = (6, 6)
GRIDS = ((2, 18), (3, 12), (4, 9), (6, 6), (9, 4), (12, 3), (18, 2))
"""Patches as (rows, columns), from a line of 9 : 1 to a sign of 1 : 9. Each is exactly 36, so that a NaFlex tower with
a budget of 36 has as many tokens as a tower that reads squares of 6 x 6."""
MOST = 3
"""Digits of a number; each length is as likely."""
DOT = (1.35, 1.5)
"""Side of one dot of a digit's bitmap, smallest and largest."""
SLACK = 1.0
"""How far a digit is off its cell's middle, at most; half of that up and down."""
SCALE = (14, 30)
"""Pixels of the file for each patch, smallest and largest: pictures are larger than any tower sees them."""
SUPERSAMPLE = 3
GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00010 00100 01000 11111",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}
"""Seven rows of five dots."""
WIDTH, HEIGHT = 5, 7


@dataclass(frozen=True)
class Sign:
    """A number somewhere on a strip: from left to right, or one digit below the other where the strip is tall."""

    text: str
    grid: tuple[int, int]
    """Rows and columns of patches: the shape."""
    row: int
    column: int
    """Cell of the first digit."""
    offset: tuple[float, float]
    """From a cell's corner to its digit's, to the right and down."""
    dot: float
    scale: int
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the file's picture in pixels."""
        rows, columns = self.grid
        return columns * self.scale, rows * self.scale

    @property
    def shape(self) -> str:
        """`9:1` (width : height) ... `1:9`."""
        rows, columns = self.grid
        return {2: "9:1", 3: "4:1", 4: "9:4", 6: "1:1", 9: "4:9", 12: "1:4", 18: "1:9"}[rows]

    def corner(self, number: int) -> tuple[float, float]:
        """Top left corner of a digit."""
        rows, columns = self.grid
        down, right = (number, 0) if rows > columns else (0, number)
        return PATCH * (self.column + right) + self.offset[0], PATCH * (self.row + down) + self.offset[1]


def make_sign(rng: random.Random, grid: tuple[int, int]) -> Sign:
    """A random number at a random place of a strip of this shape."""
    rows, columns = grid
    digits = rng.randint(1, MOST)
    text = "".join(rng.choice("0123456789") for _ in range(digits))
    dot = rng.uniform(*DOT)
    down, across = (digits, 1) if rows > columns else (1, digits)
    row, column = rng.randint(0, rows - down), rng.randint(0, columns - across)
    x, y = (
        (PATCH - size * dot) / 2 + rng.uniform(-slack, slack) for size, slack in ((WIDTH, SLACK), (HEIGHT, SLACK / 2))
    )
    ink = (rng.randint(0, 90), rng.randint(0, 90), rng.randint(0, 90))
    paper = (rng.randint(215, 255), rng.randint(215, 255), rng.randint(215, 255))
    return Sign(text, grid, row, column, (x, y), dot, rng.randint(*SCALE), ink, paper)


def draw(sign: Sign) -> Image.Image:
    """The picture, `sign.size` pixels, RGB, edges smoothed."""
    width, height = sign.size
    factor = SUPERSAMPLE * sign.scale / PATCH
    canvas = Image.new("RGB", (width * SUPERSAMPLE, height * SUPERSAMPLE), sign.paper)
    pen = ImageDraw.Draw(canvas)
    for number, digit in enumerate(sign.text):
        left, top = sign.corner(number)
        for row, column in np.argwhere(bitmap(digit)):
            x, y = left + column * sign.dot, top + row * sign.dot
            corners = [round(factor * v) for v in (x, y, x + sign.dot, y + sign.dot)]
            pen.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill=sign.ink)
    return canvas.reduce(SUPERSAMPLE)


def bitmap(digit: str) -> np.ndarray:
    """bool[7, 5]: the dots of a digit."""
    return np.array([[dot == "1" for dot in row] for row in GLYPHS[digit].split()])


def distance(said: str, true: str) -> int:
    """Fewest single characters to put in, take out or change (Levenshtein)."""
    row = list(range(len(true) + 1))
    for i, left in enumerate(said, start=1):
        before, row[0] = row[0], i
        for j, right in enumerate(true, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]
