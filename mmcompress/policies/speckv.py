"""SpecKV: keep what the prompt's end and the answer that a smaller model drafts attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmcompress.errors import SpecError
from mmcompress.kv_policy import Evictor, KVNeeds, KVRow
from mmcompress.policies._scores import pool, reduce_group
from mmcompress.registry import register_policy


@register_policy(
    "speckv",
    summary="The entries that the prompt's last tokens and a drafted answer attend to most, and these last tokens.",
    family="draft attention",
    stage="kv",
    paper="Draft-based Approximate Inference for LLMs, arXiv:2506.08373",
    licence="Apache-2.0",
    requires=("draft",),
)
@dataclass(frozen=True)
class SpecKV(Evictor):
    """SnapKV with a look ahead: a draft model says how the prompt goes on, and the model asks as if it had said so.

    Args:
        draft: folder of a smaller model of the same family, with the same tokens for text and pictures.
        lookahead: how many tokens it says at most; the authors let it say as many as will be generated.
        window: the prompt's tokens before its last one, which observe together with it and always stay.
        kernel: neighbouring entries of which the highest score counts, an odd number.
        reduction: what becomes of the scores that all observers and the query heads of a KV head give an entry.
    """

    draft: str | None = None
    lookahead: int = 32
    window: int = 32
    kernel: int = 7
    reduction: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if self.lookahead < 1 or self.window < 0:
            raise SpecError(
                f"speckv: lookahead={self.lookahead} must be at least 1 and window={self.window} at least 0."
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise SpecError(f"speckv: kernel={self.kernel} must be odd and at least 1.")

    def needs(self) -> KVNeeds:
        """The queries of the window, the last token and the draft."""
        return KVNeeds(queries=self.least, draft=self.draft, lookahead=self.lookahead)

    @property
    def least(self) -> int:
        """The window and the last token."""
        return self.window + 1

    def protected(self, row: KVRow, keep: int) -> Tensor:
        """The window and the last token."""
        return row.place >= row.seen - self.least

    def score(self, row: KVRow) -> Tensor:
        """The highest or mean attention of all observers, smoothed."""
        assert row.query is not None and row.ahead is not None
        query, key = torch.cat([row.query, row.ahead.query], dim=1), torch.cat([row.key, row.ahead.key], dim=1)
        joined = row.grouped(replace(row, query=query, key=key).rows(rows=self.reduction))
        scores = reduce_group(joined, self.reduction)[:, : row.entries - self.least]
        return pad(pool(scores, self.kernel, "max"), (0, row.entries - scores.shape[1]))
