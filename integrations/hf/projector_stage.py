"""The projector stage: tiles are pooled as they leave the projector, and packed as the model packs whole ones."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmcompress.budget import Budget
from mmcompress.integrations.hf.attached import Attached
from mmcompress.integrations.hf.families import Family, LlavaNext
from mmcompress.projector_method import ProjectorMethod
from mmcompress.projectors.m3 import M3
from mmcompress.types import Selection

SCALES = "matryoshka_scales"
"""The entry of a model's configuration that names the scales it was trained for."""


class _Local(threading.local):
    """What the projector made of the tiles that one thread is encoding; None outside of `encode`."""

    tiles: list[Tensor] | None = None


def pooling(family: Family, method: ProjectorMethod) -> M3:
    """What pools the tiles of this model.

    Raises:
        SpecError: `method` has a scale that tiles of this size cannot have.
    """
    side, config = round(family.patches**0.5), family.config
    trained = getattr(config, SCALES, ())
    if not isinstance(family, LlavaNext):
        return method.projector(side, trained)
    return method.projector(side, trained, config.image_grid_pinpoints, config.vision_config.image_size)


def windows(pooling: M3, scale: int, device: torch.device) -> Selection:
    """The pooled tokens of one tile: each at the centre of the window of tokens that it is the mean of."""
    side, kernel = pooling.side, pooling.kernel(scale)
    centres = torch.arange(side // kernel, device=device) * kernel + kernel // 2
    weight = pooling(torch.eye(side * side, device=device)[None], scale)[0]
    return Selection((centres[:, None] * side + centres).flatten(), weight)


class ProjectorStage(Attached):
    """The hook of the projector stage on one model; idle but for encoder calls within `encode`."""

    def __init__(self, family: Family, method: ProjectorMethod, keep: Budget) -> None:
        self.keep = keep
        self._family = family
        self._pooling = pooling(family, method)
        self._local = _Local()
        self._hook = family.base.multi_modal_projector.register_forward_hook(self._collect)

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()

    @property
    def scale(self) -> int:
        """Tokens asked for of every tile."""
        return self.keep.tokens(self._family.patches)

    @property
    def pools(self) -> bool:
        """Whether there will be fewer tokens, and fewer newlines, than without."""
        return self._pooling.kernel(self.scale) > 1

    def encode(self, encode: partial[Any]) -> tuple[Any, list[Selection]]:
        """Call `encode` and pool what it makes.

        Returns:
            Its output with as many features per image as without pooling, since that is what the rest of the model
            expects: the pooled ones at some tokens' places, zeros elsewhere. And per image which tokens these are and
            what they absorbed; nothing if nothing is pooled.
        """
        self._local.tiles = []
        try:
            output = encode()
            tiles = torch.cat(self._local.tiles)
        finally:
            self._local.tiles = None
        if not self.pools:
            return output, []
        layouts = self._family.layouts("image", torch.cat(list(output.pooler_output)), encode.keywords)
        images = self._images(self._pooling(tiles, self.scale), encode.keywords)
        features, selections = [], []
        for tokens, layout in zip(images, layouts, strict=True):
            candidates = (~layout.separator).nonzero()[:, 0].to(tokens.device)
            selection = self._selection(len(tokens), len(candidates), tokens.device)
            full = tokens.new_zeros(len(layout.separator), tokens.shape[-1])
            features.append(full.index_copy(0, candidates[selection.anchor], tokens))
            selections.append(selection)
        output.pooler_output = features
        return output, selections

    def _images(self, tiles: Tensor, call: dict[str, Any]) -> list[Tensor]:
        """Every image's tokens `[tokens, hidden]` of its pooled `tiles`."""
        if not self._pooling.resolutions:
            return list(tiles)
        sizes = [(int(height), int(width)) for height, width in call["image_sizes"]]
        counts = [1 + rows * columns for rows, columns in map(self._pooling.crops, sizes)]
        newline = self._family.base.image_newline
        return [self._pooling.join(part, size, newline) for part, size in zip(tiles.split(counts), sizes, strict=True)]

    def _selection(self, count: int, candidates: int, device: torch.device) -> Selection:
        """Where `count` pooled tokens go among an image's `candidates`, newlines of their own among them.

        A whole image's go to the centres of their windows. Tiles are pooled with their padding, which is no candidate,
        so that those of an image in tiles are spread evenly instead, and what they absorbed is not told.
        """
        if self._pooling.resolutions:
            return Selection((2 * torch.arange(count, device=device) + 1) * candidates // (2 * count))
        return windows(self._pooling, self.scale, device)

    @torch.compiler.disable
    def _collect(self, module: Any, args: Any, output: Tensor) -> None:
        if self._local.tiles is not None:
            self._local.tiles.append(output)
