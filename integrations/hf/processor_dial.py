"""`processor_kwargs`: models whose token count is decided by how their processor resizes or cuts an image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmcompress.elastic import Elastic, ImageSize
from mmcompress.errors import InputError, UnsupportedError

_FEWEST, _MOST = 4, 16384  # what the processors of Qwen-VL go down and up to
_TILES = 12  # what InternVL is trained with at most


class ProcessorDial(Elastic):
    """A dial in the processor; its budgets are what an image has at most."""

    @abstractmethod
    def kwargs(self, budget: int) -> dict[str, Any]:
        """What to call the processor with.

        Raises:
            SpecError: `budget` is none of `budgets()`.
        """


class Pixels(ProcessorDial):
    """Qwen-VL: images are resized to so many pixels at most, aspect kept, but no side is less than a token.

    Args:
        pixels: side in pixels of the square that becomes one token.
    """

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def budgets(self) -> Sequence[int]:
        return range(1, _MOST + 1)

    def kwargs(self, budget: int) -> dict[str, Any]:
        self.require(budget)
        shortest, longest = (tokens * self.pixels**2 for tokens in (min(_FEWEST, budget), budget))
        return {"images_kwargs": {"size": {"shortest_edge": shortest, "longest_edge": longest}}}

    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        size = self.kwargs(budget)["images_kwargs"]["size"]
        try:
            height, width = smart_resize(*image_size, self.pixels, size["shortest_edge"], size["longest_edge"])
        except ValueError as error:
            raise InputError(f"an image of {image_size[0]} x {image_size[1]} pixels is refused: {error}.") from error
        return (height // self.pixels) * (width // self.pixels)


class Tiles(ProcessorDial):
    """InternVL: images are cut into so many tiles at most, with a thumbnail beside several.

    Args:
        tokens: of a tile.
        pixels: `(height, width)` of a tile.
    """

    def __init__(self, tokens: int, pixels: ImageSize) -> None:
        self.tokens, self.pixels = tokens, pixels

    def budgets(self) -> Sequence[int]:
        return tuple(self.tokens * _with_thumbnail(tiles) for tiles in range(1, _TILES + 1))

    def kwargs(self, budget: int) -> dict[str, Any]:
        return {"images_kwargs": {"crop_to_patches": True, "min_patches": 1, "max_patches": self._most(budget)}}

    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        return self.tokens * tiles_of(image_size, self.pixels, 1, self._most(budget))

    def _most(self, budget: int) -> int:
        self.require(budget)
        return self.budgets().index(budget) + 1


def processor_kwargs(model: Any, keep: int) -> dict[str, Any]:
    """What to call a model's processor with, so that an image becomes `keep` tokens at most.

        inputs = processor(images=image, text=prompt, return_tensors="pt", **processor_kwargs(model, 256))

    How many it becomes exactly depends on its aspect, and `processor_dial(model).tokens_for` tells beforehand. Images
    of Qwen-VL whose one side would be less than a token become a few more.

    Args:
        model: a transformers model, or its configuration.
        keep: a token count.

    Raises:
        SpecError: the dial has no such budget.
        UnsupportedError: the model's dial, if it has one, is not in its processor.
    """
    return processor_dial(model).kwargs(keep)


def processor_dial(model: Any) -> ProcessorDial:
    """The dial in a model's processor.

    Raises:
        UnsupportedError: there is none.
    """
    config = getattr(model, "config", model)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in _DIALS:
        raise UnsupportedError(
            f"the processor of {kind} has no dial that is known here; those of {', '.join(_DIALS)} have one."
        )
    return _DIALS[kind](config)


def _pixels(config: Any) -> Pixels:
    return Pixels(config.vision_config.patch_size * config.vision_config.spatial_merge_size)


def _tiles(config: Any) -> Tiles:
    height, width = config.vision_config.image_size
    side = int(height // config.vision_config.patch_size[0] * config.downsample_ratio)
    return Tiles(side**2, (height, width))


def tiles_of(image_size: ImageSize, pixels: ImageSize, fewest: int, most: int) -> int:
    """How many tiles of `pixels` an image is cut into in the manner of InternVL, its thumbnail beside several."""
    columns, rows = get_optimal_tiled_canvas(tuple(image_size), pixels, fewest, most)
    return _with_thumbnail(columns * rows)


def _with_thumbnail(tiles: int) -> int:
    return tiles + (tiles > 1)


_DIALS: dict[str, Callable[[Any], ProcessorDial]] = {
    "qwen2_vl": _pixels,
    "qwen2_5_vl": _pixels,
    "qwen3_vl": _pixels,
    "internvl": _tiles,
}
