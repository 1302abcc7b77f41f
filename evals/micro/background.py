"""The greyish backgrounds, whose clutter has no colour: plain, smooth, lightly cluttered or heavily cluttered."""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Kind = Literal["plain", "smooth", "light clutter", "heavy clutter"]

_POOL = 96
_SIDE = 400
_TINT = 10  # grey levels
_MARKS: dict[Kind, tuple[int, int]] = {"light clutter": (30, 120), "heavy clutter": (90, 400)}


def draw_background(rng: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """Cut a background [height, width, 3] of a random kind out of a pool of pictures, and tint it."""
    picture = _pool_picture(int(rng.integers(_POOL)))
    missing = ((0, max(0, height - _SIDE)), (0, max(0, width - _SIDE)), (0, 0))
    if missing != ((0, 0), (0, 0), (0, 0)):
        picture = np.pad(picture, missing, mode="symmetric")
    top = rng.integers(picture.shape[0] - height + 1)
    left = rng.integers(picture.shape[1] - width + 1)
    down, across = (1 if rng.random() < 0.5 else -1 for _ in range(2))
    cut = picture[top : top + height, left : left + width][::down, ::across]
    return (cut + rng.integers(-_TINT, _TINT + 1, 3, np.int16)).clip(0, 255).astype(np.uint8)


@functools.cache
def _pool_picture(index: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(index)
    kind: Kind = get_args(Kind)[index % len(get_args(Kind))]
    pixels = np.full((_SIDE, _SIDE, 3), rng.uniform(60, 150) + rng.uniform(-12, 12, 3), np.float32)
    if kind != "plain":
        pixels += _smooth_noise(rng)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if kind in _MARKS:
        draw = ImageDraw.Draw(image)
        for _ in range(rng.integers(*_MARKS[kind])):
            _draw_mark(rng, draw)
    return np.asarray(image)


def _smooth_noise(rng: np.random.Generator) -> NDArray[np.float32]:
    cells = int(rng.integers(4, 15))
    coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    fine = np.asarray(coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    return fine * np.float32(rng.uniform(8, 22))


def _draw_mark(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> None:
    x, y = rng.uniform(-20, _SIDE, 2)  # marks are cut off at all edges
    # Never as bright as something white, which a disc would be taken for.
    tinted = (rng.uniform(30, 180) + rng.uniform(-14, 14, 3)).clip(0, 255)
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
