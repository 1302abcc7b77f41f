"""The commands `calibrate` and `train matryoshka`: what is learnt before a model is used."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmcompress.cli._shared import MODEL_HELP, load_model
from mmcompress.errors import SpecError, unknown_name


def calibrate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.", metavar="FILE")],
    suite: Annotated[
        str, typer.Option(help="What is read: a suite, or 'jsonl(folder=...)' for your own; see mmcompress suites.")
    ] = "microvqa",
    data: Annotated[Path, typer.Option(help="Folder with a folder for every suite.")] = Path("data"),
    limit: Annotated[
        int, typer.Option(help="Read N questions, and the others about the same images.", metavar="N", min=1)
    ] = 16,
    bits: Annotated[int, typer.Option(help="Of a key or value: 2, 3 or 4.")] = 4,
    outliers: Annotated[float, typer.Option(help="Share of keys and values that are held as they are.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Draws the questions, and the centroids that are tried first.")] = 0,
) -> None:
    """Calibrate the KV policy kvquant for a model.

    The model reads questions about pictures with their answers, and the file says, for every layer, which keys are
    outliers and which few numbers the others become: those with the least error where an error matters most to what
    the model predicts. It belongs to this model only. A few thousand tokens are enough, about 16 pictures; all keys
    and values of them, and their gradients, are held in memory meanwhile.

    Try:

      mmcompress calibrate micro-llava --out micro.safetensors
      mmcompress calibrate llava-hf/llava-1.5-7b-hf --suite gqa --data /data --bits 3 --out llava.safetensors
      mmcompress calibrate MODEL --suite "jsonl(folder=/data/mine)" --out mine.safetensors

    Then: mmcompress.wrap(model, kv="kvquant(calibration=mine.safetensors)")
    """
    from rich.progress import track

    from mmcompress.evals import suites
    from mmcompress.evals.suites.base import draw

    if not out.parent.is_dir():
        raise SpecError(f"--out {out}: the folder {out.parent} does not exist.")
    questions, _ = suites.configure(suite, data).read()
    loaded, processor = load_model(model)
    from mmcompress.evals.calibrate import calibrate as run_calibrate

    run_calibrate(loaded, processor, draw(questions, limit, seed), out, bits, outliers, seed=seed, track=track)
    Console().print(f"wrote {out}", highlight=False)


def matryoshka(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    budgets: Annotated[str, typer.Option(help="Visual tokens per tile to train, separated by commas.")],
    data: Annotated[Path, typer.Option(help="Folder of the questions.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the log and the model.")],
    suite: Annotated[str, typer.Option(help="What the questions are written as; see mmcompress suites.")] = "jsonl",
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="Conversations per step and process.", min=1)] = 8,
    turns: Annotated[
        int, typer.Option(help="The most questions of a conversation: those about the same images.", min=1)
    ] = 1,
    draws: Annotated[
        int, typer.Option(help="Budgets of a step, for which images are encoded once; as many as there are for M3's.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of the projector and a full LLM.", min=0)] = 2e-5,
    llm: Annotated[str, typer.Option(help="What is trained of the LLM: full, lora or frozen.")] = "full",
    lora_learning_rate: Annotated[float, typer.Option(help="Of LoRA's weights.", min=0)] = 2e-4,
    tower: Annotated[bool, typer.Option(help="Train the vision tower too.")] = False,
    tower_learning_rate: Annotated[float, typer.Option(help="Of the vision tower.", min=0)] = 2e-5,
    seed: Annotated[int, typer.Option(help="Of the order of questions and budgets.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 200,
    workers: Annotated[int, typer.Option(help="Processes that read images ahead.", min=0)] = 0,
) -> None:
    """Teach a LLaVA to answer from nested numbers of visual tokens; run again with the same folder to go on.

    Every step draws one of the budgets, or several with --draws. Forms of questions that an embedded model never
    learnt are left out, as of its evaluations. For several processes, start it with accelerate launch -m
    mmcompress.cli.

    Try:

      mmcompress train matryoshka --model micro-llava --budgets 64,16,4,1 --data questions --out micro-m3 \
--suite "jsonl(prompt=plain)"
    """
    from rich.progress import Progress

    from mmcompress.evals.matryoshka import Recipe, Trainer
    from mmcompress.evals.micro.notes import UNLEARNT
    from mmcompress.evals.suites import configure
    from mmcompress.spec import Spec

    try:
        scales = tuple(sorted(int(part) for part in budgets.split(",")))
    except ValueError:
        raise SpecError(f"--budgets {budgets!r}: write token counts separated by commas, as in 144,36,9,1.") from None
    if llm not in ("full", "lora", "frozen"):
        raise unknown_name("--llm", llm, ("full", "lora", "frozen"))
    if "folder" in Spec.parse(suite).options:
        raise SpecError(f"--suite {suite!r}: the folder of the questions is what --data says.")
    recipe = Recipe(
        scales,
        steps,
        batch,
        turns,
        draws,
        learning_rate,
        lora_learning_rate,
        tower_learning_rate=tower_learning_rate,
        llm=typing.cast(Any, llm),
        tower=tower,
        seed=seed,
    )
    questions = dataclasses.replace(configure(suite, data, unlearnt=UNLEARNT.get(model, frozenset())), folder=data)
    loaded, processor = load_model(model, "cpu")
    console = Console()
    trainer = Trainer(loaded, processor, questions, recipe, out)
    with Progress(console=console, disable=not trainer.leads) as progress:
        task = progress.add_task("training", total=steps, completed=trainer.step)

        def report(row: dict[str, Any]) -> None:
            progress.update(task, completed=row["step"], description=f"{row['budget']} tokens, loss {row['loss']:.3f}")

        trainer.run(report, save_every, workers)
    if trainer.leads:
        console.print(f"wrote {out}", highlight=False)
