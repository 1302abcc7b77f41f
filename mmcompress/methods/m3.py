"""M3: the scales that a Matryoshka model was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmcompress.elastic import ImageSize
from mmcompress.projector_method import ProjectorMethod
from mmcompress.projectors import m3
from mmcompress.registry import register


@register(
    "m3",
    stage="projector",
    summary="Nested average pooling of every tile, for models trained for it.",
    family="matryoshka",
    paper="Matryoshka Multimodal Models, arXiv:2405.17430",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class M3(ProjectorMethod):
    """Average pooling to one of the nested scales, tokens per tile; a budget between two of them is refused.

    Tiles of LLaVA-NeXT are pooled before they are stitched, un-padded and given newlines, as the model is trained.

    Args:
        scales: what the model was trained for, tokens per tile; by default what its configuration says, or else 1, 9,
            36, 144 and 576 for tiles of 24x24, and otherwise what halving the side gives while it is even, and 1.
        compat: "official" takes any budget and pools by int(sqrt(tokens / budget)), which may keep more than that.
    """

    scales: tuple[int, ...] = ()
    compat: Literal["none", "official"] = "none"

    @property
    def exact_count(self) -> bool:
        """Only by the nested scales."""
        return self.compat == "none"

    def projector(
        self, side: int, trained: Sequence[int] = (), resolutions: Sequence[ImageSize] = (), tile: int = 0
    ) -> m3.M3:
        return m3.M3(side, self.scales or trained, resolutions, tile, self.compat)
