"""How pictures enter each architecture in training: pixels, hidden states per patch, and the prompt around them.

All pictures of a batch have one size, so that every tensor is rectangular. Pictures are uint8
[batch, pictures, height, width, 3]; several pictures of a row are one prompt's, or the frames of its clip.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mmcompress.evals.micro.training.architectures import TOKEN_IDS

PATCH = 14


class Hidden(NamedTuple):
    """The encoder's states: of patches in raster order [batch, patches, dim], and of CLS tokens if it has any."""

    patches: list[Tensor]
    summaries: list[Tensor]


class Prefix(NamedTuple):
    """The part of a prompt that all questions about some pictures share.

    Args:
        ids: token ids [tokens]; placeholders stand where visual tokens go.
        visual: which tokens are visual [tokens].
        droppable: which visual tokens may be dropped, all but newlines [tokens].
        positions: RoPE ids [3 or 1, tokens].
        following: position of the first word behind the prefix.
    """

    ids: Tensor
    visual: Tensor
    droppable: Tensor
    positions: Tensor
    following: int


class Family(Protocol):
    """What the trainer must know of an architecture.

    Args:
        cpu_attention: the attention implementation that trains fastest on a CPU, measured in bfloat16.
    """

    cpu_attention: str

    def encoder(self, model: Any) -> torch.nn.Module:
        """The vision encoder; that of a Qwen contains the projector."""

    def hidden(self, model: Any, pictures: Tensor) -> Hidden:
        """Encode single pictures for training the encoder."""

    def features(self, model: Any, pictures: Tensor) -> Tensor:
        """The visual tokens as they enter the LLM [batch, tokens, dim], all pictures of a row after each other."""

    def prefix(self, model: Any, pictures: Tensor) -> Prefix:
        """The prompt up to the question."""


def scaled(pictures: Tensor) -> Tensor:
    """Pixels in -1..1, channels first [..., 3, height, width]."""
    return (pictures.float() / 127.5 - 1).movedim(-1, -3)


class Llava:
    """LLaVA-1.5: one square of fixed size per picture, 1-D positions."""

    cpu_attention = "eager"

    def encoder(self, model: Any) -> torch.nn.Module:
        return model.model.vision_tower

    def hidden(self, model: Any, pictures: Tensor) -> Hidden:
        states = model.model.vision_tower(scaled(pictures[:, 0]), output_hidden_states=True).hidden_states
        levels = (states[model.config.vision_feature_layer], states[-1])
        return Hidden([level[:, 1:] for level in levels], [level[:, 0] for level in levels])

    def features(self, model: Any, pictures: Tensor) -> Tensor:
        features = model.get_image_features(scaled(pictures.flatten(0, 1))).pooler_output
        return torch.stack(list(features)).unflatten(0, pictures.shape[:2]).flatten(1, 2)

    def prefix(self, model: Any, pictures: Tensor) -> Prefix:
        return _plain_prefix(pictures.shape[1] * [model.config.image_seq_length * [True]])


class LlavaNext(Llava):
    """LLaVA-NeXT: thumbnail and tiles, a newline after every row of the stitched tiles."""

    def features(self, model: Any, pictures: Tensor) -> Tensor:
        side = model.config.vision_config.image_size
        height, width = pictures.shape[2:4]
        pixels = scaled(pictures.flatten(0, 1))
        thumbnail = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        tiles = pixels.unflatten(-1, (width // side, side)).unflatten(-3, (height // side, side))
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [pictures, rows x columns, 3, side, side]
        sizes = torch.tensor([[height, width]]).expand(len(pixels), 2)
        features = model.get_image_features(torch.cat([thumbnail[:, None], tiles], 1), sizes).pooler_output
        return torch.stack(list(features)).unflatten(0, pictures.shape[:2]).flatten(1, 2)

    def prefix(self, model: Any, pictures: Tensor) -> Prefix:
        thumbnail = model.config.image_seq_length * [True]
        height, width = (side // PATCH for side in pictures.shape[2:4])
        return _plain_prefix(pictures.shape[1] * [thumbnail + height * [*width * [True], False]])


class Qwen:
    """Qwen2.5-VL: any size in steps of 28 px, 2x2 merged patches, M-RoPE."""

    cpu_attention = "sdpa"

    def __init__(self, video: bool = False) -> None:
        self.video = video

    def encoder(self, model: Any) -> torch.nn.Module:
        return model.model.visual

    def hidden(self, model: Any, pictures: Tensor) -> Hidden:
        single = pictures[:, :1]
        states = model.model.visual(_patchified(single, video=False), grid_thw=self._grid(single)).last_hidden_state
        rows, columns = (side // (2 * PATCH) for side in pictures.shape[2:4])
        window = model.config.vision_config.window_size // (2 * PATCH)
        blocks = states.unflatten(0, (len(pictures), rows * columns, 4))[:, _block_places(rows, columns, window)]
        return Hidden([blocks.unflatten(1, (rows, columns)).unflatten(3, (2, 2)).transpose(2, 3).flatten(1, 4)], [])

    def features(self, model: Any, pictures: Tensor) -> Tensor:
        pixels, grid = _patchified(pictures, self.video), self._grid(pictures)
        encode = model.get_video_features if self.video else model.get_image_features
        features = torch.cat(list(encode(pixels, grid).pooler_output))
        return features.unflatten(0, (len(pictures), -1))

    def prefix(self, model: Any, pictures: Tensor) -> Prefix:
        grid = self._grid(pictures[:1])
        placeholder = TOKEN_IDS["<|video_pad|>" if self.video else "<|image_pad|>"]
        ids = [TOKEN_IDS["<s>"], TOKEN_IDS["USER:"]]
        for count in (grid.prod(-1) // 4).tolist():
            ids += [TOKEN_IDS["<|vision_start|>"], *count * [placeholder], TOKEN_IDS["<|vision_end|>"]]
        tokens = torch.tensor(ids)
        visual = tokens == placeholder
        grids = {"video_grid_thw" if self.video else "image_grid_thw": grid}
        if self.video:
            grids["second_per_grid_ts"] = torch.ones(len(grid))
        types = visual.int() * (2 if self.video else 1)
        positions = model.model.get_rope_index(tokens[None], types[None], **grids)[0][:, 0]
        return Prefix(tokens, visual, visual, positions, int(positions.max()) + 1)

    def _grid(self, pictures: Tensor) -> Tensor:
        rows, frames, height, width = pictures.shape[:4]
        items, steps = (rows, frames // 2) if self.video else (rows * frames, 1)
        return torch.tensor([[steps, height // PATCH, width // PATCH]]).expand(items, 3)


def _plain_prefix(pictures: list[list[bool]]) -> Prefix:
    """`<s> USER:` and then, per picture, tokens that may be dropped (True) or not (False)."""
    droppable = torch.tensor([False, False, *(token for picture in pictures for token in picture)])
    ids = torch.full(droppable.shape, TOKEN_IDS["<image>"])
    ids[:2] = torch.tensor([TOKEN_IDS["<s>"], TOKEN_IDS["USER:"]])
    return Prefix(ids, ids == TOKEN_IDS["<image>"], droppable, torch.arange(len(ids))[None], len(ids))


def _patchified(pictures: Tensor, video: bool) -> Tensor:
    """Patches of two frames each, 2x2 neighbours next to each other, as the processor makes them [patches, values]."""
    pixels = scaled(pictures)
    if not video:
        pixels = pixels.flatten(0, 1)[:, None].expand(-1, 2, -1, -1, -1)
    blocks = pixels.unflatten(-1, (-1, 2, PATCH)).unflatten(-4, (-1, 2, PATCH)).unflatten(1, (-1, 2))
    # [items, steps, 2, 3, rows, 2, PATCH, columns, 2, PATCH]
    return blocks.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).flatten(0, 5).flatten(1)


def _block_places(rows: int, columns: int, window: int) -> Tensor:
    """Where the encoder, which works window by window, puts each 2x2 block of a picture, in raster order [blocks]."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    windows = (row // window) * columns + column // window
    return windows.flatten().argsort(stable=True).argsort()
