"""Timing that gives up instead of hanging, and what is made of repeated measurements."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from time import perf_counter
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

REPEATS, ENOUGH_SECONDS = 15, 10.0


def time_batch(
    work: Callable[[Sequence[T]], list[R]], batch: Sequence[T], limit: float
) -> tuple[float | None, list[R]]:
    """Median milliseconds per element of `work` on `batch`, and what it returned.

    The first element alone is the warm-up; if that takes more than `limit` seconds, the answer is None and nothing.
    The batch is repeated `REPEATS` times, or until that took `ENOUGH_SECONDS` in all.
    """
    try:
        with at_most(limit):
            work(batch[:1])
            wait()
    except TimeoutError:
        return None, []
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < ENOUGH_SECONDS:
        start = perf_counter()
        result = work(batch)
        wait()
        seconds.append(perf_counter() - start)
    return 1000 * median(seconds) / len(batch), result


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError within what takes longer, as soon as Python has its turn; in the main thread only."""

    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def wait() -> None:
    """Let work that runs on a GPU come to its end."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and half of what lies between the quartiles."""
    if len(values) == 1:
        return values[0], 0.0
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return middle, (upper - lower) / 2
