"""What a prefill saves, and what became of its items."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from mmcompress.accounting import ItemStats, LLMShape, Stats
from mmcompress.integrations.hf.placement import Placed
from mmcompress.integrations.hf.vision import Encoded
from mmcompress.types import Selection, Trace


def account(
    llm: LLMShape,
    encoded: Collection[Encoded],
    placed: Sequence[Placed],
    selections: Sequence[Selection],
    newlines: bool,
    asked: Tensor,
    keep: Tensor,
) -> tuple[Stats, list[Trace]]:
    """The statistics of a prefill and the trace of every item, in row order.

    Args:
        llm: the text model's dimensions.
        encoded: what the vision encoder made.
        placed: the items.
        selections: what stays of each.
        newlines: whether separator tokens stay.
        asked: `[batch, length]` which columns are the prompt's.
        keep: `[batch, length]` which of them stay.
    """
    in_rows = [
        (row, entry, selection) for entry, selection in zip(placed, selections, strict=True) for row in entry.rows
    ]
    in_rows.sort(key=lambda triple: triple[0])
    items = [
        ItemStats(row, entry.item.modality, len(entry.item), len(selection), entry.separators if newlines else 0)
        for row, entry, selection in in_rows
    ]
    trace = [
        Trace(row, entry.item.modality, entry.item.grids, entry.reduced or selection, entry.positions)
        for row, entry, selection in in_rows
    ]
    reused = 1 - sum(part.fresh for part in encoded) / sum(len(part.layouts) for part in encoded)
    return Stats(items, asked.sum(dim=1).tolist(), keep.sum(dim=1).tolist(), llm, reused=reused), trace


def llm_shape(decoder: Any) -> LLMShape:
    """The cost-relevant dimensions of a text model."""
    config = decoder.config
    heads = config.num_attention_heads
    return LLMShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        bytes_per_value=decoder.dtype.itemsize,
    )
