"""Ground truth: one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows `index` of each batch entry; zeros for -1."""
    nothing = torch.zeros_like(tensor[0, 0])
    return torch.stack(
        [
            torch.stack([entry[row] if row >= 0 else nothing for row in rows])
            for entry, rows in zip(tensor, index.tolist(), strict=True)
        ]
    )
