"""The command `bench`: what it measures adds up, and what it cannot measure is said; nothing about speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from mmcompress import cli
from mmcompress.evals.bench import latency
from mmcompress.evals.bench.latency import PARTS, Row, Sample, break_even
from mmcompress.evals.bench.prompts import sizes
from mmcompress.evals.bench.shapes import SHAPES, Shape
from mmcompress.evals.bench.stages import Stopwatch, timed
from mmcompress.evals.bench.timing import spread
from mmcompress.integrations.hf import wrap


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, ["bench", *map(str, arguments)])


def measured(out: Path, *arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--repeats", "2", "--new-tokens", "3", "--out", out)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads((out / "results.json").read_text())


def require_sums(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row["seconds"]) == set(PARTS) and len(row["samples"]) == 2
        for sample in row["samples"]:
            assert sum(sample["parts"].values()) == pytest.approx(sample["ttft"])
            assert all(seconds >= 0 for seconds in sample["parts"].values())
            assert sample["parts"]["encoder"] > 0 and sample["parts"]["projector"] > 0 and sample["tpot"] > 0


def test_a_checkpoint(tmp_path: Path) -> None:
    record = measured(
        tmp_path, "micro-llava", "--method", "todre,fastv(layer=1)", "--keep", "0.5", "--kv", "h2o(keep=0.5)"
    )
    assert (record["format"], record["version"], record["model"], record["layers"]) == (
        "mmcompress-bench",
        1,
        "micro-llava",
        4,
    )
    rows = record["rows"]
    assert [(row["methods"], row["kv"]) for row in rows] == [
        (method, kv) for kv in (None, "h2o(keep=0.5)") for method in (None, "todre", "fastv(layer=1)")
    ]
    require_sums(rows)
    unpruned, todre, _, evicted, *_ = rows
    assert unpruned["tokens"] == unpruned["in_llm"] == 256 and todre["in_llm"] == 128
    assert unpruned["ttft_ratio"] == unpruned["flop_ratio"] == unpruned["of_limit"] == 1 < todre["flop_ratio"]
    assert unpruned["seconds"]["taps"] == 0 < todre["seconds"]["taps"]
    assert evicted["kv_bytes"] < 0.6 * unpruned["kv_bytes"] and todre["kv_bytes"] < 0.6 * unpruned["kv_bytes"]
    for row in rows[1:]:
        saved = unpruned["seconds"]["prefill"] - row["seconds"]["prefill"]
        assert row["pays_from"] == break_even(256, row["seconds"]["taps"] + row["seconds"]["selection"], saved)
        assert row["of_limit"] == pytest.approx(
            unpruned["seconds"]["prefill"] / row["seconds"]["prefill"] / row["flop_ratio"]
        )
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert sum(line.startswith("| todre | 50% | 1 of 672x672 |") for line in lines) == 2


def test_a_projector_within_the_encoder(tmp_path: Path) -> None:
    record = measured(tmp_path, "micro-qwen2.5-vl", "--image", "112x84", "--method", "uniform", "--keep", "0.5")
    assert [(row["tokens"], row["in_llm"]) for row in record["rows"]] == [(42, 42), (42, 21)]
    require_sums(record["rows"])


def test_random_weights_at_sizes_and_batches(tmp_path: Path) -> None:
    shape = ("--random-weights", "micro-llava-336", "--layers", "1", "--dtype", "float32")
    record = measured(tmp_path, *shape, "--image", "90x60,60x90", "--batch", "1,2", "--method", "uniform", "--keep", 64)
    assert [(row["image"], row["batch"]) for row in record["rows"][::2]] == [
        ([90, 60], 1),
        ([90, 60], 2),
        ([60, 90], 1),
        ([60, 90], 2),
    ]
    require_sums(record["rows"])
    one, two = (record["rows"][start : start + 2] for start in (0, 2))
    assert two[0]["kv_bytes"] == 2 * one[0]["kv_bytes"] and two[1]["in_llm"] == one[1]["in_llm"] == 64
    assert record["layers"] == 1 and record["left_out"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a MODEL or --random-weights"),
        (["micro-llava", "--random-weights", "llava-1.5-7b"], "either a MODEL or --random-weights"),
        (["micro-llava", "--layers", "2"], "--layers cuts a model of --random-weights"),
        (["--random-weights", "lava-1.5-7b"], "Did you mean 'llava-1.5-7b'? Available: llava-1.5-7b, llava-next-7b"),
        (["--random-weights", "micro-llava-336", "--layers", "0"], "--layers must be above 0"),
        (["micro-llava", "--image", "672"], "--image '672'"),
        (["micro-llava", "--image", "0x4"], "--image '0x4'"),
        (["micro-llava", "--batch", "1,0"], "--batch '0'"),
        (["micro-llava", "--keep", "half"], "--keep 'half'"),
        (["micro-llava", "--keep", "2.0"], "2.0"),
        (["micro-llava", "--dtype", "int8"], "unknown --dtype 'int8'"),
        (["micro-llava", "--device", "tpu"], "unknown --device 'tpu'"),
        (["micro-llava", "--method", "todree"], "'todree'. Did you mean 'todre'"),
        (["micro-llava", "--kv", "snapkw(keep=9)"], "Did you mean 'snapkv'"),
        (["micro-llava", "--method", "transprune", "--keep", "0.01"], "nothing is left to measure"),
        (["--random-weights", "qwen2.5-vl-7b", "--layers", "1", "--image", "4x4000"], "more than 200 times"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Shape.build
    monkeypatch.setattr(Shape, "build", lambda self, layers, device, dtype: build(self, layers, "meta", dtype))
    method = () if "--kv" in arguments or "--method" in arguments else ("--method", "uniform")
    result = invoke(*arguments, *method, "--out", tmp_path)
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in " ".join(result.stderr.split())


def test_something_must_be_measured(tmp_path: Path) -> None:
    result = invoke("micro-llava", "--out", tmp_path)
    assert result.exit_code == 2 and "--method or --kv" in result.stderr


def test_what_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = latency.compare

    def full(model: Any, prompt: Any, *others: Any) -> list[Row]:
        if len(prompt["input_ids"]) > 1:
            raise torch.OutOfMemoryError
        return compare(model, prompt, *others)

    monkeypatch.setattr(latency, "compare", full)
    shape = ("--random-weights", "micro-llava-336", "--layers", "1", "--method", "uniform")
    record = measured(tmp_path, *shape, "--batch", "1,2")
    assert [row["batch"] for row in record["rows"]] == [1, 1]
    assert record["left_out"] == {"batch of 2 at 336x336": "out of memory."}
    result = invoke(*shape, "--batch", "2", "--out", tmp_path)
    assert result.exit_code == 2 and "no batch fits" in result.stderr


def test_where_a_method_begins_to_pay() -> None:
    # 576 tokens: 10 ms are spent to save 40; at 144 tokens the gain would be the 10 that are spent.
    assert break_even(576, 0.010, 0.040) == pytest.approx(144)
    assert break_even(576, 0.080, 0.040) == pytest.approx(1152)
    assert break_even(576, 0.010, 0.0) is None and break_even(576, 0.010, -0.001) is None


def test_ratios_and_medians_by_hand() -> None:
    def row(prefills: list[float], unpruned: Row | None = None, flop_ratio: float = 1.0) -> Row:
        parts = dict.fromkeys(PARTS, 1.0)
        samples = [Sample(parts | {"prefill": prefill}, 5 + prefill, 0.5, None, 7) for prefill in prefills]
        return Row("x" if unpruned else None, 0.5, None, (8, 8), 1, 100, 50.0, flop_ratio, samples, unpruned)

    whole = row([9.0, 10.0, 20.0])
    half = row([4.0, 5.0, 6.0], whole, 4.0)
    assert half.prefill_ratio == 2 and half.record()["of_limit"] == 0.5
    assert half.ttft_ratio == 15 / 10 and half.ttft == (10.0, 0.5)
    assert half.pays_from == 100 * 2 / 5  # taps and selection take 1 each
    assert whole.record()["pays_from"] is None and half.peak_bytes is None
    assert spread([3.0]) == (3.0, 0.0)


def test_a_stretch_of_time_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("mmcompress.integrations.hf.clock.time.perf_counter", lambda: float(next(clock)))
    watch = Stopwatch(torch.device("cpu"))  # at 0; every begin and end takes a tick, a begin two as spans start ended
    watch.begin("encoder")
    watch.begin("projector")
    watch.end()
    watch.end()
    ids = torch.zeros(2, 5, dtype=torch.long)
    for _ in range(3):
        assert not watch(ids, None).any()
    stages = watch.stages()
    assert stages["encoder"] + stages["projector"] == 3 and stages["projector"] == 1
    assert sum(stages.values()) == watch.first_token()
    watch.begin("prefill")
    watch.end()
    assert watch.stages()["prefill"] == 0  # of tokens behind the first


TOKENS = {
    "micro-llava-336": (576, 576),
    "llava-1.5-7b": (576, 576),
    "llava-next-7b": (2928, 1368),
    "llava-onevision-7b": (3699, 1728),
    "qwen2.5-vl-7b": (1296, 14 * 11),
    "qwen3-vl-8b": (1024, 12 * 9),
}
"""Visual tokens of a picture of the usual size, and of one of 400x300 pixels."""


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes(name: str) -> None:
    model, prompt = SHAPES[name].build(1, "meta", torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    usual, small = TOKENS[name]
    assert prompt["input_ids"].shape == (1, usual + 75)
    assert SHAPES[name].prompt(model, (400, 300))["input_ids"].shape == (1, small + 75)
    before = {part: len(part._forward_pre_hooks) for part in model.modules()}
    with timed(model):
        added = {part: len(part._forward_pre_hooks) - count for part, count in before.items()}
    assert sorted(count for count in added.values() if count) == [1, 1, 3]  # encoder, projector, LLM with selection
    assert {part: len(part._forward_pre_hooks) for part in model.modules()} == before


def test_wrapping_stays_intact() -> None:
    model, prompt = SHAPES["micro-llava-336"].build(1, "cpu", torch.float32)
    with torch.inference_mode(), wrap(model, "vtc-cls(first_layer=1)", keep=0.1) as handle:
        before = model(**prompt).logits
        with timed(model) as watch:
            during = model(**prompt).logits
        watch(prompt["input_ids"], None)
        assert torch.equal(before, during) and torch.equal(before, model(**prompt).logits)
        assert watch.stages()["taps"] > 0 and handle.stats is not None


def test_sizes_of_pictures() -> None:
    assert sizes("672x672, 1024X768") == [(672, 672), (1024, 768)]
