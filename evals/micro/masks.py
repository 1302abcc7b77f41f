"""Coverage masks of shapes and texts: what an object's colour or ink is multiplied with."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mmcompress.errors import unknown_name
from mmcompress.evals.micro.vocabulary import SHAPE_NAMES

FONTS: tuple[str, ...] = ("DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSans.ttf")

Mask = NDArray[np.float32]

_OVERSAMPLING = 6
_GLYPH_GAP = 2


@functools.cache
def shape_mask(kind: str, size: int) -> Mask:
    """Draw one shape, anti-aliased, and return its coverage [size, size] in 0..1.

    Raises:
        SpecError: `kind` is not a known shape.
    """
    side = size * _OVERSAMPLING
    last = side - 2  # one oversampled pixel stays free on every side
    center = side / 2
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    match kind:
        case "circle":
            draw.ellipse((1, 1, last, last), fill=255)
        case "square":
            inset = 0.07 * side
            draw.rectangle((inset, inset, side - inset, side - inset), fill=255)
        case "triangle":
            draw.polygon([(center, 1), (last, 0.93 * side), (1, 0.93 * side)], fill=255)
        case "star":
            draw.polygon(_star(center, outer=center - 1, inner=0.42 * (center - 1)), fill=255)
        case "cross":
            arm = 0.16 * side
            draw.rectangle((center - arm, 1, center + arm, last), fill=255)
            draw.rectangle((1, center - arm, last, center + arm), fill=255)
        case "diamond":
            draw.polygon([(center, 0), (0.88 * side, center), (center, side - 1), (0.12 * side, center)], fill=255)
        case "ring":
            hole = 0.52 * (center - 1)
            draw.ellipse((1, 1, last, last), fill=255)
            draw.ellipse((center - hole, center - hole, center + hole, center + hole), fill=0)
        case "moon":
            draw.ellipse((1, 1, last, last), fill=255)
            draw.ellipse((0.34 * side, -0.06 * side, 1.22 * side, 0.82 * side), fill=0)
        case _:
            raise unknown_name("shape", kind, SHAPE_NAMES)
    return _coverage(image.resize((size, size), Image.Resampling.BOX))


def text_mask(text: str, font: str, font_size: int) -> Mask:
    """Draw the characters of `text` on one baseline and return their coverage [height, width] in 0..1.

    Raises:
        SpecError: `font` is not one of `FONTS`.
    """
    glyphs = [_glyph(character, font, font_size) for character in text]
    ascent = max(glyph.ascent for glyph in glyphs)
    height = ascent + max(len(glyph.mask) - glyph.ascent for glyph in glyphs)
    width = sum(glyph.mask.shape[1] for glyph in glyphs) + _GLYPH_GAP * (len(glyphs) - 1)
    mask = np.zeros((height, width), np.float32)
    x = 0
    for glyph in glyphs:
        top, (rows, columns) = ascent - glyph.ascent, glyph.mask.shape
        mask[top : top + rows, x : x + columns] = glyph.mask
        x += columns + _GLYPH_GAP
    return mask


def character_centers(text: str, font: str, font_size: int) -> list[float]:
    """Return the middle of every character of `text_mask`, in pixels from its left edge.

    Raises:
        SpecError: `font` is not one of `FONTS`.
    """
    widths = [_glyph(character, font, font_size).mask.shape[1] for character in text]
    return [sum(widths[:place]) + _GLYPH_GAP * place + width / 2 for place, width in enumerate(widths)]


class _Glyph(NamedTuple):
    mask: Mask
    ascent: int  # rows above the baseline


@functools.cache
def _glyph(character: str, font: str, font_size: int) -> _Glyph:
    left, top, right, bottom = (int(edge) for edge in _face(font, font_size).getbbox(character, anchor="ls"))
    image = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(image).text((-left, -top), character, font=_face(font, font_size), fill=255, anchor="ls")
    return _Glyph(_coverage(image), -top)


@functools.cache
def _face(font: str, font_size: int) -> ImageFont.FreeTypeFont:
    if font not in FONTS:
        raise unknown_name("font", font, FONTS)
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", font), font_size)


def _star(center: float, outer: float, inner: float) -> list[tuple[float, float]]:
    corners = []
    for index in range(10):
        angle = math.pi * (index / 5 - 0.5)
        radius = inner if index % 2 else outer
        corners.append((center + radius * math.cos(angle), center + radius * math.sin(angle)))
    return corners


def _coverage(image: Image.Image) -> Mask:
    mask = np.asarray(image, np.float32) / np.float32(255)
    mask.setflags(write=False)  # masks are cached and shared between calls
    return mask
