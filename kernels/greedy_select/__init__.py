"""Greedy choice of mutually dissimilar tokens, for all images of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.kernels.dispatch import dispatched, of_one_dtype
from mmcompress.kernels.greedy_select import reference


def _fake(tokens: Sequence[Tensor], counts: Sequence[int], *_: object) -> list[Tensor]:
    return [tokens[0].new_empty(count, dtype=torch.long) for count in counts]


def _refuse(tokens: Sequence[Tensor], counts: Sequence[int], *_: object) -> str:
    return of_one_dtype(*tokens)


greedy_select = dispatched(
    __name__,
    reference.greedy_select,
    _fake,
    _refuse,
    schema="(Tensor[] tokens, SymInt[] counts, Tensor[]? pivots, str objective) -> Tensor[]",
)
