"""How long a step of decoding takes against the length of the cache: whole, evicted, quantised, read in part."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmcompress.accounting import Stats
from mmcompress.errors import MMCompressError, SpecError
from mmcompress.evals.bench.memory import bytes_held
from mmcompress.evals.bench.options import add_options, add_shape, numbers, prepare, require_positive
from mmcompress.evals.bench.rows import publish
from mmcompress.evals.bench.shapes import SHAPES, repeated
from mmcompress.evals.bench.timing import spread, wait
from mmcompress.evals.environment import bench_environment
from mmcompress.integrations.hf import wrap
from mmcompress.spec import split_specs

KV = "snapkv(keep=0.1),streamingllm(keep=0.1),h2o(keep=0.1),int8,kivi(bits=4),quest(keep=0.1),tidaldecode(keep=0.1)"
COLUMNS = ("methods", "batch", "tokens", "KV MB", "step ms", "spread ms", "step x", "limit x")
NOTES = (
    "tokens: of each row's prompt. KV: what the cache holds behind the last step. step: one token for every row, the "
    "median over steps; spread: half of what lies between the quartiles. x: time without a policy over that with it, "
    "steps taken in turns in one process; limit: the same for the bytes of weights and cache that a step must read.",
    "Weights are random: times do not depend on what they say.",
)
EPILOG = """try:
  python -m mmcompress.evals.bench.decode micro-llava-336 --lengths 1024,4096
  python -m mmcompress.evals.bench.decode llava-1.5-7b --layers 2 --dtype bfloat16 --threads 1
  python -m mmcompress.evals.bench.decode llava-1.5-7b --device cuda --dtype bfloat16 --batch 1,64
"""


@dataclass(frozen=True)
class Row:
    """One policy at one batch size and length; seconds per step."""

    policy: str
    batch: int
    tokens: int
    kv_bytes: int
    step: float
    spread: float
    ratio: float
    limit: float

    def cells(self) -> list[str]:
        """The row as text, in the order of `COLUMNS`."""
        times = [f"{1000 * seconds:.2f}" for seconds in (self.step, self.spread)]
        held = f"{self.kv_bytes / 1e6:.2f}"
        return [self.policy, str(self.batch), str(self.tokens), held, *times, f"{self.ratio:.2f}", f"{self.limit:.2f}"]


def measure(model: Any, inputs: dict[str, Tensor], policies: Sequence[str | None], steps: int) -> list[Row]:
    """Read one prompt under each of `policies`, the first of which is none, then time steps in turns."""
    batch, tokens = inputs["input_ids"].shape
    caches: list[Any] = []
    read: list[int] = []
    seconds: list[list[float]] = [[] for _ in policies]

    def step(cache: Any) -> None:
        mask = torch.ones(batch, int(cache.get_seq_length()) + 1, dtype=torch.long, device=model.device)
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache, attention_mask=mask)
        wait()

    with torch.inference_mode():
        for policy in policies:
            with nullcontext() if policy is None else wrap(model, kv=policy) as handle:
                caches.append(model(**inputs, use_cache=True, logits_to_keep=1).past_key_values)
                step(caches[-1])
                read.append(bytes_read(None if handle is None else handle.stats, caches[-1]))
        for _ in track(range(steps), "measuring", transient=True):
            for policy, cache, taken in zip(policies, caches, seconds, strict=True):
                with nullcontext() if policy is None else wrap(model, kv=policy):
                    start = perf_counter()
                    step(cache)
                    taken.append(perf_counter() - start)
    weights = sum(part.nbytes for part in model.base_model.get_decoder().layers.parameters())
    rows = []
    for number, policy in enumerate(policies):
        middle, around = spread(seconds[number])
        rows.append(
            Row(
                policy=policy or "none",
                batch=batch,
                tokens=tokens,
                kv_bytes=bytes_held(caches[number]),
                step=middle,
                spread=around,
                ratio=median(seconds[0]) / middle,
                limit=(weights + read[0]) / (weights + read[number]),
            )
        )
    return rows


def bytes_read(stats: Stats | None, cache: Any) -> int:
    """What attention needed of that in the last step."""
    if stats is None or stats.kv_read is None:
        return bytes_held(cache)
    key = cache.layers[0].keys
    return sum(stats.kv_read) * 2 * key.shape[-1] * key.itemsize


def lengthen(inputs: dict[str, Tensor], tokens: int, batch: int) -> dict[str, Tensor]:
    """`batch` times a prompt of one row, text added until it has `tokens`.

    Raises:
        SpecError: it is longer already.
    """
    ids = inputs["input_ids"]
    if ids.shape[1] > tokens:
        raise SpecError(f"a length of {tokens} is less than the prompt with one picture has: {ids.shape[1]}.")
    text = ids[:, -1:].expand(-1, tokens - ids.shape[1])
    longer = {"input_ids": torch.cat([ids, text], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(text)], dim=1)
    return repeated({**inputs, **longer}, batch)


def bench(settings: argparse.Namespace, console: Console) -> list[Row]:
    """Measure what the command line asks for, print it, and write it to `settings.out`.

    Raises:
        MMCompressError: a length, a policy or a number is out of the question.
        OSError: the folder cannot be written to.
    """
    require_positive(batch=min(settings.batch), layers=settings.layers)
    if settings.steps < 2:
        raise SpecError(f"--steps must be at least 2, not {settings.steps}.")
    prepare(settings.device, settings.threads, settings.out)
    dtype = getattr(torch, settings.dtype)
    model, inputs = SHAPES[settings.shape].build(settings.layers, settings.device, dtype)
    policies = [None, *split_specs(settings.kv)]
    for policy in policies[1:]:
        wrap(model, kv=policy).unwrap()
    rows = [
        row
        for batch in settings.batch
        for length in settings.lengths
        for row in measure(model, lengthen(inputs, length, batch), policies, settings.steps)
    ]
    facts = bench_environment("decode", settings.device)
    layers = model.config.get_text_config().num_hidden_layers
    notes = [f"{settings.shape} with {layers} LLM layers, {settings.dtype}.", *NOTES]
    notes.append(", ".join(f"{name} {value}" for name, value in facts.items()))
    cells = [row.cells() for row in rows]
    record = {"environment": facts, "layers": layers, "dtype": settings.dtype, "rows": [asdict(row) for row in rows]}
    publish(settings.out, COLUMNS, cells, notes, record, console)
    return rows


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcompress.evals.bench.decode",
        description="Time steps of decoding behind prompts of several lengths under KV-cache policies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_shape(parser)
    add("--kv", default=KV, help="policies, separated by commas (%(default)s)")
    add("--lengths", type=numbers, default="768,2048", help="tokens of the prompt (%(default)s)")
    add("--batch", type=numbers, default="1", help="rows (%(default)s)")
    add("--steps", type=int, default=31, help="measured steps of each policy, at least 2 (%(default)s)")
    add_options(parser, "the model")
    try:
        bench(parser.parse_args(given), Console())
    except (MMCompressError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
