"""Questions on which runs differ, with pictures of what each run kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from mmcompress.evals.overlay import kept, resized, tokens_kept
from mmcompress.evals.record import Asked, Record
from mmcompress.evals.runner import Run, configure, encode
from mmcompress.evals.suites.base import Question
from mmcompress.integrations.hf import wrap

PER_SUITE = 2


class Panel(NamedTuple):
    """What the run of that number kept of a picture, and how many tokens; the unpruned one has the picture itself."""

    run: int
    picture: Image.Image
    note: str = ""


def samples(
    model: Any, processor: Any, suites: Sequence[Asked], result: Record
) -> list[tuple[str, Question, list[Panel]]]:
    """For every suite its most telling questions, each with a picture of what every method kept at a middle budget."""
    pictured = _middle_budgets(result)
    found = []
    for asked in suites:
        by_id = {question.id: question for question in asked.questions}
        listed = result["suites"][asked.label]["questions"]
        for number in _telling(result, asked.label, pictured)[:PER_SUITE]:
            question = by_id[listed[number]["id"]]
            found.append((asked.label, question, panels(model, processor, question, result, pictured)))
    return found


def panels(model: Any, processor: Any, question: Question, result: Record, runs: Sequence[int]) -> list[Panel]:
    """The first picture of `question`, and what `runs` keep of it, where they choose tokens before the LLM."""
    pictures = {picture: picture.open() for picture in question.images}
    inputs = encode(model, processor, [question], pictures)
    seen = as_seen(model, processor, pictures[question.images[0]])
    drawn = [Panel(0, resized(seen))]
    for number in runs:
        run = Run(*(result["runs"][number][name] for name in Run._fields))
        with wrap(model, configure(*run)) as handle, torch.inference_mode():
            model(**inputs)
            trace = handle.trace[0]
        chosen = len(trace.selection) < sum(rows * columns for rows, columns in trace.grids)
        if chosen and len(trace.grids) <= 2:
            picture = kept(seen, trace.grids, trace.selection)
            drawn.append(Panel(number, picture, tokens_kept(trace.grids, trace.selection)))
    return drawn


def as_seen(model: Any, processor: Any, picture: Image.Image) -> Image.Image:
    """The part of a picture that the model's processor shows it."""
    crop = processor.image_processor
    if model.config.model_type == "llava" and getattr(crop, "do_center_crop", False):
        # This family sees no more than the centre; others see all of the picture.
        return ImageOps.fit(picture, (crop.crop_size["width"], crop.crop_size["height"]))
    return picture


def save(found: Sequence[tuple[str, Question, list[Panel]]], out: Path) -> list[Record]:
    """Write the panels to the folder `samples` of `out`; what the result says of them."""
    folder = out / "samples"
    folder.mkdir(exist_ok=True)
    saved = []
    for number, (label, question, drawn) in enumerate(found):
        files = []
        for panel in drawn:
            path = folder / f"{number}-{panel.run}.jpg"
            panel.picture.save(path, quality=85)
            files.append({"run": panel.run, "file": f"samples/{path.name}", "note": panel.note})
        saved.append({"suite": label, "question": question.id, "panels": files})
    return saved


def _middle_budgets(result: Record) -> list[int]:
    """For every method without a KV policy the number of its run at the middle of its budgets."""
    by_method: dict[str, list[int]] = {}
    for number, run in enumerate(result["runs"]):
        if run["method"] is not None and run["kv"] is None and "share_of_tokens" in run:
            by_method.setdefault(run["method"], []).append(number)
    tokens = [run.get("share_of_tokens", 0.0) for run in result["runs"]]
    ordered = [sorted(numbers, key=lambda number: tokens[number]) for numbers in by_method.values()]
    return [numbers[(len(numbers) - 1) // 2] for numbers in ordered]


def _telling(result: Record, label: str, pictured: Sequence[int]) -> list[int]:
    """Numbers of questions, those first that the unpruned model gets right and on which runs differ most evenly."""
    by_run = [run["suites"][label].get("scores", []) for run in result["runs"]]

    def balance(number: int) -> tuple[bool, float]:
        right = sum(by_run[run][number] for run in pictured)
        return (by_run[0][number] < 1, abs(right - len(pictured) / 2))

    return sorted(range(len(by_run[0])), key=balance)
