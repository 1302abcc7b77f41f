"""How long methods take to select tokens, against a plain loop over the images where there is one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mmcompress.budget import Budget
from mmcompress.errors import MMCompressError, SpecError
from mmcompress.evals.bench.items import CLIP, layout, make_item
from mmcompress.evals.bench.options import add_options, numbers, prepare, require_positive
from mmcompress.evals.bench.plain import PLAIN, plain_loop
from mmcompress.evals.bench.rows import COLUMNS, NOTE, Row, publish
from mmcompress.evals.bench.timing import time_batch
from mmcompress.evals.environment import bench_environment
from mmcompress.method import VisualMethod
from mmcompress.registry import METHODS
from mmcompress.spec import Spec, split_specs
from mmcompress.types import Selection, VisualItem

EPILOG = """\
Items are random, with the widths of LLaVA-1.5-7B. A square number of tokens is one plane, five times a square a
thumbnail with 2x2 crops; video methods get a clip of as many tokens. Other work on the machine spoils the times.

try:
  python -m mmcompress.evals.bench.selection
  python -m mmcompress.evals.bench.selection --methods "divprune,todre(objective=k-center)" --tokens 576 --keep 64
"""


def default_specs() -> list[str]:
    """What has a plain loop, and every other built-in pre-LLM method by its name."""
    known = {Spec.parse(text).name for text in PLAIN} | set(METHODS.plugins())
    cards = [METHODS.get(name).info for name in METHODS.names() if name not in known]  # type: ignore[attr-defined]
    return sorted([*PLAIN, *(card.name for card in cards if card.stage == "pre_llm")])


def build(text: str) -> tuple[Spec, VisualMethod, str]:
    """A spec, its method, and why it is left out ("" if it is not).

    Raises:
        SpecError: there is no such method, or it does not act before the LLM.
    """
    spec = Spec.parse(text)
    method = METHODS.build(spec.name, spec.options)
    if method.info.stage != "pre_llm":
        raise SpecError(f"{spec.name} acts in stage {method.info.stage!r}; methods of stage 'pre_llm' are measured.")
    if spec.keep is not None:
        raise SpecError(f"{spec}: the budget is the same for all methods, give --keep instead.")
    if lacking := method.info.lacking(method):
        return spec, method, f"needs {lacking}"
    needs = method.needs(CLIP)
    if needs.draft is not None:
        return spec, method, "reads what a draft model attends to"
    return spec, method, "reads the text tower of a CLIP" if needs.text_tower else ""


def measure(spec: Spec, method: VisualMethod, tokens: int, images: int, keep: Budget, limit: float, device: str) -> Row:
    """Time a method on a batch of items, and what it is compared with on the same."""
    needs, loop = method.needs(CLIP), plain_loop(method)
    modality: Any = "video" if "video" in method.info.family else "image"
    items = [make_item(tokens, needs, modality, seed, device) for seed in range(images)]

    def one_by_one(batch: Sequence[VisualItem]) -> list[Selection]:
        if loop is None:
            return [method.compress([item], keep, needs)[0] for item in batch]
        return [Selection(loop(item, keep.tokens(len(item)), needs).sort().values) for item in batch]

    ms, found = time_batch(lambda batch: method.compress(batch, keep, needs), items, limit)
    against_ms, expected = time_batch(one_by_one, items, limit)
    equal = all(map(_same, found, expected)) if found and expected else None
    kept = len(found[0]) if found else None
    return Row(str(spec), tokens, items[0].label, kept, ms, "plain loop" if loop else "one by one", against_ms, equal)


def _same(one: Selection, other: Selection) -> bool:
    if one.weight is None or other.weight is None:
        return one.weight is other.weight and torch.equal(one.anchor, other.anchor)
    return torch.equal(one.anchor, other.anchor) and torch.equal(one.weight, other.weight)


def bench(settings: argparse.Namespace, console: Console) -> list[Row]:
    """Measure what the command line asks for, print it, and write it to `settings.out`.

    Raises:
        SpecError: a method, a size or a number is out of the question.
        OSError: the folder cannot be written to.
    """
    keep, limit, device = Budget(settings.keep), settings.limit, settings.device
    require_positive(images=settings.images, limit=limit)
    for tokens in settings.tokens:
        layout(tokens, "image")  # before the long work begins
    texts = split_specs(settings.methods) if settings.methods else default_specs()
    built = [build(text) for text in texts]
    left_out = {str(spec): reason for spec, _, reason in built if reason}
    work = [(spec, method, tokens) for spec, method, reason in built if not reason for tokens in settings.tokens]
    prepare(device, settings.threads, settings.out)
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, torch.inference_mode():
        task = progress.add_task("", total=len(work))
        for spec, method, tokens in work:
            progress.update(task, description=f"{spec} {tokens}")
            rows.append(measure(spec, method, tokens, settings.images, keep, limit, device))
            progress.advance(task)

    facts = bench_environment("selection", device)
    notes = [NOTE, *(f"left out: {name}, {reason}." for name, reason in left_out.items())]
    notes.append(f"batches of {settings.images}, keep {keep}, " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    cells = [row.cells(limit) for row in rows]
    record = {
        "environment": facts,
        "images": settings.images,
        "keep": keep.keep,
        "limit": limit,
        "left_out": left_out,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    publish(settings.out, COLUMNS, cells, notes, record, console)
    return rows


def number(text: str) -> int | float:
    """What `text` says."""
    return int(text) if text.isdecimal() else float(text)


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line; a selection that differs from what it is compared with is an error."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcompress.evals.bench.selection",
        description="Time the selections of pre-LLM methods on batches of items, and check the greedy ones.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", help="specs, separated by commas (every method that needs no file)")
    add("--tokens", type=numbers, default="576,2880,16384", help="sizes of items (%(default)s)")
    add("--images", type=int, default=4, help="items of a batch (%(default)s)")
    add("--keep", type=number, default=0.1, help="what stays of an item: a fraction, or a count (%(default)s)")
    add("--limit", type=float, default=60, help="give up where one item takes longer, in seconds (%(default)s)")
    add_options(parser)
    try:
        rows = bench(parser.parse_args(given), Console())
    except (MMCompressError, OSError) as error:
        parser.error(str(error))
    wrong = [f"{row.method} at {row.tokens} tokens" for row in rows if row.equal is False]
    if wrong:
        sys.exit(f"error: selected otherwise than what they are compared with: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
