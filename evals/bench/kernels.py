"""How long every op takes, beside what memory and arithmetic allow, plain torch and plain loops."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmcompress import ops
from mmcompress.errors import MMCompressError, SpecError
from mmcompress.evals.bench.options import add_options, prepare, require_positive
from mmcompress.evals.bench.rows import publish
from mmcompress.evals.bench.timing import time_batch
from mmcompress.evals.environment import bench_environment

SWITCH = "MMCOMPRESS_KERNELS"
COLUMNS = ("op", "shape", "MB", "GFLOP", "triton", "roof", "torch", "roof", "x", "loop", "x", "SDPA")
NOTES = (
    "Times in ms. MB, GFLOP: what must be moved and computed at least. roof: the time that takes at the ceilings "
    "measured here, over the time taken. x: time over that of Triton, or of torch where Triton is not measured.",
    "loop: the ground truth in Python on the CPU. SDPA: attention of the same shape, of all keys.",
)
EPILOG = """\
try:
  python -m mmcompress.evals.bench.kernels
  python -m mmcompress.evals.bench.kernels --device cuda --dtype bfloat16
  python -m mmcompress.evals.bench.kernels --ops compact,kv_quant
"""


@dataclass(frozen=True)
class Work:
    """A call of an op.

    Args:
        op: its name.
        shape: what the table says of it.
        arguments: given to it.
        flops: that it cannot do without.
        moved: bytes that it cannot do without; all that goes in and comes out if it is None.
        attention: queries, keys and values of the attention that it is compared with.
    """

    op: str
    shape: str
    arguments: tuple[Any, ...]
    flops: float = 0.0
    moved: float | None = None
    attention: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Ceilings:
    """What was measured: bytes per second of a copy, read and written, and FLOPs per second of a matrix product."""

    bandwidth: float
    compute: float

    def seconds(self, moved: float, flops: float) -> float:
        """The least that this takes."""
        return max(moved / self.bandwidth, flops / self.compute)


class Maker:
    """Random tensors of one type on one device, and the sizes that calls are made of.

    Args:
        device: where.
        dtype: of floating-point tensors.
        full: whether shapes are those of 7B models, or small ones.
    """

    def __init__(self, device: str, dtype: torch.dtype, full: bool) -> None:
        self.device, self.dtype, self.full = device, dtype, full
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        noise = torch.randn(*shape, generator=self._generator, device=self.device, dtype=torch.float32)
        return noise.to(self.dtype)

    def pick(self, full: int, small: int) -> int:
        """One of two sizes."""
        return full if self.full else small

    def arange(self, *bounds: int) -> Tensor:
        """Integers."""
        return torch.arange(*bounds, device=self.device)


def _rows(make: Maker) -> Iterator[Work]:
    tiles, tokens = make.pick(5, 1), make.pick(577, 145)
    query, key = make(tiles, 16, tokens, 64), make(tiles, 16, tokens, 64)
    flops = 2.0 * tiles * 16 * tokens * 64
    yield Work("attention_rows", f"CLS {tiles}x16x{tokens}x64", (query[:, :, :1], key, 0.125), flops)
    keys = make.pick(2944, 256)
    query, key = make(1, 28, 32, 128), make(1, 4, keys, 128)
    arguments = (query, key, 0.09, make.arange(keys - 32, keys), None, "mean", "sum")
    yield Work("attention_rows", f"32 rows 28/4x{keys}x128", arguments, 2.0 * 28 * 32 * keys * 128)


def _sums(make: Maker) -> Iterator[Work]:
    tokens = make.pick(2880, 256)
    query, key, value = (make(1, 16, tokens, 64) for _ in range(3))
    lse, flops = ops.attention_lse(query, key, 0.125), 2.0 * 16 * tokens**2 * 64
    shape = f"16x{tokens}x64"
    yield Work("attention_colsum", shape, (query, key, 0.125, None, None, lse), flops, attention=(query, key, value))
    yield Work("attention_lse", shape, (query, key, 0.125), flops, attention=(query, key, value))
    last = make.arange(tokens)
    arguments = (query, key, 0.125, last, lse, torch.ones_like(lse))
    yield Work("weighted_colsum", f"{shape} causal", arguments, flops / 2, attention=(query, key, value))


def _selections(make: Maker) -> Iterator[Work]:
    tokens, dim, count = make.pick(2880, 144), make.pick(4096, 256), make.pick(320, 16)
    for images in (1, make.pick(32, 2)):
        batch, counts = [make(tokens, dim) for _ in range(images)], [count] * images
        pivots = [make.arange(1)[0]] * images
        shape, flops = f"{images}x{tokens}x{dim} -> {count}", 2.0 * images * tokens * dim * count
        yield Work("greedy_select", shape, (batch, counts, pivots, "k-center"), flops)
    yield Work("dpp_select", shape, (batch, [torch.ones_like(one[:, 0]) for one in batch], counts), flops)


def _merging(make: Maker) -> Iterator[Work]:
    images, tokens, dim = make.pick(16, 2), make.pick(576, 64), make.pick(1024, 64)
    flops = 2.0 * images * (tokens // 2) ** 2 * 64
    yield Work("bipartite_match", f"{images}x{tokens}x64", (make(images, tokens, 64),), flops)
    group = make.arange(tokens).repeat(images, 1) // 2
    yield Work("merge_tokens", f"{images}x{tokens}x{dim} -> 1/2", (make(images, tokens, dim), group, tokens // 2))


def _gathering(make: Maker) -> Iterator[Work]:
    batch, tokens, dim = make.pick(16, 2), make.pick(2944, 256), make.pick(4096, 256)
    states, index = make(batch, tokens, dim), make.arange(0, tokens, 9).repeat(batch, 1)
    moved = 2.0 * index.numel() * dim * states.element_size() + index.nbytes
    yield Work("compact", f"{batch}x{tokens}x{dim} -> 1/9", (states, index), moved=moved)


def _caches(make: Maker) -> Iterator[Work]:
    batch, entries = make.pick(16, 1), make.pick(16384, 256)
    key, value, query = make(batch, 8, entries, 128), make(batch, 8, entries, 128), make(batch, 32, 1, 128)
    shape, cache = f"{batch}x32/8x{entries}x128", key.nbytes + value.nbytes
    keys, values = ops.kv_quant(key, 4, 32, -2), ops.kv_quant(value, 4, 32, -1)
    flops = 4.0 * batch * 32 * entries * 128
    yield Work("kv_quant", f"{batch}x8x{entries}x128 4-bit", (key, 4, 32, -2))
    yield Work("kv_dequant", f"{batch}x8x{entries}x128 4-bit", (*keys, 4, -2))
    codes = ops.unpack_bits(keys[0], 4)
    yield Work("pack_bits", f"{batch}x8x{entries}x128 4-bit", (codes, 4))
    yield Work("unpack_bits", f"{batch}x8x{entries}x128 4-bit", (keys[0], 4))
    yield Work("page_bounds", f"{batch}x8x{entries}x128 / 16", (key, 16))
    attention = query, key, value
    packed = (query, keys, values, 4, 4, 0.09)
    yield Work("attention_decode_quant", f"{shape} 4-bit", packed, flops, attention=attention)
    pages = make.arange(0, entries // 16, 10).repeat(batch, 8, 1)
    chosen = (query, key, value, pages, 16, 0.09)
    yield Work("attention_decode_sparse", f"{shape} 1/10", chosen, flops / 10, cache / 10, attention)


GROUPS: tuple[Callable[[Maker], Iterator[Work]], ...] = (_rows, _sums, _selections, _merging, _gathering, _caches)


@dataclass(frozen=True)
class Row:
    """What a call takes, in milliseconds; None where it was not measured.

    Args:
        op: its name.
        shape: of the call.
        moved: bytes.
        flops: of the call.
        least: milliseconds at the ceilings.
        triton: by the kernel.
        torch: by the reference.
        loop: by the ground truth.
        sdpa: of an attention of the same shape.
    """

    op: str
    shape: str
    moved: float
    flops: float
    least: float
    triton: float | None
    torch: float | None
    loop: float | None
    sdpa: float | None

    def cells(self, limit: float) -> list[str]:
        """The row as text, in the order of `COLUMNS`."""
        best = self.torch if self.triton is None else self.triton

        def ratio(ms: float | None) -> str:
            return "" if ms is None or best is None else f"{ms / best:.2f}"

        return [
            self.op,
            self.shape,
            f"{self.moved / 1e6:.1f}",
            f"{self.flops / 1e9:.2f}",
            "not measured" if self.triton is None else f"{self.triton:.3f}",
            "" if self.triton is None else f"{self.least / self.triton:.0%}",
            f"> {limit:g} s" if self.torch is None else f"{self.torch:.3f}",
            "" if self.torch is None else f"{self.least / self.torch:.0%}",
            "" if self.triton is None else ratio(self.torch),
            f"> {limit:g} s" if self.loop is None else f"{self.loop:.1f}",
            ratio(self.loop),
            "" if self.sdpa is None else f"{self.sdpa:.3f}",
        ]


def ceilings(device: str, dtype: torch.dtype, limit: float) -> Ceilings:
    """Measure a copy that no cache holds, and a product of large matrices."""
    size, side = (2**30, 8192) if device == "cuda" else (2**26, 1024)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    copy, product = _time(lambda: target.copy_(source), device, limit), _time(lambda: matrix @ matrix, device, limit)
    if copy is None or product is None:
        raise SpecError(f"--limit {limit:g}: a copy or a product takes longer than that here.")
    return Ceilings(2000 * size / copy, 2000 * side**3 / product)


def measure(work: Work, limits: Ceilings, device: str, limit: float) -> Row:
    """Time one call in all its implementations."""
    op = getattr(ops, work.op)
    with chosen("reference"):
        reference = _time(lambda: op(*work.arguments), device, limit)
        outputs = op(*work.arguments) if work.moved is None and reference is not None else ()
    triton = None
    if device == "cuda":
        with chosen("triton"):
            triton = _time(lambda: op(*work.arguments), device, limit)
    with chosen("naive"):
        arguments = _map(work.arguments, Tensor.cpu)
        loop = _time(lambda: op(*arguments), "cpu", limit)
    sdpa = None
    if work.attention is not None:
        query, key, value = work.attention
        groups = query.shape[1] != key.shape[1]
        sdpa = _time(lambda: scaled_dot_product_attention(query, key, value, enable_gqa=groups), device, limit)
    moved = _bytes((work.arguments, outputs)) if work.moved is None else work.moved
    least = 1000 * limits.seconds(moved, work.flops)
    return Row(work.op, work.shape, moved, work.flops, least, triton, reference, loop, sdpa)


@contextmanager
def chosen(mode: str) -> Iterator[None]:
    """Let ops run in one of their implementations."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = mode
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def _time(call: Callable[[], Any], device: str, limit: float) -> float | None:
    """Milliseconds of one; on a GPU of many in a row, so that waiting for it does not count."""
    return time_batch(lambda batch: [one() for one in batch], [call] * (20 if device == "cuda" else 1), limit)[0]


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_map(part, function) for part in value) if isinstance(value, list | tuple) else value


def _bytes(value: Any) -> float:
    if isinstance(value, Tensor):
        return float(value.nbytes)
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0.0


def bench(settings: argparse.Namespace, console: Console) -> list[Row]:
    """Measure what the command line asks for, print it, and write it to `settings.out`.

    Raises:
        SpecError: an op or a number is out of the question.
        OSError: the folder cannot be written to.
    """
    wanted = settings.ops.split(",") if settings.ops else ops.__all__
    if unknown := sorted(set(wanted) - set(ops.__all__)):
        raise SpecError(f"--ops: there is no {', '.join(unknown)}; there are {', '.join(ops.__all__)}.")
    require_positive(limit=settings.limit)
    prepare(settings.device, settings.threads, settings.out)
    device, dtype = settings.device, getattr(torch, settings.dtype)
    full = device == "cuda" if settings.sizes is None else settings.sizes == "full"
    make = Maker(device, dtype, full)
    with torch.inference_mode():
        limits = ceilings(device, dtype, settings.limit)
        rows = [
            measure(work, limits, device, settings.limit)
            for group in track(GROUPS, "measuring", console=console, transient=True)
            for work in group(make)
            if work.op in wanted
        ]
    facts: Mapping[str, Any] = bench_environment("kernels", device)
    measured = f"{limits.bandwidth / 1e9:.1f} GB/s, {limits.compute / 1e12:.2f} TFLOP/s in {settings.dtype}"
    notes = [
        f"ceilings measured here: {measured}.",
        *NOTES,
        ", ".join(f"{name} {value}" for name, value in facts.items()),
    ]
    cells = [row.cells(settings.limit) for row in rows]
    record = {
        "environment": facts,
        "dtype": settings.dtype,
        "ceilings": vars(limits),
        "rows": [vars(row) for row in rows],
    }
    publish(settings.out, COLUMNS, cells, notes, record, console)
    return rows


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcompress.evals.bench.kernels",
        description="Time every op as Triton kernel, in plain torch and as a plain loop, beside the ceilings.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sizes", choices=("small", "full"), help="shapes of 7B models, or small ones (full on a GPU)")
    add("--ops", help="which, separated by commas (all)")
    add("--limit", type=float, default=20, help="give up where a call takes longer, in seconds (%(default)s)")
    add_options(parser, "inputs")
    try:
        bench(parser.parse_args(given), Console())
    except (MMCompressError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
