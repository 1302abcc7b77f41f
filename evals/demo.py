"""The offline demonstration: five methods at four budgets on the embedded model, as tables, a picture and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmcompress.errors import SpecError
from mmcompress.evals import comparison, report_file
from mmcompress.evals.backends import Terms
from mmcompress.evals.loading import load_micro
from mmcompress.evals.micro import DEFAULT_MODEL
from mmcompress.evals.micro.notes import UNLEARNT
from mmcompress.evals.overlay import captioned, side_by_side
from mmcompress.evals.record import Record
from mmcompress.evals.runner import Run
from mmcompress.evals.samples import samples
from mmcompress.evals.suites import configure

METHODS = ("random", "uniform", "pool", "vtc-cls", "todre")
METHODS_WITHOUT_CLS = ("random", "uniform", "pool", "vtc-cls(score=received)", "todre")
KEEPS = (0.5, 0.25, 0.1, 0.05)
COMMAND = "demo"


def choose_runs(model: Any) -> list[Run]:
    """The unpruned model, then every method at every budget."""
    has_cls = model.config.vision_config.model_type == "clip_vision_model"
    methods = METHODS if has_cls else METHODS_WITHOUT_CLS
    return [Run(None, 1.0), *(Run(method, keep) for keep in KEEPS for method in methods)]


def demo(
    out: Path,
    limit: int | None = None,
    threads: int = 1,
    console: Console | None = None,
    name: str = DEFAULT_MODEL,
) -> None:
    """Evaluate `choose_runs` and write `table.md`, `results.json`, `overlay.png` and `report.html` to `out`.

    Questions of forms that the model never learnt are left out.

    Args:
        out: a directory, made if missing; answers of an earlier demonstration in it are dropped.
        limit: only so many questions, and the others about the same images.
        threads: CPU threads for torch; more than are idle make so small a model many times slower.
        console: where to print.
        name: of the embedded model.

    Raises:
        SpecError: `limit` is not positive, there is no such model, or `out` holds an evaluation of another command.
        OSError: `out` cannot be written to.
    """
    console = console or Console()
    terms = Terms(name, limit=limit)
    asked = comparison.read("microvqa", configure("microvqa", Path(), unlearnt=UNLEARNT.get(name, frozenset())), terms)
    torch.set_num_threads(threads)
    model, processor = load_micro(name)
    _drop_answers(out)
    chosen = comparison.Comparison(choose_runs(model), {})
    result = comparison.compare(model, processor, [asked], chosen, terms, out, console, command=COMMAND)
    assert result is not None  # this is the only process
    label, question, panels = samples(model, processor, [asked], result)[0]
    drawn, page = out / "overlay.png", out / "report.html"
    title = f"{question.prompt}  right answer: {question.answers[0]}"
    number = [row["id"] for row in result["suites"][label]["questions"]].index(question.id)
    pictures = [
        captioned(panel.picture, _caption(result["runs"][panel.run], panel.note, label, number)) for panel in panels
    ]
    side_by_side(pictures, columns=3, title=title).save(drawn)
    report_file.write([out], page)
    for path in (drawn, page):
        console.print(f"wrote {path}", highlight=False)


def _drop_answers(out: Path) -> None:
    """Drop those of an earlier demonstration.

    Raises:
        SpecError: they are not of one.
    """
    path = out / "conditions.json"
    left = [*out.glob("answers-*.jsonl"), *out.glob(path.name)]
    try:
        own = json.loads(path.read_text(encoding="utf-8"))["command"] == COMMAND
    except (OSError, ValueError, KeyError, TypeError):
        own = False
    if left and not own:
        raise SpecError(
            f"{out} holds an evaluation that mmcompress demo did not write: choose another --out, or delete it first."
        )
    for file in left:
        file.unlink()


def _caption(run: Record, note: str, label: str, number: int) -> str:
    """The name of a run, what is noted of it, and its answer to the question of that number in a suite."""
    name = f"{run['label']}: {note}" if note else run["label"]
    return f"{name}\nanswer: {run['suites'][label]['answers'][number]}"
