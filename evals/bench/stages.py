"""How long the stages of an answer take, seen from outside by hooks on a model's modules."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from mmcompress.integrations.hf.clock import Span
from mmcompress.statistics import STATISTICS

STAGES = ("encoder", "taps", "selection", "projector", "prefill")
"""Encoder and projector as modules; taps: statistics read within the encoder; selection: all that is done before the
LLM to choose and merge tokens; prefill: the LLM on what is left, with all that is done inside it."""

_PROJECTORS = ("multi_modal_projector", "connector", "visual.merger")


class Stopwatch(StoppingCriteria):
    """Books the time up to the first token on stages, and times the other tokens; to be given to `generate`.

    Stages may lie within each other: a stretch of time counts once, for the innermost.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: list[tuple[str, Span]] = []
        self._spans: dict[str, list[Span]] = defaultdict(list)
        self._within: dict[str, list[Span]] = defaultdict(list)
        self._first = Span(device)
        self._others: Span | None = None
        self._tokens = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Note a token, and go on."""
        if self._others is None:
            self._first.stop()
            self._others = Span(self._device)
        self._others.stop()
        self._tokens += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def begin(self, stage: str) -> None:
        """A stage begins."""
        self._running.append((stage, Span(self._device)))

    def end(self) -> None:
        """The stage that began last ends."""
        stage, span = self._running.pop()
        span.stop()
        if self._others is None:
            self._spans[stage].append(span)
            if self._running:
                self._within[self._running[-1][0]].append(span)

    def first_token(self) -> float:
        """Seconds from the start to the first token."""
        return self._first.seconds()

    def other_tokens(self) -> float:
        """Seconds per token behind the first."""
        assert self._others is not None
        return self._others.seconds() / (self._tokens - 1)

    def stages(self) -> dict[str, float]:
        """Seconds by stage up to the first token, and what is left of them as "other"."""
        seconds = {stage: _total(self._spans[stage]) - _total(self._within[stage]) for stage in STAGES}
        return seconds | {"other": self.first_token() - sum(seconds.values())}


@contextmanager
def timed(model: Any) -> Iterator[Stopwatch]:
    """A stopwatch on a model, which is wrapped before if it is to be: hooks then stand around those of the wrapping."""
    base = model.base_model
    watch = Stopwatch(model.device)
    decoder = base.get_decoder()
    handles = [
        *_around(base.get_encoder("image"), "encoder", watch),
        *_around(projector_of(base), "projector", watch),
        decoder.register_forward_pre_hook(lambda *_: watch.begin("selection"), prepend=True),
        decoder.register_forward_pre_hook(lambda *_: watch.end()),
        *_around(decoder, "prefill", watch),
    ]
    statistics = {name: _timed(read, watch) for name, read in STATISTICS.items()}
    try:
        with patch.dict(STATISTICS, statistics):
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def projector_of(base: Any) -> nn.Module:
    """The module that turns patches into tokens of the LLM."""
    names = {name for name, _ in base.named_modules()}
    return base.get_submodule(next(name for name in _PROJECTORS if name in names))  # type: ignore[no-any-return]


def _around(module: nn.Module, stage: str, watch: Stopwatch) -> list[Any]:
    return [
        module.register_forward_pre_hook(lambda *_: watch.begin(stage)),
        module.register_forward_hook(lambda *_: watch.end()),
    ]


def _timed(read: Callable[..., Tensor], watch: Stopwatch) -> Callable[..., Tensor]:
    @functools.wraps(read)
    def timed_read(*args: Any) -> Tensor:
        watch.begin("taps")
        result = read(*args)
        watch.end()
        return result

    return timed_read


def _total(spans: list[Span]) -> float:
    return sum(span.seconds() for span in spans)
