"""Merging of tokens: the most similar partner of each, and sums over those that become one."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.kernels.bipartite_match import reference
from mmcompress.kernels.dispatch import FLOATS, dispatched


def _fake_match(metric: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*metric.shape[:-2], (metric.shape[-2] + 1) // 2)
    return metric.new_empty(shape).float(), metric.new_empty(shape, dtype=torch.long)


def _fake_merge(values: Tensor, group: Tensor, outputs: int) -> Tensor:
    return values.new_empty(*values.shape[:-2], outputs, values.shape[-1])


def _refuse_match(metric: Tensor) -> str:
    return "" if metric.dtype in FLOATS else f"dtype {metric.dtype}"


def _refuse_merge(values: Tensor, group: Tensor, outputs: int) -> str:
    return "" if values.dtype in (*FLOATS, torch.int64) else f"dtype {values.dtype}"


bipartite_match = dispatched(__name__, reference.bipartite_match, _fake_match, _refuse_match)
merge_tokens = dispatched(__name__, reference.merge_tokens, _fake_merge, _refuse_merge)
