"""Endless samples in a fixed order, however many processes make them: `python -m mmcompress.evals.micro.stream`."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from typing import Literal, TypeVar

from mmcompress.errors import SpecError
from mmcompress.evals.micro.build import Sample, make_sample
from mmcompress.evals.micro.scene import Style, crowded

Item = TypeVar("Item")

_CHUNK = 16
_CHUNKS_AHEAD = 2  # per worker
_WARM_UP = 300  # samples, after which nearly all caches are full


def stream(
    seed: int,
    style: Style | None = None,
    *,
    start: int = 0,
    workers: int = 0,
    context: Literal["spawn", "forkserver", "fork"] = "spawn",
) -> Iterator[Sample]:
    """Yield the samples `start`, `start` + 1, ... of the series `seed`; see `in_order` for the other arguments.

    Raises:
        SpecError: `seed`, `start` or `workers` is negative.
    """
    if seed < 0:
        raise SpecError(f"seed must not be negative, got {seed}.")
    return in_order(partial(make_sample, seed, style=style), start=start, workers=workers, context=context)


def in_order(
    make: Callable[[int], Item],
    *,
    start: int = 0,
    workers: int = 0,
    context: Literal["spawn", "forkserver", "fork"] = "spawn",
) -> Iterator[Item]:
    """Yield make(start), make(start + 1), ... without end; the processes stop when the iterator is closed or dropped.

    Args:
        make: called with an index; it and what it returns must be picklable if there are workers.
        start: the first index.
        workers: processes, 0 for this one.
        context: how processes are started.

    Raises:
        SpecError: `start` or `workers` is negative.
    """
    if start < 0 or workers < 0:
        raise SpecError(f"start and workers must not be negative, got start={start} and workers={workers}.")
    return _in_processes(make, start, workers, context) if workers else map(make, itertools.count(start))


def _in_processes(make: Callable[[int], Item], start: int, workers: int, context: str) -> Iterator[Item]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(context))
    chunks = (range(first, first + _CHUNK) for first in itertools.count(start, _CHUNK))
    under_way: deque[Future[list[Item]]] = deque()
    try:
        while True:
            while len(under_way) < workers * _CHUNKS_AHEAD:
                under_way.append(pool.submit(_make_all, make, next(chunks)))
            yield from under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _make_all(make: Callable[[int], Item], indices: range) -> list[Item]:
    return [make(index) for index in indices]


def measure(style: Style, seconds: float) -> float:
    """Return the samples made per second of one core's time, the warm-up left out."""
    samples = stream(0, style)
    for _ in itertools.islice(samples, _WARM_UP):
        pass
    begin, made = time.process_time(), 0
    while (passed := time.process_time() - begin) < seconds:
        next(samples)
        made += 1
    return made / passed


def main() -> None:
    """Print how fast samples are made."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcompress.evals.micro.stream",
        description="Measure how many samples (scene, picture, questions) a core makes per second.",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement (%(default)s)")
    seconds = parser.parse_args().seconds
    for side in (168, 224, 336):
        plain = Style(side, side)
        rates = [measure(style, seconds) for style in (plain, crowded(plain))]
        print(f"{side} px: {rates[0]:.0f} pictures/s per core, crowded {rates[1]:.0f}")


if __name__ == "__main__":
    main()
