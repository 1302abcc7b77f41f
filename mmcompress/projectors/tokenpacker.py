"""TokenPacker: coarse queries that take in the fine features of their own window."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmcompress.elastic import ElasticProjector, ImageSize

LAYERS = (12, 16, 22, 23)
"""The tower's hidden states that are read, of 24 layers; 0 is the embedding."""


class TokenPacker(ElasticProjector):
    """Every token is one query, made of point samples of a window, that attends to that window's features alone.

    Args:
        scale: side of a window in patches; the ratio is fixed by the checkpoint.
        side: patches along one side of an image or tile.
        width: width of one layer's vision features.
        hidden: width of the LLM.
        heads: attention heads.

    Source: TokenPacker: Efficient Visual Projector for Multimodal LLM, arXiv:2407.02392, section 3.2.
    """

    def __init__(self, scale: int = 2, side: int = 24, width: int = 1024, hidden: int = 4096, heads: int = 8) -> None:
        super().__init__()
        self.scale, self.side, self.width = scale, side, width
        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1 = _mlp(len(LAYERS) * width, width)
        self.v_proj_1 = _mlp(len(LAYERS) * width, width)
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = _mlp(width, hidden)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def budgets(self) -> Sequence[int]:
        return ((self.side // self.scale) ** 2,)

    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        self.require(budget)
        return budget

    def forward(self, features: Tensor, budget: int) -> Tensor:
        """`[images, side * side, 4 * width]`, the layers beside each other, -> `[images, budget, hidden]`.

        Raises:
            SpecError: `budget` is not the checkpoint's.
        """
        self.require(budget)
        return self.pack(features[..., -self.width :], features)

    def pack(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """`[images, patches, width]` for queries and `[images, patches, 4 * width]` for keys and values -> tokens."""
        queries = self.ln_q_1(self.q_proj_1(self.sample(coarse)))
        keys, values = self.ln_k_1(self.k_proj_1(fine)), self.ln_v_1(self.v_proj_1(fine))
        gathered, _ = self.clip_attn(
            queries.flatten(0, 1)[:, None], self._windows(keys), self._windows(values), need_weights=False
        )
        return self.mlp(gathered.view(*queries.shape))

    def sample(self, coarse: Tensor) -> Tensor:
        """Features at the windows' centres, `[images, patches, width]` -> `[images, windows, width]`."""
        grid = coarse.float().transpose(1, 2).unflatten(2, (self.side, self.side))
        size = self.side // self.scale
        sampled = interpolate(grid, (size, size), mode="bilinear", align_corners=False)
        return sampled.flatten(2).transpose(1, 2).to(coarse.dtype)

    def _windows(self, tokens: Tensor) -> Tensor:
        """`[images, side * side, width]` -> `[images * windows, scale * scale, width]`, both in raster order."""
        side, scale = self.side // self.scale, self.scale
        return tokens.view(-1, side, scale, side, scale, self.width).transpose(2, 3).reshape(-1, scale**2, self.width)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
