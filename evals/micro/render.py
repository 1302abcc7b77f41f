"""Drawing a scene onto a background."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmcompress.evals.micro.background import draw_background
from mmcompress.evals.micro.masks import Mask, number_mask, shape_mask
from mmcompress.evals.micro.scene import CANVAS, SIGN_PADDING, Scene, Sign
from mmcompress.evals.micro.vocabulary import COLORS

_BLACK, _WHITE = 15.0, 250.0
_WHITE_INK_ON = ("red", "blue", "purple")
_MIN_BRIGHTNESS_FOR_BLACK_INK = 95

Pixels = NDArray[np.float32]


def render(rng: np.random.Generator, scene: Scene) -> NDArray[np.uint8]:
    """Draw `scene` on a random background, with colour jitter and sometimes noise; RGB [CANVAS, CANVAS, 3]."""
    pixels = draw_background(rng).astype(np.float32)
    for sign in scene.signs:
        _paint_sign(pixels, sign, _jitter(rng, sign.color))
    for shape in scene.shapes:
        mask = shape_mask(shape.kind, shape.box.width)
        _blend(pixels, shape.box.x, shape.box.y, mask, _jitter(rng, shape.color))
    if rng.random() < 0.5:
        pixels += rng.normal(0, rng.uniform(1, 6), (CANVAS, CANVAS, 1)).astype(np.float32)
    return pixels.clip(0, 255).astype(np.uint8)


def _jitter(rng: np.random.Generator, color: str) -> Pixels:
    jittered = np.array(COLORS[color]) * rng.uniform(0.88, 1.04) + rng.uniform(-14, 14, 3)
    return jittered.clip(0, 255).astype(np.float32)


def _paint_sign(pixels: Pixels, sign: Sign, color: Pixels) -> None:
    x, y, width, height = sign.box
    pixels[y : y + height, x : x + width] = color
    black = sign.color not in _WHITE_INK_ON and color.mean() > _MIN_BRIGHTNESS_FOR_BLACK_INK
    ink = np.full(3, _BLACK if black else _WHITE, np.float32)
    top, left = SIGN_PADDING
    _blend(pixels, x + left, y + top, number_mask(sign.number, sign.font, sign.font_size), ink)


def _blend(pixels: Pixels, x: int, y: int, mask: Mask, color: Pixels) -> None:
    height, width = mask.shape
    window = pixels[y : y + height, x : x + width]
    window += (color - window) * mask[..., None]
