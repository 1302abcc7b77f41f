"""The benchmark of ops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcompress.evals.bench import kernels


def test_a_row_for_every_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["--ops", "compact,attention_rows", "--limit", "60", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "results.json").read_text())
    assert [row["op"] for row in record["rows"]] == ["attention_rows", "attention_rows", "compact"]
    for row in record["rows"]:
        assert min(row["least"], row["torch"], row["loop"], row["moved"]) > 0
        assert row["triton"] is None
    assert min(record["ceilings"].values()) > 0
    table = (tmp_path / "table.md").read_text()
    assert table.count("| not measured |") == 3
    assert "compact" in capsys.readouterr().out


def test_every_op_is_measured() -> None:
    make = kernels.Maker("cpu", kernels.torch.float32, full=False)
    assert {work.op for group in kernels.GROUPS for work in group(make)} == set(kernels.ops.__all__)


def test_what_is_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in ((["--ops", "compat"], "there is no compat"), (["--limit", "0"], "must be above 0")):
        with pytest.raises(SystemExit):
            kernels.main([*given, "--out", str(tmp_path)])
        assert said in capsys.readouterr().err
