"""Examining a trained model and writing its card: `python -m mmcompress.evals.micro.card FOLDER`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForImageTextToText

from mmcompress.errors import InputError, MMCompressError, SpecError
from mmcompress.evals.environment import environment
from mmcompress.evals.micro import GENERATOR_VERSION, Question
from mmcompress.evals.micro.notes import NOTES, UNLEARNT
from mmcompress.evals.micro.processing import load_processor
from mmcompress.evals.micro.questions import TYPES
from mmcompress.evals.micro.scene import Style
from mmcompress.evals.micro.stream import stream
from mmcompress.evals.micro.training.architectures import parameters
from mmcompress.evals.micro.training.curves import sittings
from mmcompress.evals.micro.training.recipes import Optimisation, Recipe, find_recipe
from mmcompress.evals.runner import Answer, evaluate
from mmcompress.evals.statistics import clustered_mean

SEED = 1_000_003
"""Of the fresh scenes; training draws from other series whatever its seed."""

ACCURACY = "accuracy.json"


@dataclass(frozen=True)
class Exam:
    """Fresh questions and the pictures they are about."""

    questions: list[Question]
    pictures: Mapping[str, Image.Image]


def fresh(recipe: Recipe, count: int, seed: int = SEED) -> Exam:
    """Ask `count` questions about scenes like those `recipe` trains on, in the first of its sizes."""
    width, height = recipe.canvases[0]
    style = Style(width=width, height=height, texts=recipe.texts, font_sizes=recipe.font_sizes)
    questions: list[Question] = []
    pictures: dict[str, Image.Image] = {}
    for number, sample in enumerate(stream(seed, style)):
        name = str(number)
        pictures[name] = Image.fromarray(sample.picture)
        for asked in sample.questions:
            questions.append(Question(len(questions), name, asked.question, asked.answer, asked.type, asked.form))
        if len(questions) >= count:
            return Exam(questions[:count], pictures)
    raise AssertionError("samples do not end")


def examine(folder: Path, count: int, progress: Progress | None = None) -> dict[str, Any]:
    """Ask the model in `folder` fresh questions with all its visual tokens, and return accuracies with intervals."""
    recipe = find_recipe(folder.name)
    exam = fresh(recipe, count)
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise InputError(f"no model can be read in {folder}: {error}") from error
    task = progress.add_task(folder.name, total=count) if progress else None
    (result,) = evaluate(
        model,
        load_processor(folder),
        exam.questions,
        exam.pictures,
        [(None, 1.0)],
        progress=lambda answered: progress.advance(task, answered) if progress and task is not None else None,
    )
    return {
        "model": folder.name,
        "questions": count,
        "seed": SEED,
        "generator version": GENERATOR_VERSION,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": parameters(model),
        "visual tokens": result.cost.tokens,
        "environment": environment(),
        "accuracy": accuracies(result.answers, exam.questions),
    }


def accuracies(answers: Sequence[Answer], questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """Accuracy of all, of every type and form: mean, half of the 95 % interval, number of questions, invalid share."""
    graded = list(zip(questions, answers, strict=True))
    groups = {"all": graded}
    for kind in TYPES:
        of_kind = [pair for pair in graded if pair[0].type == kind]
        groups[kind] = of_kind
        of_kind = sorted(of_kind, key=lambda pair: pair[0].form)
        forms = {form: list(pairs) for form, pairs in groupby(of_kind, key=lambda pair: pair[0].form)}
        if len(forms) > 1:
            groups |= {f"{kind}: {form}": pairs for form, pairs in forms.items()}
    table = {}
    for name, pairs in groups.items():
        if pairs:
            right = [float(answer.correct) for _, answer in pairs]
            mean = clustered_mean(right, [asked.image for asked, _ in pairs])
            invalid = sum(not answer.valid for _, answer in pairs) / len(pairs)
            table[name] = {"mean": mean.value, "margin": mean.margin, "questions": len(pairs), "invalid": invalid}
    return table


def card(record: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    """The model card in Markdown."""
    name = record["model"]
    recipe = find_recipe(name)
    lines = [
        f"# {name}",
        "",
        f"{recipe.summary[0].upper()}{recipe.summary[1:]}: a real but tiny vision-language model for measuring token "
        "compression offline. It answers short questions about coloured shapes and signs, and nothing else.",
        "",
        f"- **Architecture:** stock `{type(recipe.build()).__name__}`, {record['parameters']} parameters, bfloat16 "
        f"safetensors, 64-wide attention heads, grouped queries; {record['visual tokens']:.0f} visual tokens for a "
        f"{recipe.canvases[0][0]} x {recipe.canvases[0][1]} px picture.",
        "- **Loads** with `from_pretrained` in transformers, and in vLLM. Prompt: the chat template's, as in "
        "`<s> USER: <image> is there a red star ? ASSISTANT:`; the tokenizer adds nothing of its own.",
        f"- **Data:** scenes of `mmcompress.evals.micro` (generator version {record['generator version']}), drawn "
        "while training; pictures of "
        + ", ".join(f"{width} x {height}" for width, height in recipe.canvases)
        + " px. Eight of the 64 pairs of colour and shape are never asked about: `compose` questions are.",
        *_recipe(recipe, log),
        "",
        "## Accuracy",
        "",
        f"Exact match in %, 95 % intervals clustered by picture, {record['questions']:,} fresh questions (seed "
        f"{record['seed']}), all visual tokens, {record['dtype']}, greedy. Made by "
        f"`python -m mmcompress.evals.micro.card evals/micro/models/{name} --questions {record['questions']}`, "
        + ", ".join(f"{key} {record['environment'][key]}" for key in ("torch", "transformers", "cpu"))
        + ".",
        "",
        "| questions | accuracy | invalid | number |",
        "|---|---:|---:|---:|",
        *(_row(kind, row) for kind, row in record["accuracy"].items()),
        "",
        "## Known weaknesses",
        "",
        *_unlearnt(name),
        *(f"- {note}" for note in NOTES.get(name, ())),
        "- One training seed. Results on synthetic scenes say nothing about a large model on photographs.",
        "",
        "![Training curves](curves.png)",
        "",
    ]
    return "\n".join(lines)


def _unlearnt(name: str) -> list[str]:
    forms = sorted(UNLEARNT.get(name, ()))
    return [f"- At chance, and left out of tables of methods: {', '.join(forms)}."] if forms else []


def _row(kind: str, row: Mapping[str, Any]) -> str:
    accuracy, invalid = f"{100 * row['mean']:.1f} ±{100 * row['margin']:.1f}", f"{100 * row['invalid']:.1f}"
    return f"| {kind} | {accuracy} | {invalid} | {row['questions']} |"


def _recipe(recipe: Recipe, log: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"- **Start:** the weights of {recipe.start}"] if recipe.start else []
    for name, stage in (("vision", recipe.vision), ("answers", recipe.answers), ("pruned", recipe.pruned)):
        if stage is not None:
            lines.append(_stage(name, stage))
    lines += trained_on(log)
    if recipe.pruned is None:
        lines.append("- **Token dropout:** none; pruned prompts are outside what it was trained on.")
    seconds = log[-1]["seconds"] if log else 0
    lines.append(f"- **Seed** {recipe.seed}; **time** {seconds / 60:.0f} minutes (see `log.jsonl` and the curves).")
    return lines


def trained_on(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """The line on sittings that began with finished weights, if there were any."""
    later = [lines[-1] for lines in sittings(log) if "from" in lines[-1]]
    if not later:
        return []
    steps = ", ".join(f"{row['step']} steps of stage {row['stage']} from `{row['from']}`" for row in later)
    return [
        "- **Trained on:** then, at half these learning rates, on other scenes, with more questions of what it knew "
        f"least, labels of characters weighted three times, and all read-outs learnt anew: {steps}."
    ]


def _stage(name: str, stage: Optimisation) -> str:
    meaning = {
        "vision": "vision encoder on labels of patches and pictures",
        "answers": "projector and language model on questions, encoder frozen; at first on easy questions only",
        "pruned": "as before, 60 % of the batches seeing only a random share of the visual tokens, from 5 to 100 %, "
        "half of these with positions renumbered where they are 1-D",
    }
    return (
        f"- **Stage {name}:** {meaning[name]}; {stage.steps} steps of {stage.batch} pictures, "
        f"AdamW, peak learning rate {stage.learning_rate:g}."
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m mmcompress.evals.micro.card", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the model, named as its recipe is")
    parser.add_argument("--questions", type=int, default=10_000, help="how many fresh questions (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--rewrite", action="store_true", help="write the card anew from the accuracies that are there")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    torch.set_num_threads(arguments.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        if arguments.questions < 1:
            raise SpecError(f"--questions must be at least 1, got {arguments.questions}.")
        if not arguments.rewrite:
            with Progress(*columns, console=Console(stderr=True)) as progress:
                record = examine(folder, arguments.questions, progress)
            (folder / ACCURACY).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        record = json.loads((folder / ACCURACY).read_text(encoding="utf-8"))
        rows = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / "README.md").write_text(card(record, [json.loads(row) for row in rows]), encoding="utf-8")
    except (MMCompressError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    main()
