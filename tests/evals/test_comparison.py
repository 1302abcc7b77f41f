"""An evaluation can be stopped anywhere and goes on; its numbers are those of an evaluation that never stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from result_numbers import numbers
from rich.console import Console
from test_cli import fail, invoke, succeed

from mmcompress.errors import InputError, SpecError
from mmcompress.evals import comparison, record, report
from mmcompress.evals.answers import Answers, Key
from mmcompress.evals.backends import Terms
from mmcompress.evals.comparison import Comparison
from mmcompress.evals.loading import load_micro
from mmcompress.evals.micro import MICROVQA_PATH, model_path
from mmcompress.evals.processes import ALONE
from mmcompress.evals.report_file import page
from mmcompress.evals.runner import Run, Spent
from mmcompress.evals.suites import configure

DATA = Path(__file__).parent / "suites"
RUNS = [Run(None, 1.0), Run("random", 0.25), Run("todre", 0.25), Run("todre", 0.1)]
ASK = ("eval", "--method", "todre", "--keep", "0.25", "--limit", 12, "--batch-size", 4)
SPENT = Spent(1, 2, 1, 1.0, 10, 20.0, {"encoder": 0.1, "selection": 0.1, "prefill": 0.1, "decode": 0.1})


@pytest.fixture(scope="module")
def micro() -> tuple[Any, Any]:
    return load_micro()


@pytest.fixture(scope="module")
def compare(micro: tuple[Any, Any]) -> Callable[..., Any]:
    def comparing(out: Path, *labels: str, data: Path = DATA, runs: list[Run] = RUNS, **terms: Any) -> Any:
        wanted = Terms(**{"model": "micro-llava", "limit": 12, "batch_size": 6} | terms)
        suites = [comparison.read(label, configure(label, data), wanted) for label in labels or ("microvqa",)]
        chosen = Comparison(runs, {})
        return comparison.compare(*micro, suites, chosen, wanted, out, Console(quiet=True))

    return comparing


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in out.glob("answers-*.jsonl") for line in path.read_text().splitlines()]


def asked_once(out: Path) -> bool:
    keys = [tuple(line[name] for name in Key._fields) for line in lines(out)]
    return len(set(keys)) == len(keys)


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "mmcompress.cli", *map(str, ASK), "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    written = killed / "answers-0.jsonl"
    end = time.monotonic() + 120
    try:
        while not (written.exists() and written.read_bytes().count(b"\n") >= 12):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = lines(killed)
    assert not (killed / "results.json").exists()
    succeed(*ASK, "--out", killed)
    succeed(*ASK, "--out", whole)
    assert len(before) < len(lines(killed)) == len(lines(whole))
    assert asked_once(killed) and lines(killed)[: len(before)] == before
    assert numbers(killed) == numbers(whole)


@pytest.mark.parametrize("cut", [1, 30, 500])
def test_a_torn_line_is_asked_again(compare: Callable[..., Any], tmp_path: Path, cut: int) -> None:
    compare(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    with (tmp_path / "torn" / "answers-0.jsonl").open("rb+") as file:
        file.truncate(file.seek(0, os.SEEK_END) - cut)
    compare(tmp_path / "torn")
    assert asked_once(tmp_path / "torn") and numbers(tmp_path / "torn") == numbers(tmp_path / "whole")


def test_ctrl_c_keeps_every_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = Answers.add, []

    def stopped(self: Answers, answers: Any) -> None:
        add(self, answers)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "add", stopped)
    result = invoke(*ASK, "--out", tmp_path)
    assert result.exit_code == 130 and "the same command goes on" in " ".join(result.output.split())
    before = lines(tmp_path)
    assert before
    succeed(*ASK, "--out", tmp_path)
    assert asked_once(tmp_path) and lines(tmp_path)[: len(before)] == before


def test_a_full_disk_keeps_what_was_written(
    compare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 5000

        def write(self, data: memoryview) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written: int = self.file.write(data[: self.room])
            self.room -= written
            return written

        def close(self) -> None:
            self.file.close()

    init = Answers.__init__

    def full(self: Answers, *arguments: Any) -> None:
        init(self, *arguments)
        self._file = Full(self._file)  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "__init__", full)
        with pytest.raises(OSError, match="No space left"):
            compare(tmp_path / "full")
    kept = (tmp_path / "full" / "answers-0.jsonl").read_bytes()
    assert len(kept) == 5000
    compare(tmp_path / "full")
    compare(tmp_path / "whole")
    assert (tmp_path / "full" / "answers-0.jsonl").read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert asked_once(tmp_path / "full") and numbers(tmp_path / "full") == numbers(tmp_path / "whole")


def test_more_runs_and_suites_join_what_is_there(compare: Callable[..., Any], tmp_path: Path) -> None:
    compare(tmp_path / "grown", "microvqa", runs=RUNS[:2])
    before = lines(tmp_path / "grown")
    compare(tmp_path / "grown", "microvqa", "jsonl")
    compare(tmp_path / "whole", "microvqa", "jsonl")
    assert lines(tmp_path / "grown")[: len(before)] == before and asked_once(tmp_path / "grown")
    assert numbers(tmp_path / "grown") == numbers(tmp_path / "whole")


def test_processes_share_the_batches(compare: Callable[..., Any], tmp_path: Path) -> None:
    """One after the other, as if each waited for the rest: the first one would read what the second wrote."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    whole = compare(alone)
    # The second process finds no conditions of its own to write; the first makes them before any other goes on.
    Answers(shared, json.loads((alone / "conditions.json").read_text())).close()
    assert compare(shared, processes=replace(ALONE, number=1, count=2)) is None
    second = len(lines(shared))
    assert 0 < second < len(lines(alone)) and not (shared / "results.json").exists()
    result = compare(shared, processes=replace(ALONE, count=2))
    assert asked_once(shared) and len(lines(shared)) == len(lines(alone))
    assert numbers(shared) == numbers(alone) and result["environment"]["processes"] == 2
    assert [run["suites"]["microvqa"]["answers"] for run in result["runs"]] == [
        run["suites"]["microvqa"]["answers"] for run in whole["runs"]
    ]


@pytest.mark.slow
def test_two_accelerate_processes_give_the_result_of_one(tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command = [sys.executable, *launch, "--mixed_precision", "no", "-m", "mmcompress.cli", *map(str, ASK)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    succeed(*ASK, "--out", tmp_path / "one")
    assert {path.name for path in (tmp_path / "two").glob("answers-*")} == {"answers-0.jsonl", "answers-1.jsonl"}
    assert asked_once(tmp_path / "two") and numbers(tmp_path / "one") == numbers(tmp_path / "two")


# --- what is asked, and what comes of it


def test_baselines_are_asked_unless_refused(tmp_path: Path) -> None:
    succeed(*ASK, "--out", tmp_path / "with")
    assert [run["method"] for run in record.load(tmp_path / "with")["runs"]] == [None, "random", "uniform", "todre"]
    succeed(*ASK, "--no-baselines", "--out", tmp_path / "without")
    assert [run["method"] for run in record.load(tmp_path / "without")["runs"]] == [None, "todre"]


def test_what_is_given_twice_is_asked_once(tmp_path: Path) -> None:
    policies = "snapkv(keep=64), snapkv(keep=64)"
    ask = ("eval", "--method", "todre", "--no-baselines", "--limit", 1, "--out", tmp_path)
    succeed(*ask, "--keep", "1,0.5,.5,1.0,1", "--kv", policies)
    labels = ["unpruned", "todre at 1", "todre at 50%", "todre at 100%"]
    found = [run["label"] for run in record.load(tmp_path)["runs"]]
    assert found == [*labels, *(f"{label}, KV snapkv(keep=64)" for label in labels)]


def test_kv_policies_are_entries_of_their_own(tmp_path: Path) -> None:
    succeed(*ASK, "--no-baselines", "--kv", "snapkv(keep=0.5)", "--out", tmp_path)
    result = record.load(tmp_path)
    assert [run["label"] for run in result["runs"]] == [
        "unpruned",
        "todre at 25%",
        "unpruned, KV snapkv(keep=0.5)",
        "todre at 25%, KV snapkv(keep=0.5)",
    ]
    held = [run["suites"]["microvqa"]["cost"]["kv_bytes"] for run in result["runs"]]
    assert held[0] > held[2] > held[3] and held[1] > held[3]
    assert "KV policy" in (tmp_path / "table.md").read_text()
    assert "unknown" in fail(*ASK, "--kv", "snapk(keep=0.5)", "--out", tmp_path)


def test_retained_shares_and_intervals(compare: Callable[..., Any], tmp_path: Path) -> None:
    result = compare(tmp_path, limit=60)
    unpruned, _, quarter, tenth = (run["suites"]["microvqa"] for run in result["runs"])
    assert unpruned["retained"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    for suite in (quarter, tenth):
        share = suite["retained"]
        assert share["value"] == pytest.approx(sum(suite["scores"]) / sum(unpruned["scores"]))
        assert 0 < share["low"] < share["value"] < share["high"] < 1.5
        assert suite["metrics"]["exact match"] == pytest.approx(sum(suite["scores"]) / len(suite["scores"]))
        assert suite["invalid"] == suite["valid"].count(False) / len(suite["valid"])
    assert quarter["versus_random"]["value"] == pytest.approx(
        quarter["metrics"]["exact match"] - result["runs"][1]["suites"]["microvqa"]["metrics"]["exact match"]
    )
    assert tenth["versus_random"] is None
    assert result == compare(tmp_path, limit=60) | {"environment": result["environment"]}
    assert result["runs"][2]["spec"]["method"] == [{"name": "todre", "keep": 0.25}]


def test_rows_that_cannot_be_asked_are_counted(compare: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "jsonl"
    shutil.copytree(DATA / "jsonl" / "pictures", folder / "pictures")
    (folder / "torn.png").write_bytes((folder / "pictures" / "a.png").read_bytes()[:40])
    rows = [
        {"image": image, "question": question, "answers": "red"}
        for image, question in (
            ("pictures/a.png", "what color ?"),
            ("pictures/gone.png", "what color ?"),
            ("torn.png", "what color ?"),
            ("pictures/b.png", "what <image> ?"),
            ("pictures/b.png", "what color ?"),
            ("../secret.png", "what color ?"),
        )
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = compare(tmp_path / "out", "jsonl", data=tmp_path, limit=None)
    suite = result["suites"]["jsonl"]
    assert [asked["id"] for asked in suite["questions"]] == ["0", "4"]
    assert [problem["where"] for problem in suite["problems"]] == [
        "questions.jsonl, line 6",
        *(f"question {number}" for number in (1, 2, 3)),
    ]
    assert "jsonl: 4 rows could not be asked" in (tmp_path / "out" / "table.md").read_text()
    (folder / "pictures" / "gone.png").write_bytes((folder / "pictures" / "a.png").read_bytes())
    assert len(compare(tmp_path / "out", "jsonl", data=tmp_path, limit=None)["suites"]["jsonl"]["questions"]) == 3
    assert asked_once(tmp_path / "out")
    shutil.rmtree(folder / "pictures")
    with pytest.raises(InputError, match="not one question could be asked"):
        compare(tmp_path / "none", "jsonl", data=tmp_path, limit=None)
    beside = compare(tmp_path / "beside", "jsonl", "microvqa", data=tmp_path)
    assert not beside["suites"]["jsonl"]["questions"] and beside["suites"]["microvqa"]["questions"]
    assert "No question could be asked" in (tmp_path / "beside" / "table.md").read_text()
    assert all(len(row) == len(report.columns(beside, "jsonl")) for row in report.rows(beside, "jsonl"))
    assert "6 rows could not be asked" in page([tmp_path / "beside"])


# --- what is refused


def test_answers_under_other_conditions_are_not_mixed(compare: Callable[..., Any], tmp_path: Path) -> None:
    compare(tmp_path)
    for other in ({"seed": 1}, {"batch_size": 4}, {"limit": 30}, {"model": "another"}):
        with pytest.raises(SpecError, match=r"other conditions .*choose another --out"):
            compare(tmp_path, **other)


def test_answers_of_other_weights_are_not_mixed(compare: Callable[..., Any], tmp_path: Path) -> None:
    compare(tmp_path)
    path = tmp_path / "conditions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "those before"}))
    with pytest.raises(SpecError, match="weights was those before, is"):
        compare(tmp_path)


def test_answers_about_other_pictures_are_not_mixed(compare: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copytree(DATA / "jsonl", tmp_path / "jsonl")
    compare(tmp_path / "out", "jsonl", data=tmp_path)
    picture = tmp_path / "jsonl" / "pictures" / "a.png"
    picture.touch()
    compare(tmp_path / "out", "jsonl", data=tmp_path)
    picture.write_bytes((MICROVQA_PATH / "images" / "000.png").read_bytes())
    with pytest.raises(SpecError, match=r"\(picture pictures/a\.png of jsonl was \w+, is \w+\): choose another --out"):
        compare(tmp_path / "out", "jsonl", data=tmp_path)


def test_answers_with_other_files_of_options_are_not_mixed(compare: Callable[..., Any], tmp_path: Path) -> None:
    file, tower = tmp_path / "calibration.safetensors", tmp_path / "tower"
    succeed("calibrate", "micro-llava", "--limit", 1, "--bits", 2, "--out", file)
    shutil.copytree(model_path() / "text-tower", tower)
    runs = [Run(None, 1.0), Run(f"cdpruner(text_tower={tower})", 0.25), Run(None, 1.0, f"kvquant(calibration={file})")]
    for _ in range(2):
        compare(tmp_path / "out", runs=runs, limit=1)
    (tower / "config.json").write_text((tower / "config.json").read_text() + " ")
    with pytest.raises(SpecError, match=rf"\(content of {tower} was \w+, is \w+\): choose another --out"):
        compare(tmp_path / "out", runs=runs, limit=1)
    succeed("calibrate", "micro-llava", "--limit", 1, "--bits", 3, "--out", file)
    with pytest.raises(SpecError, match=f"content of {file} was"):
        compare(tmp_path / "out", runs=runs, limit=1)
    compare(tmp_path / "out", runs=runs[:1], limit=1)  # which reads neither


def test_answers_of_another_version_are_not_mixed(tmp_path: Path) -> None:
    Answers(tmp_path, {}).close()
    path = tmp_path / "conditions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))
    with pytest.raises(SpecError, match="version was 0, is 1"):
        Answers(tmp_path, {})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--backend", "vlm"), "Did you mean 'vllm'"),
        (("--engine", "{}"), "--engine goes with --backend vllm"),
    ],
)
def test_backends_are_chosen_by_name(options: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    assert reason in fail(*ASK, *options, "--out", tmp_path)


@pytest.mark.parametrize("line", ["{nonsense", "[]", "{}", '{"suite": 1}'])
def test_broken_answers_are_named(tmp_path: Path, line: str) -> None:
    with Answers(tmp_path, {}) as answers:
        answers.add([(Key("s", "q", None, "1.0", None), "red", SPENT)])
    (tmp_path / "answers-0.jsonl").write_text(f"{line}\n{(tmp_path / 'answers-0.jsonl').read_text()}")
    with pytest.raises(InputError, match=r"answers-0\.jsonl, line 1"):
        Answers(tmp_path, {})


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    keys = [Key.of("s", "q", run) for run in (Run("todre", 1), Run("todre", 1.0), Run("todre", 1.0, "snapkv(keep=8)"))]
    said = [(key, f'{key.keep}\n"', SPENT) for key in keys]
    with Answers(tmp_path, {"model": "m"}) as answers:
        answers.add(said)
    with Answers(tmp_path, {"model": "m"}) as again:
        assert again.known == {key: (text, spent) for key, text, spent in said}


def test_suites_are_listed_with_what_they_need(tmp_path: Path) -> None:
    text = succeed("suites", "--data", tmp_path)
    assert "testdev_balanced_questions.json" in text and "MMBench_DEV_EN.tsv" in text and "coco_pope_random" in text
    assert "Did you mean 'pope'" in fail("eval", "--suite", "popes", "--out", tmp_path)
    assert "is not" in fail("eval", "--suite", "pope", "--data", tmp_path, "--out", tmp_path)
