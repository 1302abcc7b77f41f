"""Time by stage without stalling the device."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from mmcompress.accounting import StageSeconds

_MANY = 256


class Span:
    """A stretch of time on a device, from its creation to `stop`; on CUDA measured by events."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin = self._mark()
        self._end = self._begin

    def stop(self) -> Span:
        """End the stretch."""
        self._end = self._mark()
        return self

    def seconds(self) -> float:
        """Its length; waits for the device if it has not got there."""
        if not self._cuda:
            return self._end - self._begin
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StageClock:
    """Adds up the spans of one prefill and the decoding that follows it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._spans: dict[str, list[Span]] = defaultdict(list)

    def add(self, stage: str, *spans: Span) -> None:
        """Book finished `spans` on `stage`."""
        self._spans[stage] += spans
        if len(self._spans[stage]) > _MANY:  # long generations must not pile up events
            self._fold(stage)

    def read(self) -> StageSeconds:
        """The seconds so far. Selection happens inside the prefill and is taken out of it."""
        for stage in list(self._spans):
            self._fold(stage)
        seconds = dict(self._seconds)
        seconds["prefill"] = seconds.get("prefill", 0.0) - seconds.get("selection", 0.0)
        return StageSeconds(**seconds)

    def _fold(self, stage: str) -> None:
        self._seconds[stage] += sum(span.seconds() for span in self._spans.pop(stage))
