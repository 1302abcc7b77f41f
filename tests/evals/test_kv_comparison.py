"""KV policies beside each other: prompts of several pictures, and the table of what policies make of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mmcompress
from mmcompress.errors import SpecError
from mmcompress.evals import kv_comparison
from mmcompress.evals.loading import load_micro
from mmcompress.evals.micro.needle import make_needles
from mmcompress.spec import Spec


def test_needles_are_at_their_place_and_others_do_not_answer() -> None:
    first, last = (make_needles(1, 3, pictures=3, place=place) for place in (0, 2))
    assert len(first) >= 2 and [needle.asked for needle in first] == [needle.asked for needle in last]
    for early, late in zip(first, last, strict=True):
        assert len(early.pictures) == 3 and early.scene == 3
        assert np.array_equal(early.pictures[0], late.pictures[2])
        assert np.array_equal(early.pictures[1], late.pictures[0])
    again = make_needles(1, 3, pictures=3)
    assert all(np.array_equal(*pair) for pair in zip(first[0].pictures, again[0].pictures, strict=True))
    with pytest.raises(SpecError, match="place"):
        make_needles(1, 3, pictures=2, place=2)


def test_the_same_question_has_the_same_answer_without_the_others() -> None:
    for index in range(6):
        for needle, alone in zip(make_needles(5, index), make_needles(5, index, pictures=1), strict=True):
            assert needle.asked == alone.asked and np.array_equal(needle.pictures[0], alone.pictures[0])


def test_evicting_costs_accuracy_and_saves_bytes(tmp_path: Path) -> None:
    out = tmp_path / "kv"
    kv_comparison.main(
        ["--scenes", "3", "--kv", "random(keep=0.05)", "snapkv(keep=0.5)", "keydiff(keep=1.0)", "--out", str(out)]
    )
    record = json.loads((out / "results.json").read_text())
    none, random, half, everything = record["runs"]
    assert everything["answers"] == none["answers"] and everything["kv_bytes"] == none["kv_bytes"]
    assert 0.5 < half["kv_bytes"] / none["kv_bytes"] < 0.55 and 0.5 < half["read"] < 0.55
    right = [sum(answer["score"] for asked in run["answers"].values() for answer in asked) for run in (none, random)]
    assert right[0] > right[1] + 3
    table = (out / "table.md").read_text()
    assert "| snapkv | 50% |" in table and "| none | -- |" in table and "kv_comparison --scenes 3" in table


def test_what_cannot_act_is_refused_before_anything_is_asked() -> None:
    model, processor = load_micro()
    runs = [Spec.parse("keydiff(keep=9)"), Spec.parse("kvquant(calibration=nowhere.safetensors)")]
    with pytest.raises(SpecError, match="no safetensors file"):
        kv_comparison.evaluate(model, processor, 1, runs)
    mmcompress.wrap(model, kv="keydiff(keep=9)").unwrap()


def test_every_policy_is_in_the_default_table() -> None:
    runs = kv_comparison.every_policy([0.5, 0.1], {"snapkv": {"window": 8}})
    assert runs[0] is None and str(runs[1]) == "random(keep=0.5)"
    assert "snapkv(keep=0.1, window=8)" in map(str, runs)
    assert sum(run is not None and run.name == "h2o" for run in runs) == 2
    assert sum(run is not None and run.name == "int4" for run in runs) == 1
