"""lmms-eval, run for real and offline: the plug-in's answers are those of `mmcompress eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmcompress.evals.loading import load_micro
from mmcompress.evals.micro import MICROVQA_PATH, load_microvqa
from mmcompress.evals.runner import evaluate

pytestmark = pytest.mark.slow

QUESTIONS = load_microvqa(48, without=("letters", "word", "relation", "side"))
TASK = """
task: microvqa_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  until:
    - "\\n"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""
UTILS = """
from PIL import Image


def doc_to_visual(doc):
    with Image.open(doc["image"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    asked = [
        {"image": str(MICROVQA_PATH / row.image), "question": row.question, "answer": row.answer} for row in QUESTIONS
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "microvqa_local.yaml").write_text(TASK.format(rows=rows))
    (folder / "utils.py").write_text(UTILS)
    return folder


def lmms_eval(tasks: Path, out: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    """What `lmms_eval` says of the local task, with a model of these arguments."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "mmcompress", "--model_args", arguments]
    command += ["--tasks", "microvqa_local", "--include_path", str(tasks), "--batch_size", "16"]
    command += ["--device", "cpu", "--output_path", str(out), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)


def results(out: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The summary, and the answer to each question of the task by its number."""
    (summary,), (samples,) = out.rglob("*_results.json"), out.rglob("*_samples_*.jsonl")
    answers = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        answers[int(sample["doc_id"])] = sample["filtered_resps"]
    return json.loads(summary.read_text()), answers


@pytest.mark.parametrize(
    ("arguments", "run"),
    [
        ("pretrained=micro-llava", (None, 1.0)),
        ("pretrained=micro-llava,method=hired,keep=0.2,alpha=0.25", ("hired(alpha=0.25)", 0.2)),
        ("pretrained=micro-llava,method=divprune,keep=0.5,kv=snapkv(keep=0.5)", ("divprune", 0.5, "snapkv(keep=0.5)")),
    ],
)
def test_scores_are_those_of_our_own_evaluation(
    arguments: str, run: tuple[Any, ...], tasks: Path, tmp_path: Path
) -> None:
    done = lmms_eval(tasks, tmp_path, arguments)
    assert list(tmp_path.rglob("*_results.json")), done.stderr[-3000:] + done.stdout[-3000:]  # it exits with 0 anyhow
    summary, answers = results(tmp_path)
    model, processor = load_micro()
    (ours,) = evaluate(model, processor, QUESTIONS, MICROVQA_PATH, [run])
    assert [answers[number] for number in range(len(QUESTIONS))] == [answer.text for answer in ours.answers]
    score = sum(answer.correct for answer in ours.answers) / len(QUESTIONS)
    assert summary["results"]["microvqa_local"]["exact_match,none"] == pytest.approx(score)
    throughput = summary["throughput"]
    assert throughput["total_gen_tokens"] >= len(QUESTIONS)
    assert throughput["avg_speed"] > 0
    if run[0] is not None:
        assert throughput["avg_visual_tokens"] == 256 * len(QUESTIONS)
        assert throughput["avg_visual_tokens_kept"] == ours.cost.kept * len(QUESTIONS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("pretrained=micro-llava,method=hirde,keep=0.2", "unknown method 'hirde'. Did you mean 'hired'?"),
        ("pretrained=micro-llava,keep=0.2", "keep without a method"),
        ("pretrained=./nowhere,method=hired,keep=0.2", "model folder ./nowhere does not exist"),
    ],
)
def test_what_is_wrong_is_said(arguments: str, reason: str, tasks: Path, tmp_path: Path) -> None:
    done = lmms_eval(tasks, tmp_path, arguments)
    assert reason in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*_results.json"))
