"""Greedy choice of tokens that span a large volume, for all images of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.kernels.dispatch import dispatched, of_one_dtype
from mmcompress.kernels.dpp_select import reference


def _fake(tokens: Sequence[Tensor], relevance: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    return [tokens[0].new_empty(count, dtype=torch.long) for count in counts]


def _refuse(tokens: Sequence[Tensor], relevance: Sequence[Tensor], counts: Sequence[int]) -> str:
    return of_one_dtype(*tokens)


dpp_select = dispatched(__name__, reference.dpp_select, _fake, _refuse)
