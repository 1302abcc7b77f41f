"""The benchmark of prompts: what it measures adds up, and what it cannot measure is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmcompress.evals.bench import prefill
from mmcompress.evals.bench.shapes import SHAPES


def run(out: Path, *arguments: str) -> dict:
    prefill.main(["micro-llava-336", "--repeats", "1", "--threads", "1", "--out", str(out), *arguments])
    return json.loads((out / "results.json").read_text())


def test_runs_are_held_against_the_unpruned_model(tmp_path: Path) -> None:
    methods = "uniform,fastv,uniform(keep=0.6) + fastv(layer=1)"
    record = run(tmp_path, "--layers", "3", "--keep", "0.5", "--methods", methods)
    unpruned, *rows = record["rows"]
    assert unpruned["methods"] == "unpruned" and unpruned["prefill_ratio"] == unpruned["flop_ratio"] == 1
    assert [row["methods"] for row in rows] == ["uniform", "uniform(keep=0.6) + fastv(layer=1)"]
    for row in rows:
        assert row["tokens_per_layer"] == pytest.approx(288, abs=1) and row["flop_ratio"] > 1.5
        assert row["prefill_ratio"] == pytest.approx(unpruned["prefill"] / row["prefill"])
    assert "left out: fastv at 50%: fastv cannot leave 50.0%" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(("arguments", "message"), [(["--repeats", "0"], "at least 1"), (["--keep", "2"], "2.0")])
def test_bad_input(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--layers", "1", *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes(name: str) -> None:
    model, inputs = SHAPES[name].build(1, "meta", torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    placeholders = {"micro-llava-336": 576, "llava-1.5-7b": 576, "llava-next-7b": 2928, "qwen2.5-vl-7b": 1296}
    assert inputs["input_ids"].shape == (1, placeholders[name] + 75)
