"""The offline demonstration: five methods at four budgets on the embedded model, as one table and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console

import mmcompress
from mmcompress.evals import comparison
from mmcompress.evals.micro import DEFAULT_MODEL, MICROVQA_PATH, Question, load_microvqa, model_path
from mmcompress.evals.micro.notes import UNLEARNT
from mmcompress.evals.micro.processing import load_processor
from mmcompress.evals.overlay import original, overlay, side_by_side
from mmcompress.evals.runner import Result, Run, open_image, prompt

METHODS = ("random", "uniform", "pool", "vtc-cls", "todre")
METHODS_WITHOUT_CLS = ("random", "uniform", "pool", "vtc-cls(score=received)", "todre")
KEEPS = (0.5, 0.25, 0.1, 0.05)
PICTURED_KEEP = 0.1


def load_micro(name: str = DEFAULT_MODEL) -> tuple[Any, Any]:
    """An embedded model in float32 on the CPU, and its processor.

    Raises:
        SpecError: there is none of that name.
    """
    path = model_path(name)
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model.eval(), load_processor(path)


def choose_runs(model: Any) -> list[Run]:
    """The unpruned model, then every method at every budget."""
    has_cls = model.config.vision_config.model_type == "clip_vision_model"
    methods = METHODS if has_cls else METHODS_WITHOUT_CLS
    return [(None, 1.0), *((method, keep) for keep in KEEPS for method in methods)]


def demo(
    out: Path,
    limit: int | None = None,
    threads: int = 1,
    console: Console | None = None,
    name: str = DEFAULT_MODEL,
) -> None:
    """Evaluate `choose_runs`, print the table, and write `table.md`, `results.json` and `overlay.png` to `out`.

    Questions of forms that the model never learnt are left out.

    Args:
        out: a directory, made if missing.
        limit: only the first questions.
        threads: CPU threads for torch; more than are idle make so small a model many times slower.
        console: where to print.
        name: of the embedded model.

    Raises:
        SpecError: `limit` is not positive, or there is no such model.
        OSError: `out` cannot be written to.
    """
    console = console or Console()
    questions = load_microvqa(limit, without=UNLEARNT.get(name, ()))
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    model, processor = load_micro(name)
    runs = choose_runs(model)
    results = comparison.measure(model, processor, questions, MICROVQA_PATH, runs, console)
    comparison.write(out, results, questions, {}, console)
    drawn = out / "overlay.png"
    picture(model, processor, questions, results).save(drawn)
    console.print(f"wrote {drawn}", highlight=False)


def picture(model: Any, processor: Any, questions: Sequence[Question], results: Sequence[Result]) -> Image.Image:
    """What every method keeps of one test picture, with the answer it led to."""
    asked_at = _telling_question(questions, results)
    asked = questions[asked_at]
    image = open_image(MICROVQA_PATH / asked.image)
    inputs = processor(images=image, text=prompt(processor, asked.question), return_tensors="pt")
    panels = []
    for result in results:
        answer = f"answer: {result.answers[asked_at].text}"
        if result.method is None:
            panels.append(original(image, f"unpruned\n{answer}"))
        elif result.keep == PICTURED_KEEP:
            with mmcompress.wrap(model, result.method, keep=result.keep) as handle, torch.inference_mode():
                model(**inputs)
                (trace,) = handle.trace
            panels.append(overlay(image, trace.grids, trace.selection, result.method, answer))
    return side_by_side(panels, columns=3, title=f"{asked.question}  right answer: {asked.answer}")


def _telling_question(questions: Sequence[Question], results: Sequence[Result]) -> int:
    """The first question the unpruned model gets right and on which the pictured runs differ most evenly."""
    pictured = [result.answers for result in results if result.keep == PICTURED_KEEP]
    unpruned = next(result.answers for result in results if result.method is None)

    def balance(number: int) -> tuple[bool, float]:
        right = sum(answers[number].correct for answers in pictured)
        return (unpruned[number].correct, -abs(right - len(pictured) / 2))

    return max(range(len(questions)), key=balance)
