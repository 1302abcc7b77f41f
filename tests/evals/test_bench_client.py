"""The benchmark with vLLM's client: what it is told, and what is made of what it says; no server is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmcompress import cli
from mmcompress.evals.bench import client
from mmcompress.evals.bench.servers import STOCK

TERMS = client.Terms((640, 480), (1, 4), requests=20, new_tokens=8, repeats=3)


def said(rate: float, ttft: float, tpot: float, failed: int = 0) -> dict[str, float]:
    return {"request_throughput": rate, "median_ttft_ms": ttft, "median_tpot_ms": tpot, "failed": failed}


def test_rows_are_medians_beside_the_stock_engine() -> None:
    runs = [
        {STOCK: said(9, 300, 40), "hired": said(30, 99, 10, 1)},
        {STOCK: said(10, 200, 20), "hired": said(20, 100, 10)},
        {STOCK: said(99, 100, 10), "hired": said(15, 101, 99, 1)},
    ]
    stock, hired = client.summarise(4, runs)
    assert stock == client.Row(STOCK, 4, 10, 22.5, 200, 20, 1.0, 1.0, 1.0, 0)
    assert hired == client.Row("hired", 4, 20, 3.75, 100, 10, 2.0, 2.0, 2.0, 2)
    assert hired.cells() == ["hired", "4", "20.00", "3.75", "2.00", "100.00", "2.00", "10.00", "2.00", "2"]
    assert len(hired.cells()) == len(client.COLUMNS)


def test_tokens_in_one_piece_have_no_ratio() -> None:
    _, hired = client.summarise(1, [{STOCK: said(10, 200, 20), "hired": said(20, 100, 0)}])
    assert hired.tpot_ratio is None and hired.cells()[-2] == ""


def test_what_the_client_is_told() -> None:
    told = client.arguments("http://here:1", Path("model"), TERMS, 4, 3)
    options = dict(zip(told[:-2:2], told[1:-2:2], strict=True))
    assert options["--random-mm-bucket-config"] == "{(480, 640, 1): 1.0}"
    assert json.loads(options["--random-mm-limit-mm-per-prompt"])["image"] == 1
    assert (options["--max-concurrency"], options["--num-prompts"], options["--seed"]) == ("4", "20", "3")
    assert told[-2:] == ["--ignore-eos", "--disable-tqdm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--method or --kv"),
        (["--method", "hird(keep=0.2)"], "Did you mean 'hired'"),
        (["--kv", "snapkw(keep=9)"], "Did you mean 'snapkv'"),
        (["--method", "hired(keep=0.2)", "--clients", "0"], "--clients '0'"),
        (["--method", "hired(keep=0.2)", "--image", "big"], "--image 'big'"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(
        cli.app, ["bench-serve", "micro-llava", *arguments, "--out", str(tmp_path)]
    )
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in " ".join(result.stderr.split())
