"""Prompts with one picture of noise, as a model's processor makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.evals.bench.shapes import Size
from mmcompress.evals.runner import encode
from mmcompress.evals.suites.base import Picture, Question

QUESTION = "what color is the star ?"
"""In words that the embedded models know too."""


def prompt_of(model: Any, processor: Any, size: Size) -> dict[str, Tensor]:
    """The model's inputs for a question about a picture of that size.

    Raises:
        InputError: the processor refuses it.
    """
    picture = Picture("noise")
    inputs = encode(model, processor, [Question("", (picture,), QUESTION, ())], {picture: noise(size)})
    return {name: part for name, part in inputs.items() if isinstance(part, Tensor)}


def noise(size: Size) -> Image.Image:
    """A picture of random pixels."""
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sizes(text: str) -> list[Size]:
    """Sizes of pictures as written, separated by commas: "672x672,1024x768".

    Raises:
        SpecError: there is one that is none.
    """
    found = []
    for part in text.split(","):
        width, _, height = part.strip().lower().partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise SpecError(f"--image {part!r}: write width and height in pixels, as in 672x672.")
        found.append((int(width), int(height)))
    return found
