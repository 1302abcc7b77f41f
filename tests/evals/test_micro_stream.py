"""The stream of samples is the same whoever makes it, and leaves no process behind."""

from __future__ import annotations

import itertools
import multiprocessing
import sys

import numpy as np
import pytest

from mmcompress.errors import SpecError
from mmcompress.evals.micro import stream as module
from mmcompress.evals.micro.build import Sample, make_sample
from mmcompress.evals.micro.scene import Style
from mmcompress.evals.micro.stream import in_order, stream

STYLE = Style(168, 168)


def equal(first: Sample, second: Sample) -> bool:
    same = first.scene == second.scene and first.questions == second.questions
    return same and np.array_equal(first.picture, second.picture)


@pytest.mark.parametrize(("workers", "context"), [(0, "spawn"), (1, "spawn"), (2, "fork")])
def test_any_number_of_workers_gives_the_same_samples_in_order(workers: int, context) -> None:
    samples = stream(5, STYLE, start=3, workers=workers, context=context)
    for index, sample in enumerate(itertools.islice(samples, 40), start=3):
        assert equal(sample, make_sample(5, index, STYLE)), index
    if workers:
        samples.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_resumed_stream_goes_on_where_it_stopped() -> None:
    whole = list(itertools.islice(stream(6, STYLE), 12))
    assert all(map(equal, whole[8:], stream(6, STYLE, start=8)))


def test_bad_arguments_are_refused_at_once() -> None:
    for arguments in ({"start": -1}, {"workers": -1}):
        with pytest.raises(SpecError, match="must not be negative"):
            stream(0, **arguments)
    with pytest.raises(SpecError, match="seed"):
        stream(-1)


def fail_at_seven(index: int) -> int:
    if index == 7:
        raise ValueError("seven")
    return index


def test_a_failure_in_a_worker_is_raised_and_ends_the_workers() -> None:
    with pytest.raises(ValueError, match="seven"):
        list(in_order(fail_at_seven, workers=1, context="fork"))
    assert not multiprocessing.active_children()


def test_the_command_prints_rates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["stream", "--seconds", "0.01"])
    monkeypatch.setattr(module, "_WARM_UP", 2)
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["168 px", "224 px", "336 px"]
