"""Drawing a scene onto a background."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmcompress.evals.micro.background import draw_background
from mmcompress.evals.micro.masks import Mask, shape_mask, text_mask
from mmcompress.evals.micro.scene import SIGN_PADDING, Scene, Shape, Sign
from mmcompress.evals.micro.vocabulary import COLORS

_BLACK, _WHITE = np.full(3, 15, np.float32), np.full(3, 250, np.float32)
_WHITE_INK_ON = ("red", "blue", "purple")
_MIN_BRIGHTNESS_FOR_BLACK_INK = 95
_NOISE_SIDE = 1024

Picture = NDArray[np.uint8]
Tint = NDArray[np.float32]


def render(rng: np.random.Generator, scene: Scene) -> Picture:
    """Draw `scene` on a random background, with colour jitter and sometimes noise; RGB [height, width, 3]."""
    picture = draw_background(rng, scene.width, scene.height)
    paint(picture, scene.objects, [draw_tint(rng, thing.color) for thing in scene.objects])
    return add_noise(rng, picture, draw_noise(rng))


def draw_tint(rng: np.random.Generator, color: str) -> Tint:
    """Draw a variation of a named colour: RGB [3] in 0..255."""
    jittered = np.array(COLORS[color]) * rng.uniform(0.88, 1.04) + rng.uniform(-14, 14, 3)
    return jittered.clip(0, 255).astype(np.float32)


def paint(picture: Picture, objects: Sequence[Shape | Sign], tints: Sequence[Tint]) -> None:
    """Draw every object in its tint over `picture` [height, width, 3], in place."""
    for thing, tint in zip(objects, tints, strict=True):
        if isinstance(thing, Shape):
            _blend(picture, thing.box.x, thing.box.y, shape_mask(thing.kind, thing.box.width), tint)
        else:
            _paint_sign(picture, thing, tint)


def draw_noise(rng: np.random.Generator) -> float:
    """Draw a standard deviation of noise, in grey levels; half of them are 0."""
    return rng.uniform(1, 6) if rng.random() < 0.5 else 0.0


def add_noise(rng: np.random.Generator, picture: Picture, deviation: float) -> Picture:
    """Return `picture` with grey noise added."""
    if deviation == 0:
        return picture
    height, width, _ = picture.shape
    top, left = rng.integers(_NOISE_SIDE - height + 1), rng.integers(_NOISE_SIDE - width + 1)
    noise = _noise_field()[top : top + height, left : left + width] * np.float32(deviation)
    return (picture + noise[..., None].astype(np.int16)).clip(0, 255).astype(np.uint8)


@functools.cache
def _noise_field() -> NDArray[np.float32]:
    # Drawn once: a fresh field per picture would take longer than everything else about it.
    return np.random.default_rng(0).standard_normal((_NOISE_SIDE, _NOISE_SIDE), np.float32)


def _paint_sign(picture: Picture, sign: Sign, tint: Tint) -> None:
    x, y, width, height = sign.box
    picture[y : y + height, x : x + width] = tint
    black = sign.color not in _WHITE_INK_ON and tint.mean() > _MIN_BRIGHTNESS_FOR_BLACK_INK
    top, left = SIGN_PADDING
    mask = text_mask(sign.text, sign.font, sign.font_size)
    _blend(picture, x + left, y + top, mask, _BLACK if black else _WHITE)


def _blend(picture: Picture, x: int, y: int, mask: Mask, color: Tint) -> None:
    height, width = mask.shape
    window = picture[y : y + height, x : x + width]
    window[:] = window + (color - window) * mask[..., None]
