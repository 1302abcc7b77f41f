"""The base class of methods that make fewer tokens of what the projector made of each tile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from mmcompress.elastic import ImageSize
from mmcompress.errors import UnsupportedError
from mmcompress.projectors.m3 import M3
from mmcompress.registry import MethodInfo
from mmcompress.types import EncoderFacts, Needs


class ProjectorMethod(ABC):
    """Pools every tile behind the projector and before tiles are stitched; the model must be trained for it.

    `keep` counts tokens per tile, newlines left out. Subclasses are frozen dataclasses whose fields are the options.
    """

    info: ClassVar[MethodInfo]

    @property
    def exact_count(self) -> bool:
        """Whether exactly the budget is kept of every tile."""
        return True

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The projected tokens.

        Raises:
            UnsupportedError: the model's projector does not give one token per patch of a tile.
        """
        if encoder.no_pre_projector:
            raise UnsupportedError(
                f"{self.info.name} pools the tokens of whole tiles, which this model rules out: "
                f"{encoder.no_pre_projector}."
            )
        return Needs(embeddings=True)

    @abstractmethod
    def projector(
        self, side: int, trained: Sequence[int] = (), resolutions: Sequence[ImageSize] = (), tile: int = 0
    ) -> M3:
        """What pools tiles of `side` by `side` patches; `trained` are the scales the model says it knows. See `M3`."""
