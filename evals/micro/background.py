"""Drawing the greyish backgrounds: plain, smooth, lightly cluttered or heavily cluttered."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mmcompress.evals.micro.scene import CANVAS, pick

Kind = Literal["plain", "smooth", "light clutter", "heavy clutter"]

# A background is drawn larger than the canvas and then cropped, so that marks are cut off at its edges.
_SIDE = CANVAS + 152
_MARKS: dict[Kind, tuple[int, int]] = {"light clutter": (20, 80), "heavy clutter": (60, 260)}


def draw_background(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a background of a random kind [CANVAS, CANVAS, 3]; its clutter is grey, so that colour tells objects."""
    kind: Kind = pick(rng, get_args(Kind))
    pixels = np.full((_SIDE, _SIDE, 3), rng.uniform(60, 150) + rng.uniform(-12, 12, 3), np.float32)
    if kind != "plain":
        pixels += _smooth_noise(rng)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if kind in _MARKS:
        draw = ImageDraw.Draw(image)
        for _ in range(rng.integers(*_MARKS[kind])):
            _draw_mark(rng, draw)
    return _crop(rng, np.asarray(image))


def _smooth_noise(rng: np.random.Generator) -> NDArray[np.float32]:
    cells = int(rng.integers(3, 12))
    coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    fine = np.asarray(coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    return fine * np.float32(rng.uniform(8, 22))


def _draw_mark(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> None:
    x, y = rng.uniform(0, _SIDE, 2)
    tinted = (rng.uniform(30, 210) + rng.uniform(-14, 14, 3)).clip(0, 255)
    red, green, blue = (int(channel) for channel in tinted)
    length = rng.uniform(4, 26)
    match rng.integers(3):
        case 0:
            angle = rng.uniform(0, 2 * math.pi)
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line((x, y, *end), fill=(red, green, blue), width=int(rng.integers(1, 4)))
        case 1:
            draw.ellipse((x, y, x + 0.5 * length, y + 0.5 * length), fill=(red, green, blue))
        case _:
            height = length * rng.uniform(0.2, 0.6)
            draw.rectangle((x, y, x + 0.6 * length, y + height), outline=(red, green, blue))


def _crop(rng: np.random.Generator, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    top, left = rng.integers(0, _SIDE - CANVAS, 2)
    vertical, horizontal = (int(step) for step in rng.choice((-1, 1), 2))
    return pixels[top : top + CANVAS, left : left + CANVAS][::vertical, ::horizontal]
