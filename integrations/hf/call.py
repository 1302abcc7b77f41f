"""What one pass of the text model carries from hook to hook."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mmcompress.accounting import Stats
from mmcompress.integrations.hf.cache import CacheState, PrunedCache
from mmcompress.integrations.hf.clock import Span, StageClock
from mmcompress.kv_policy import Ahead
from mmcompress.types import Modality, Trace


@dataclass
class Call:
    """One pass of the text model on its way through the door.

    Args:
        span: the time it takes; None if the pass is left as it is.
        visual: `[batch, length]` placeholder masks by modality; empty where no features arrived.
        ids: `[batch, length]` token ids, where they are known.
        cache: the adopted cache.
        seen: how many tokens went before.
        tail: how many of the last columns were said after the prompt.
        state: what `cache` is to remember once the pass has succeeded.
        removal: which columns stayed, if it removes any.
        drafted: `[batch, layers, columns]`, what a method made of a draft's attention; None if it needs none.
        ahead: where to note what is asked, if its tokens are such as a draft expects and are to be forgotten.
    """

    span: Span | None = None
    visual: dict[Modality, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None
    cache: PrunedCache | None = None
    seen: int = 0
    tail: int = 0
    state: CacheState = field(default_factory=CacheState)
    removal: Removal | None = None
    drafted: Tensor | None = None
    ahead: dict[int, list[Ahead]] | None = None


@dataclass(frozen=True)
class Removal:
    """What a prefill took out.

    Args:
        keep: `[batch, length]` which columns stayed.
        index: `[batch, kept]` where they came from, -1 where padded.
        stats: what that saves.
        trace: what became of every item.
        clock: the time so far.
    """

    keep: Tensor
    index: Tensor
    stats: Stats
    trace: list[Trace]
    clock: StageClock
