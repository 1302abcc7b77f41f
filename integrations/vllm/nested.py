"""Matryoshka scales in vLLM: a projected tile is pooled like tokens that others absorb."""

from __future__ import annotations

from dataclasses import dataclass

from mmcompress.budget import Budget
from mmcompress.errors import UnsupportedError
from mmcompress.integrations.hf.families import Family
from mmcompress.integrations.hf.projector_stage import pooling, windows
from mmcompress.method import VisualMethod
from mmcompress.methods.m3 import M3
from mmcompress.projector_method import ProjectorMethod
from mmcompress.projectors import m3
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem


@dataclass(frozen=True)
class Nested(VisualMethod):
    """M3 on images that are one tile: to pool what the projector made of it is to merge its tokens.

    Args:
        method: as it was configured.
        pooling: what it comes to on this model.
    """

    info = M3.info
    method: ProjectorMethod
    pooling: m3.M3

    @classmethod
    def on(cls, family: Family, method: ProjectorMethod) -> Nested:
        """`method` on a model.

        Raises:
            SpecError: tiles of this size cannot have one of the scales.
            UnsupportedError: the model has no tiles, or stitches several to an image.
        """
        method.needs(family.facts())
        pooled = pooling(family, method)
        if pooled.resolutions:
            raise UnsupportedError(
                f"{method.info.name} pools tiles before they are stitched, which vLLM does at once; take a method that "
                "acts behind that, such as visionzip, or use transformers."
            )
        return cls(method, pooled)

    @property
    def exact_count(self) -> bool:
        """As the method has it."""
        return self.method.exact_count

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The projected tokens."""
        return self.method.needs(encoder)

    def require(self, budget: Budget) -> None:
        """Refuse a budget that is none of the scales.

        Raises:
            SpecError: it is not.
        """
        self.pooling.require(budget.tokens(self.pooling.side**2))

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """The means of the windows."""
        return windows(self.pooling, budget, item.embeddings.device)
