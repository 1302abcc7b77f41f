"""One launch per step for the whole batch; nothing is read back in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcompress.kernels.greedy_select.triton import DPP, FLOOR, on_device, padded_tokens, step_by_step


def dpp_select(tokens: Sequence[Tensor], relevance: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """See `reference.dpp_select`."""
    if max(counts) == 0:
        return [tokens[0].new_empty(0, dtype=torch.long) for _ in counts]
    padded = padded_tokens(tokens)
    scale = pad_sequence([values.float() for values in relevance], batch_first=True)
    lengths = on_device([len(image) for image in tokens], padded)
    real = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    left = (padded.any(dim=-1) * scale.square()).clamp(min=FLOOR).masked_fill(~real, -torch.inf)
    return step_by_step(padded, left, scale, left.argmax(dim=1), counts, DPP)
