"""Time by stage without stalling the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmcompress.accounting import StageSeconds


class StageClock:
    """Adds up time per stage; on CUDA by events that are read only when somebody asks."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def reset(self) -> None:
        """Begin a new count."""
        self._seconds.clear()
        self._events.clear()

    def start(self, device: torch.device) -> float | torch.cuda.Event:
        """A mark to hand to `stop`."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, stage: str, mark: float | torch.cuda.Event) -> None:
        """Book the time since `mark` on `stage`."""
        if isinstance(mark, float):
            self._seconds[stage] += time.perf_counter() - mark
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._events.append((stage, mark, end))

    @contextmanager
    def measure(self, stage: str, device: torch.device) -> Iterator[None]:
        """Book the time spent inside on `stage`."""
        mark = self.start(device)
        yield
        self.stop(stage, mark)

    def read(self) -> StageSeconds:
        """The seconds so far; waits for the device once if it was used. Selection happens inside the prefill."""
        for stage, begin, end in self._events:
            end.synchronize()
            self._seconds[stage] += begin.elapsed_time(end) / 1000
        self._events.clear()
        seconds = dict(self._seconds)
        seconds["prefill"] = seconds.get("prefill", 0.0) - seconds.get("selection", 0.0)
        return StageSeconds(**seconds)
