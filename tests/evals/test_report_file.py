"""Whatever is wrong with a result or the file to write is one sentence; benchmarks are reported too."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import fail, succeed

from mmcompress.evals import record, report_bench
from mmcompress.evals.bench import latency

COMMITTED = Path(__file__).parents[2] / "evals" / "results" / "micro-llava"
SECONDS = dict.fromkeys(latency.PARTS, 0.01)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(COMMITTED, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A benchmark's results, rows made as it makes them."""

    def row(methods: str | None, keep: float, prefill: float, unpruned: latency.Row | None = None) -> latency.Row:
        samples = [latency.Sample(SECONDS | {"prefill": prefill}, 0.06 + prefill, 0.005, None, 2_000_000)] * 2
        return latency.Row(methods, keep, None, (224, 224), 2, 256, 256 * keep, 1 / keep, samples, unpruned)

    unpruned = row(None, 1.0, 0.04)
    rows = [unpruned, row("todre<b>", 0.25, 0.02, unpruned)]
    result = {
        "format": latency.FORMAT,
        "version": latency.VERSION,
        "environment": {"command": "mmcompress bench <b>", "cpu": "some"},
        "model": "micro-llava",
        "layers": 4,
        "dtype": "float32",
        "repeats": 2,
        "left_out": {"batch of 9": "out of memory."},
        "rows": [one.record() for one in rows],
    }
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "results.json").write_text(json.dumps(result))
    return tmp_path / "bench"


def change(path: Path, **parts: Any) -> None:
    file = path / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


def drop(path: Path, name: str) -> None:
    file = path / "results.json"
    file.write_text(json.dumps({key: part for key, part in json.loads(file.read_text()).items() if key != name}))


def shorten(path: Path) -> None:
    result = record.load(path)
    del result["runs"][3]["suites"]["microvqa"]["scores"][-1]
    record.save(result, path / "results.json")


def unfinished(path: Path) -> None:
    (path / "results.json").unlink()
    (path / "conditions.json").write_text("{}")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "run does not exist; mmcompress eval and mmcompress bench make such folders"),
    "another folder": (lambda path: (path / "results.json").unlink(), "run is no folder of mmcompress eval"),
    "not finished": (unfinished, "has not finished: the same mmcompress eval command goes on with it"),
    "empty": (lambda path: (path / "results.json").write_text(""), "results.json is empty"),
    "cut off": (
        lambda path: (path / "results.json").write_text((path / "results.json").read_text()[:5000]),
        "results.json is no JSON, or not all of it",
    ),
    "no text": (lambda path: (path / "results.json").write_bytes(b"\xff\x00\xfe"), "results.json is no JSON"),
    "a list": (lambda path: (path / "results.json").write_text("[]"), "its format is None, not 'mmcompress-results'"),
    "another format": (lambda path: change(path, format="else"), "its format is 'else'"),
    "another version": (
        lambda path: change(path, version=record.VERSION + 1),
        f"version {record.VERSION + 1} of its format; this mmcompress reads version {record.VERSION}",
    ),
    "no runs": (lambda path: drop(path, "runs"), "run is damaged: it lacks runs"),
    "too few scores": (shorten, "has not one score for each question of microvqa"),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("ending", ["html", "md", "csv"])
def test_broken_results_are_said_to_be(run: Path, tmp_path: Path, how: str, ending: str) -> None:
    damage, message = BROKEN[how]
    damage(run)
    out = tmp_path / f"report.{ending}"
    said = fail("report", run, "--out", out)
    assert message in said and said.count("error") == 1 and not out.exists()


def test_broken_benchmarks_are_said_to_be(bench: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    change(bench, version=0)
    assert f"version 0 of its format; this mmcompress reads version {latency.VERSION}" in fail(
        "report", bench, "--out", out
    )
    change(bench, version=latency.VERSION)
    drop(bench, "rows")
    assert "bench is damaged: it lacks rows" in fail("report", bench, "--out", out)


def test_reports_go_where_they_can(run: Path, tmp_path: Path) -> None:
    assert "the folder" in fail("report", run, "--out", tmp_path / "none" / "report.html")
    (tmp_path / "taken.html").mkdir()
    assert "taken.html is a folder" in fail("report", run, "--out", tmp_path / "taken.html")
    (tmp_path / "file").write_text("")
    assert "file" in fail("report", run, "--out", tmp_path / "file" / "report.html")
    assert not list(tmp_path.glob("**/*.part"))


def test_a_file_of_that_name_is_no_folder_for_answers(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert "taken" in fail("eval", "--method", "todre", "--keep", "0.5", "--limit", 1, "--out", tmp_path / "taken")


def test_benchmarks_are_reported_beside_evaluations(run: Path, bench: Path, tmp_path: Path) -> None:
    succeed("report", run, bench, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "todre&lt;b&gt; at 25%" in page and "<b>\n" not in page and "mmcompress bench &lt;b&gt;" in page
    assert "80.0 ms, 5.0 a token" in page and "projector 10.00 ms" in page and "out of memory" in page
    succeed("report", run, bench, "--out", tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record.load(run)["runs"]) + 2
    assert (rows[-1]["method"], rows[-1]["ttft_seconds"], rows[-1]["suite"]) == ("todre<b>", "0.08", "")
    assert float(rows[-1]["projector_seconds"]) == 0.01 and rows[0]["projector_seconds"] == ""
    succeed("report", bench, "--out", tmp_path / "report.md")
    lines = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 4 and {line.count("|") for line in lines} == {len(report_bench.HEAD) + 1}
    assert "| 1.25 | 2.00 | 4.00 |" in lines[-1]
