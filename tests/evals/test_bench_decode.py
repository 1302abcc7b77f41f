"""The benchmark of decoding: that it runs what it says, and what its limits are made of; never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcompress.evals.bench import decode


def test_the_table_of_decoding(tmp_path: Path) -> None:
    out = tmp_path / "decode"
    policies = "snapkv(keep=0.1),quest(keep=0.1, dense_layers=1),h2o(keep=64, every=2)"
    settings = ["--lengths", "700", "--batch", "1,2", "--steps", "2", "--threads", "1", "--out", str(out)]
    decode.main(["micro-llava-336", "--layers", "2", "--kv", policies, *settings])
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["batch"], row["tokens"]) for row in rows] == [(1, 700)] * 4 + [(2, 700)] * 4
    none, snapkv, quest, h2o = rows[:4]
    per_entry = none["kv_bytes"] / 703
    assert snapkv["kv_bytes"] == per_entry * 73 and h2o["kv_bytes"] <= per_entry * 65
    assert quest["kv_bytes"] >= none["kv_bytes"]
    assert none["limit"] == none["ratio"] == 1.0
    assert snapkv["limit"] > quest["limit"] > 1
    assert "| snapkv(keep=0.1) | 1 | 700 |" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "100", "--kv", "int8"], "less than the prompt with one picture"),
        (["--kv", "snapkw(keep=0.1)"], "snapkv"),
        (["--steps", "0"], "at least 2"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        decode.main(["micro-llava-336", "--layers", "1", "--out", str(tmp_path / "out"), *arguments])
    assert message in " ".join(capsys.readouterr().err.split())
