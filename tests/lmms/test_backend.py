"""`mmcompress eval --backend lmms` answers and scores as `lmms_eval --model mmcompress` does, in our own record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from local_tasks import QUESTIONS, lmms_eval, offline, results
from result_numbers import numbers
from test_cli import fail

from mmcompress.evals import record

pytestmark = pytest.mark.slow

METHOD = "hired(alpha=0.25)"
RUNS = {
    "unpruned": "pretrained=micro-llava",
    f"{METHOD} at 20%": "pretrained=micro-llava,method=hired,keep=0.2,alpha=0.25",
}


def evaluate(tasks: Path, out: Path, task: str, *more: str, launch: tuple[str, ...] = ("-m",)) -> dict[str, Any]:
    """The result of the command, run by itself so that nothing is downloaded."""
    command = [sys.executable, *launch, "mmcompress.cli", "eval", "micro-llava", "--suite", task, "--backend", "lmms"]
    command += ["--data", str(tasks), "--method", METHOD, "--keep", "0.2", "--batch-size", "16", "--out", str(out)]
    done = subprocess.run([*command, *more], env=offline(tasks), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "aggregated" not in done.stdout
    return record.load(out)


def changed(tasks: Path, folder: Path, changes: str) -> Path:
    """A folder with the tasks, and one more that differs from the plain one by `changes`."""
    folder.mkdir()
    for file in tasks.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "changed.yaml").write_text(f"task: changed\ninclude: plain.yaml\n{changes}\n")
    return folder


@pytest.fixture(scope="module")
def whole(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    evaluate(tasks, out, "microvqa_local")
    return out


def same_as_lmms_eval(result: dict[str, Any], tasks: Path, out: Path, task: str, metric: str, filtered: str) -> None:
    """Compare the unpruned run and that of the method, and whether every question is asked by both."""
    suite = result["suites"][task]
    assert suite["metric"] == metric and not suite["problems"]
    ours = {run["label"]: run["suites"][task] for run in result["runs"]}
    for number, (label, arguments) in enumerate(RUNS.items()):
        done = lmms_eval(tasks, out / str(number), arguments, task)
        assert list((out / str(number)).rglob("*_results.json")), done.stderr[-3000:] + done.stdout[-3000:]
        summary, answers = results(out / str(number))
        assert ours[label]["metrics"][metric] == pytest.approx(summary["results"][task][f"{metric},{filtered}"])
        said = [answer.upper() for answer in ours[label]["answers"]]
        asked = [int(question["id"]) for question in suite["questions"]]
        assert asked == list(range(len(QUESTIONS)))
        assert said == [answers[question].upper() for question in asked]
        assert len(set(said)) > 3


def test_answers_and_scores_are_those_of_lmms_eval(whole: Path, tasks: Path, tmp_path: Path) -> None:
    result = record.load(whole)
    same_as_lmms_eval(result, tasks, tmp_path, "microvqa_local", "exact_match", "none")
    assert [run["label"] for run in result["runs"]] == [
        "unpruned",
        "random at 20%",
        "uniform at 20%",
        f"{METHOD} at 20%",
    ]
    assert result["environment"]["backend"] == "lmms"
    unpruned, *_, pruned = (run["suites"]["microvqa_local"] for run in result["runs"])
    assert unpruned["cost"]["tokens"] == unpruned["cost"]["kept"] == 256 and pruned["cost"]["kept"] == 51
    assert pruned["cost"]["prefill_flops"] < unpruned["cost"]["prefill_flops"] / 4
    assert pruned["cost"]["kv_bytes"] < unpruned["cost"]["kv_bytes"] / 3
    assert all(pruned["cost"]["seconds"][stage] > 0 for stage in ("encoder", "selection", "prefill"))
    assert pruned["retained"]["low"] < pruned["retained"]["value"] < pruned["retained"]["high"]
    assert pruned["versus_random"]["error"] > 0
    table = (whole / "table.md").read_text()
    assert f"{100 * pruned['metrics']['exact_match']:.1f} ±{100 * pruned['margin']:.1f}" in table


def test_a_task_may_do_all_in_its_own_way(tasks: Path, tmp_path: Path) -> None:
    """Words before the image, a filter, marks that are no numbers, and an aggregation that takes no answer twice."""
    result = evaluate(tasks, tmp_path / "ours", "microvqa_own")
    same_as_lmms_eval(result, tasks, tmp_path, "microvqa_own", "color_score", "shouted")
    found = result["runs"][-1]["suites"]["microvqa_own"]
    assert found["margin"] is None and found["retained"]["low"] is None
    assert f"{found['metrics']['color_score']:.1f}" in (tmp_path / "ours" / "table.md").read_text()


def test_a_killed_evaluation_goes_on(whole: Path, tasks: Path, tmp_path: Path) -> None:
    lines = (whole / "answers-0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "conditions.json").write_bytes((whole / "conditions.json").read_bytes())
    (tmp_path / "answers-0.jsonl").write_text("".join(lines[:-70]) + lines[-70][:30])
    evaluate(tasks, tmp_path, "microvqa_local")
    again = (tmp_path / "answers-0.jsonl").read_text().splitlines(keepends=True)
    assert again[:-70] == lines[:-70] and len(again) == len(lines) == 4 * len(QUESTIONS)
    assert numbers(tmp_path) == numbers(whole)


def test_two_processes_give_the_result_of_one(whole: Path, tasks: Path, tmp_path: Path) -> None:
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29541", "-m")
    evaluate(tasks, tmp_path, "microvqa_local", launch=launch)
    shares = [path.read_text().splitlines() for path in sorted(tmp_path.glob("answers-*.jsonl"))]
    assert [len(share) for share in shares] == [4 * 32, 4 * 16]
    assert numbers(tmp_path) == numbers(whole)


def test_documents_that_cannot_be_asked_are_counted(tasks: Path, tmp_path: Path) -> None:
    some = "doc_to_visual: !function utils.seldom\ndoc_to_text: !function utils.marked\n"
    data = changed(tasks, tmp_path / "data", some)
    result = evaluate(data, tmp_path / "out", "changed", "--no-baselines")
    suite = result["suites"]["changed"]
    without = [number for number, row in enumerate(QUESTIONS) if row.question.startswith("how many")]
    marked = [number for number, row in enumerate(QUESTIONS) if "is there" in row.question]
    assert without and marked
    assert [problem["where"] for problem in suite["problems"]] == [
        *(f"document {number}" for number in without),
        *(f"question {number}" for number in marked),
    ]
    assert len(suite["questions"]) == len(QUESTIONS) - len(without) - len(marked)
    assert f"{len(without) + len(marked)} rows could not be asked" in (tmp_path / "out" / "table.md").read_text()


def test_settings_of_generation_are_conditions(whole: Path, tasks: Path) -> None:
    conditions = json.loads((whole / "conditions.json").read_text())
    assert conditions["generation of microvqa_local"] == {"max_new_tokens": 8, "until": ["\n"]}
    assert conditions["lmms_eval"]


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("microvqa_locl", "", "no task 'microvqa_locl'; the nearest are microvqa_local"),
        ("hellaswag", "", "task hellaswag compares likelihoods"),
        ("mmbench_en", "", "mmbench_en is a group of tasks: give those that you mean of mmbench_en_dev"),
        ("egoschema", "", "task egoschema has videos"),
        ("changed", "output_type: generate_until_multi_round", "asks in several rounds"),
        ("changed", "repeats: 4", "asks each question 4 times"),
        ("changed", "doc_to_visual: !function utils.video", "task changed has videos"),
        ("changed", "doc_to_visual: !function utils.gone", "task changed cannot be loaded: AttributeError"),
        ("changed", "metric_list: [{metric: gpt_score, aggregation: mean}]", "gpt_score needs a judge"),
        (
            "changed",
            "metric_list: [{metric: exact_match, aggregation: !function utils.ask_judge}]",
            "exact_match needs a judge",
        ),
        ("changed", "metric_list: [{metric: submission, aggregation: mean}]", "submission is a file for a server"),
        (
            "changed",
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: false}]",
            "exact_match is better when it is lower",
        ),
        ("changed", "dataset_kwargs: {data_files: {test: /nowhere.jsonl}}", "task changed: its dataset json cannot be"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is(
    task: str, changes: str, reason: str, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tasks / "cache"))
    out, data = tmp_path / "out", changed(tasks, tmp_path / "data", changes)
    said = fail("eval", "micro-llava", "--suite", task, "--backend", "lmms", "--data", data, "--out", out)
    assert reason in " ".join(said.split())
    assert not out.exists()


def test_data_with_yaml_that_is_no_task_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- one\n- two\n")
    said = fail("eval", "micro-llava", "--suite", "microvqa_local", "--backend", "lmms", "--data", tmp_path)
    assert "has a yaml file that is no task" in " ".join(said.split())
