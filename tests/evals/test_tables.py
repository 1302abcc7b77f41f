"""Tables under version control are made by commands written down once."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mmcompress.evals import tables
from mmcompress.spec import Spec, split_specs


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of every command instead of running it."""
    words: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[Any]:
        words.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tables.subprocess, "run", run)
    return words


def test_every_folder_is_there_and_every_spec_is_one() -> None:
    root = Path(__file__).parents[2]
    for name, steps in tables.TABLES.items():
        for step in steps:
            assert (root / tables.RESULTS / name / step.into / "table.md").exists()
            words = tables.arguments(step, Path("x"))
            if "--method" in words:
                for part in split_specs(words[words.index("--method") + 1]):
                    assert [Spec.parse(spec) for spec in part.split(" + ")]


def test_whole_tables_go_into_their_folders(ran: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "kv-micro-llava").mkdir()
    for left in ("answers-0.jsonl", "conditions.json", "report.html", "results.json"):
        (tmp_path / "kv-micro-llava" / left).touch()
    assert tables.make("kv-micro-llava", tmp_path) >= 0
    calibrate, whole, visual = ran
    assert calibrate[1:4] == ["-m", "mmcompress.cli", "calibrate"]
    assert whole[-2:] == ["--out", str(tmp_path / "kv-micro-llava")]
    assert visual[-2:] == ["--out", str(tmp_path / "kv-micro-llava" / "visual")]
    assert [path.name for path in (tmp_path / "kv-micro-llava").iterdir()] == ["results.json"]


def test_few_questions_go_elsewhere(ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tables.RESULTS.mkdir(parents=True)
    tables.main(["micro-llava-all", "kv-micro-llava", "--questions", "20"])
    everything, _, kv, _ = ran
    assert everything[-4:] == ["--limit", "20", "--out", str(tables.LIMITED / "micro-llava-all")]
    assert kv[-4:] == ["--scenes", "7", "--out", str(tables.LIMITED / "kv-micro-llava")]


@pytest.mark.parametrize(
    ("given", "message"),
    [(["micro-lava"], "Did you mean 'micro-llava'"), (["--questions", "0"], "at least 1"), ([], "root of the sources")],
)
def test_what_cannot_be_made_is_refused(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        tables.main(given)
    assert message in capsys.readouterr().err


def test_a_failure_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(tables.subprocess, "run", lambda command, check: failed)
    with pytest.raises(tables.SpecError, match=r"micro-llava: mmcompress demo .* failed"):
        tables.make("micro-llava", tmp_path)
