"""The command line of the trainer."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from mmcompress.errors import MMCompressError, SpecError
from mmcompress.evals.micro.training.curves import NO_SHARES
from mmcompress.evals.micro.training.recipes import RECIPES
from mmcompress.evals.micro.training.trainer import Row, Trainer
from mmcompress.evals.progress import counting


def main() -> None:
    """Train one model."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcompress.evals.micro.training",
        description="Train an embedded model from generated scenes. Run again with the same folder to go on.",
        epilog="models:\n" + "\n".join(f"  {name:20} {recipe.summary}" for name, recipe in RECIPES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="which model, see below")
    parser.add_argument("--out", type=Path, help="folder of the run (micro-runs/MODEL)")
    parser.add_argument("--start", type=Path, help="folder of the model to start from (the embedded one)")
    parser.add_argument(
        "--from", type=Path, dest="source", help="folder of a finished model of this recipe, to train it on"
    )
    parser.add_argument("--steps", nargs="+", metavar="STAGE=STEPS", help="run these stages only, and so long (all)")
    parser.add_argument("--seconds", type=float, help="stop after that long, with everything saved (until done)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that draw scenes (%(default)s: none of their own)"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compile the model first: with a C++ compiler, LLaVA trains a quarter faster on a CPU (%(default)s here)",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all numbers of steps (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.out or Path("micro-runs") / arguments.model
    console = Console()
    try:
        trainer = Trainer(
            arguments.model,
            folder,
            start=arguments.start,
            source=arguments.source,
            steps=_steps(arguments.steps),
            device=arguments.device,
            scale=arguments.scale,
            compiled=arguments.compile,
        )
        with counting(console) as progress:
            task = progress.add_task(arguments.model, total=None)

            def report(row: Row) -> None:
                progress.update(
                    task, description=f"{arguments.model} {row['stage']}", completed=row["step"], total=row["steps"]
                )
                progress.console.print(line(row), highlight=False)

            finished = trainer.run(arguments.seconds, arguments.workers, report)
    except MMCompressError as error:
        parser.error(str(error))
    console.print(f"{'finished' if finished else 'stopped, run again to go on'}: {folder}", highlight=False)


def _steps(named: list[str] | None) -> dict[str, int]:
    steps = {}
    for text in named or ():
        stage, _, count = text.partition("=")
        if not count.isdigit():
            raise SpecError(f"--steps takes STAGE=STEPS, as in vision=2000, got {text!r}.")
        steps[stage] = int(count)
    return steps


def line(row: Row) -> str:
    """One line of the log, for people."""
    shares = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key not in NO_SHARES)
    return f"{row['stage']} {row['step']}/{row['steps']}  {row['seconds']:.0f} s  {shares}"


if __name__ == "__main__":
    main()
