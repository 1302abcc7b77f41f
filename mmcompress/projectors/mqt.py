"""MQT: a query transformer of which any first few queries may be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from mmcompress.elastic import ElasticProjector, ImageSize


class MQT(ElasticProjector):
    """Matryoshka Query Transformer: learned queries attend to the positions of patches and gather their features.

    Keys hold positions only, no content. So the attention is a constant of the checkpoint, the same for every image,
    and the module one learned spatial pooling per head; outputs for fewer queries are the first ones of more.
    `precompute` makes that constant once. Until then, and again when the module trains or is given other weights, it is
    made in every pass.

    Args:
        side: queries along one side of the square that gives them positions; there are side^2.
        hidden: width of the LLM.
        heads: attention heads.
        width: width of the vision features.

    Source: Matryoshka Query Transformer for Large Vision-Language Models, arXiv:2405.19315, section 3.
    """

    attention: Tensor | None

    def __init__(self, side: int = 16, hidden: int = 4096, heads: int = 16, width: int = 1024) -> None:
        super().__init__()
        self.side, self.heads = side, heads
        self.pos_embed = nn.Parameter(sincos(side, width), requires_grad=False)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(side**2, width), std=0.02))
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.randn(width, hidden) * hidden**-0.5)
        nn.init.trunc_normal_(self.attn.out_proj.weight, std=0.02)
        self.register_buffer("attention", None, persistent=False)

    def budgets(self) -> Sequence[int]:
        return range(1, len(self.query) + 1)

    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        self.require(budget)
        return budget

    def forward(self, features: Tensor, budget: int) -> Tensor:
        """`[images, patches, width]` of a square of patches -> `[images, budget, hidden]`.

        Raises:
            SpecError: `budget` is none of `budgets()`.
        """
        self.require(budget)
        patches = features.shape[1]
        known = self.attention if self.attention is not None and self.attention.shape[-1] == patches else None
        attention = (self.pooling(patches) if known is None else known)[:, :budget].to(features.dtype)
        pooled = (attention @ self._project(2, self.ln_v(features))).transpose(1, 2).flatten(2)
        return self.attn.out_proj(pooled) @ self.proj

    def pooling(self, patches: int) -> Tensor:
        """The attention of all queries to a square of `patches`, `[heads, queries, patches]`."""
        queries = self.ln_q(self.query + self.pos_embed.to(self.query.dtype))
        keys = self.ln_k(self.places(patches).to(queries.dtype))
        query, key = (self._project(part, tokens) for part, tokens in enumerate((queries, keys)))
        return (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(dim=-1)

    def places(self, patches: int) -> Tensor:
        """Positions of a square of `patches`, float32 `[patches, width]`."""
        side = round(patches**0.5)
        grid = self.pos_embed.float().T.reshape(1, -1, self.side, self.side)
        return interpolate(grid, (side, side), mode="bicubic", align_corners=False)[0].flatten(1).T

    def _project(self, part: int, tokens: Tensor) -> Tensor:
        """Query (0), key (1) or value (2) of `tokens` `[..., tokens, width]`: `[..., heads, tokens, dim]`."""
        weight, bias = self.attn.in_proj_weight.chunk(3)[part], self.attn.in_proj_bias.chunk(3)[part]
        return linear(tokens, weight, bias).unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    @torch.no_grad()
    def precompute(self, patches: int) -> Self:
        """Keep the attention to a square of `patches` until the module trains."""
        self.attention = self.pooling(patches)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.attention = None
        super()._load_from_state_dict(*args, **options)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.attention = None
        return super().train(mode)


def sincos(side: int, width: int) -> Tensor:
    """Fixed positions of a square `[side * side, width]`: columns in the first half, rows in the second.

    Values are those of half precision, in which checkpoints hold them.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1).half().float()
