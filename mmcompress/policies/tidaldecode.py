"""TidalDecode: a few layers find the tokens with the highest logits, and the layers behind them read only these."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts
from mmcompress.registry import register_policy
from mmcompress.sparse_reader import Duty, Reading, SparseReader, Step


@register_policy(
    "tidaldecode",
    summary="In every step, two layers choose the entries with the highest logits for all behind them.",
    family="sparse reading",
    stage="kv",
    paper="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention, arXiv:2410.05076",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class TidalDecode(SparseReader):
    """Layers that follow each other attend to much the same tokens, so that few need to look for them (Section 3).

    Layers that choose read everything, and so do those before the first of them. The KV cache is not corrected by
    prefills in between, as the authors' code does not do it either.

    Args:
        selection_layers: layers that choose; None: 2 and 13 of 32, scaled to the model's depth.
    """

    selection_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        layers = self.selection_layers
        if layers is not None and (not layers or layers[0] < 0 or list(layers) != sorted(set(layers))):
            raise SpecError(f"tidaldecode: selection_layers={list(layers)} must ascend from 0 or more, as in [2, 13].")

    def duties(self, llm: LLMFacts) -> list[Duty]:
        """Layers read everything up to the first that chooses, and where one chooses again."""
        if self.selection_layers is None and llm.layers < 4:
            raise SpecError(f"tidaldecode: give selection_layers=, the LLM has only {llm.layers} layers.")
        chosen = self.selection_layers or llm.scale_layers((2, 13), 32)
        if chosen[-1] >= llm.layers - 1:
            raise SpecError(
                f"tidaldecode: selection_layers={list(chosen)} leaves no layer behind the last; the LLM has layers "
                f"0..{llm.layers - 1}."
            )
        return [Duty(layer < chosen[0] or layer in chosen, layer in chosen) for layer in range(llm.layers)]

    def choose(self, step: Step) -> Reading:
        """The entries with the highest logits."""
        logits = (step.grouped @ step.key.mT).float()
        logits = logits.masked_fill(~step.entries.valid[:, None, None], -torch.inf)
        newest = step.entries.column.gather(1, step.entries.newest[:, None])[:, 0]
        return Reading(*self.best(logits, newest, step.keep))
