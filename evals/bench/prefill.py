"""How long a prompt takes by stage, compressed and not, beside what the saved FLOPs would allow at best."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from mmcompress.accounting import Stats
from mmcompress.errors import MMCompressError, SpecError
from mmcompress.evals.bench.rows import publish
from mmcompress.evals.bench.shapes import SHAPES
from mmcompress.evals.comparison import plan
from mmcompress.evals.environment import bench_environment
from mmcompress.evals.report import budget
from mmcompress.evals.runner import Run, configure
from mmcompress.integrations.hf import wrap
from mmcompress.spec import split_specs

METHODS = "uniform,divprune,fastv,pyramiddrop,transprune,sparsevlm,divprune(keep=0.5) + transprune"
COLUMNS = ("methods", "keep", "tokens/layer", "encoder ms", "select ms", "prefill ms", "prefill x", "limit x", "all x")
NOTES = (
    "keep: visual tokens per LLM layer on average. prefill: the LLM on the whole prompt, with all that is selected "
    "inside it; select: before it. x: time of the unpruned model over that of the run, medians of runs taken in turns "
    "in one process; limit: the same for the LLM's FLOPs; all: encoder, selection and prefill together.",
    "Weights are random: times do not depend on what they say.",
)
EPILOG = (
    "shapes:\n"
    + "\n".join(f"  {name:16} {shape.summary}" for name, shape in SHAPES.items())
    + """

try:
  python -m mmcompress.evals.bench.prefill micro-llava-336
  python -m mmcompress.evals.bench.prefill llava-1.5-7b --layers 4 --dtype bfloat16
  python -m mmcompress.evals.bench.prefill qwen2.5-vl-7b --device cuda --dtype bfloat16
"""
)


@dataclass(frozen=True)
class Row:
    """One run: seconds by stage (medians), and its ratios to the unpruned model."""

    methods: str
    keep: float | None
    tokens_per_layer: float
    encoder: float
    selection: float
    prefill: float
    prefill_ratio: float
    flop_ratio: float
    whole_ratio: float

    def cells(self) -> list[str]:
        """The row as text, in the order of `COLUMNS`."""
        stages = [f"{1000 * seconds:.2f}" for seconds in (self.encoder, self.selection, self.prefill)]
        ratios = [f"{ratio:.2f}" for ratio in (self.prefill_ratio, self.flop_ratio, self.whole_ratio)]
        return [self.methods, budget(self.keep), f"{self.tokens_per_layer:.0f}", *stages, *ratios]


def measure(model: Any, inputs: dict[str, Any], runs: Sequence[Run], repeats: int, console: Console) -> list[Row]:
    """Run every one of `runs`, the first of which is the unpruned model, `repeats` times in turns after a warm-up."""
    seen: list[list[Stats]] = [[] for _ in runs]
    with torch.inference_mode():
        for turn in track(range(repeats + 1), "measuring", console=console, transient=True):
            for run, stats in zip(runs, seen, strict=True):
                with wrap(model, configure(*run)) as handle:
                    model(**inputs, use_cache=True, logits_to_keep=1)
                    assert handle.stats is not None  # the prompt has a picture
                    if turn:
                        stats.append(handle.stats)
    rows: list[Row] = []
    for (methods, keep, _), stats in zip(runs, seen, strict=True):
        encoder, selection, prefill = (
            median(getattr(one.seconds, stage) for one in stats) for stage in ("encoder", "selection", "prefill")
        )
        base = rows[0] if rows else None
        rows.append(
            Row(
                methods=methods or "unpruned",
                keep=keep,
                tokens_per_layer=sum(stats[0].tokens_per_layer) / stats[0].shape.layers,
                encoder=encoder,
                selection=selection,
                prefill=prefill,
                prefill_ratio=base.prefill / prefill if base else 1.0,
                flop_ratio=stats[0].prefill_flops_full / stats[0].prefill_flops,
                whole_ratio=(base.encoder + base.selection + base.prefill) / (encoder + selection + prefill)
                if base
                else 1.0,
            )
        )
    return rows


def bench(settings: argparse.Namespace, console: Console) -> list[Row]:
    """Measure what the command line asks for, print it, and write it to `settings.out`.

    Raises:
        SpecError: a shape, a method or a number is out of the question.
        OSError: the folder cannot be written to.
    """
    if min(settings.repeats, settings.threads, settings.layers or 1) < 1:
        raise SpecError("--repeats, --threads and --layers must be at least 1.")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device cuda: torch finds none here.")
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, settings.dtype)
    model, inputs = SHAPES[settings.shape].build(settings.layers, settings.device, dtype)
    chosen = plan(model, split_specs(settings.methods), settings.keep)
    rows = measure(model, inputs, chosen.runs, settings.repeats, console)
    facts = bench_environment("prefill", settings.device)
    layers = model.config.get_text_config().num_hidden_layers
    notes = [f"{settings.shape} with {layers} LLM layers, {settings.dtype}, batch of 1.", *NOTES]
    notes += [f"left out: {what}: {reason}" for what, reason in chosen.left_out.items()]
    notes.append(", ".join(f"{name} {value}" for name, value in facts.items()))
    cells = [row.cells() for row in rows]
    record = {"environment": facts, "layers": layers, "dtype": settings.dtype, "rows": [asdict(row) for row in rows]}
    publish(settings.out, COLUMNS, cells, notes, record, console)
    return rows


def fractions(text: str) -> list[float]:
    """What `text` says, separated by commas."""
    return [float(part) for part in text.split(",")]


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcompress.evals.bench.prefill",
        description="Time one prompt by stage under several methods, and compare with the FLOPs these save.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("shape", choices=tuple(SHAPES), metavar="shape", help="which model, see below")
    add("--layers", type=int, help="cut the LLM to so many layers (all)")
    add("--methods", default=METHODS, help="specs, separated by commas, or stacks joined by + (%(default)s)")
    add("--keep", type=fractions, default=[0.4], help="shares per LLM layer, separated by commas (0.4)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model (%(default)s)")
    add("--repeats", type=int, default=9, help="measurements of each run (%(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--out", type=Path, default=Path("bench"), help="folder for results.json and table.md (%(default)s)")
    try:
        bench(parser.parse_args(given), Console())
    except (MMCompressError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
