"""lmms-eval, run for real and offline: the plug-in's answers are those of `mmcompress eval`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.api.instance import Instance
from local_tasks import QUESTIONS, lmms_eval, results
from PIL import Image

from mmcompress.evals.lmms.model import MMCompress
from mmcompress.evals.loading import load_micro
from mmcompress.evals.micro import MICROVQA_PATH, Question
from mmcompress.evals.runner import evaluate

pytestmark = pytest.mark.slow


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


def test_each_task_is_asked_in_its_words_and_settings() -> None:
    """All requests come at once: of two tasks one cuts answers short, and of the same settings two word otherwise."""
    model = MMCompress("micro-llava", device="cpu", batch_size=4)
    rows = dict(enumerate(QUESTIONS[:10]))
    length = {"max_new_tokens": 8}
    wordings = {"plain": (_plain, length), "counted": (_counted, length), "cut": (_plain, {**length, "until": ["e"]})}
    model.task_dict = {task: {"test": rows} for task in wordings}

    def answers(*tasks: str) -> list[str]:
        requests = [
            Instance(
                "generate_until",
                ("", *wordings[task], row, task, "test"),
                0,
                {"task": task, "doc_id": row, "repeats": 1},
            )
            for row in rows
            for task in tasks
        ]
        return [result.text for result in model.generate_until(requests)]

    alone = [answers(task) for task in wordings]
    plain, counted, cut = alone
    assert len(set(plain)) > 3
    assert cut == [answer.split("e")[0] for answer in plain] != plain
    assert counted != plain
    assert answers(*wordings) == [answer for of_row in zip(*alone, strict=True) for answer in of_row]


def _plain(row: Question) -> list[dict[str, Any]]:
    with Image.open(MICROVQA_PATH / row.image) as image:
        shown = {"type": "image", "url": image.convert("RGB")}
    return [{"role": "user", "content": [shown, {"type": "text", "text": row.question}]}]


def _counted(row: Question) -> list[dict[str, Any]]:
    return _plain(replace(row, question="how many circles are there ?"))


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
