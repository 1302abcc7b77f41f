"""Bytes: those that keys and values are held in, and the most a process or a GPU has held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"


@dataclass
class Peak:
    """The most memory in use, known at the end; None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Watch a GPU's allocations, or on the CPU what of the process is in memory, weights and libraries included."""
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device)
        return
    known = _forget_peak()
    yield found
    if known:
        found.bytes = _resident_peak()


def _forget_peak() -> bool:
    try:
        _CLEAR.write_text(_CLEAR_PEAK, encoding="ascii")
    except OSError:
        return False
    return _resident_peak() is not None


def _resident_peak() -> int | None:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def bytes_held(cache: Any) -> int:
    """What keys and values of all layers occupy, as they are held."""
    return sum(getattr(layer, "nbytes", None) or layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
