"""Processors that give an image as many placeholders as the dial of its model says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, LlavaImageProcessorPil, LlavaProcessor

from mmcompress.projectors.tokenpacker_hd import TokenPackerHD

_COMMA, _NEWLINE = "<|tile|>", "<|row|>"


class ElasticProcessor(LlavaProcessor):
    """LLaVA's processor with a dial."""

    visual_tokens = 0
    """Tokens of an image, or of each of its tiles."""

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        tiles = image_inputs["num_patches"][image_idx] if "num_patches" in image_inputs else 1
        return str(self.image_token) * self.visual_tokens * int(tiles)

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_patches", "tile_grids"]


class HDImages(LlavaImageProcessorPil):
    """Images cut as TokenPacker-HD cuts them; a batch's tiles follow each other, overviews last of their image."""

    hd: TokenPackerHD

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        *,
        rescale_factor: float,
        image_mean: list[float],
        image_std: list[float],
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        tiles: list[np.ndarray] = []
        grids = []
        for image in images:
            normalised = self.normalize(self.rescale(image, rescale_factor), image_mean, image_std)
            tiles += list(self.hd.cut(torch.from_numpy(np.asarray(normalised, dtype=np.float32))).numpy())
            grids.append(self.hd.grid((image.shape[1], image.shape[2])))
        return BatchFeature({"pixel_values": tiles, "tile_grids": grids}, tensor_type=return_tensors)


class HDProcessor(ElasticProcessor):
    """TokenPacker-HD: tiles are parted by commas and rows ended by newlines, in tokens of the vocabulary.

    They are those that the tokenizer has under these very names, the unknown token where it has none, as in training.
    """

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        rows, columns = (int(count) for count in image_inputs["tile_grids"][image_idx])
        tile = str(self.image_token) * self.visual_tokens
        row = _COMMA.join([tile] * columns) + _NEWLINE
        return row * rows + (tile + _NEWLINE if rows * columns > 1 else "")

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        inputs = super().__call__(*args, **kwargs)
        if "input_ids" in inputs:
            ids = inputs["input_ids"]
            named = {_COMMA: ",", _NEWLINE: "\n"}
            meant = {
                self.tokenizer.convert_tokens_to_ids(mark): self.tokenizer.convert_tokens_to_ids(token)
                for mark, token in named.items()
            }
            if isinstance(ids, torch.Tensor):
                for mark, token in meant.items():
                    ids.masked_fill_(ids == mark, token)
            else:
                inputs["input_ids"] = [[meant.get(token, token) for token in row] for row in ids]
        return inputs


def hd_processor(images: HDImages, tokenizer: Any, hd: TokenPackerHD, **settings: Any) -> HDProcessor:
    """The processor of a TokenPacker-HD."""
    tokenizer.add_tokens([_COMMA, _NEWLINE], special_tokens=True)
    images.hd = hd
    return HDProcessor(images, tokenizer, **settings)
