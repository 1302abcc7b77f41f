"""What the command lines of benchmarks have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mmcompress.errors import SpecError, unknown_name
from mmcompress.evals.bench.shapes import SHAPES

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")


def add_options(parser: argparse.ArgumentParser, dtype_of: str | None = None) -> None:
    """The options that all benchmarks take; `dtype_of` says what has the data type, None that there is no choice."""
    add = parser.add_argument
    add("--device", choices=DEVICES, default="cpu", help="where to measure (%(default)s)")
    if dtype_of is not None:
        add("--dtype", choices=DTYPES, default="float32", help=f"of {dtype_of} (%(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--out", type=Path, default=Path("bench"), help="folder for results.json and table.md (%(default)s)")


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Which model of random weights."""
    parser.add_argument("shape", choices=tuple(SHAPES), metavar="shape", help=f"which model: {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, help="cut the LLM to so many layers (all)")


def require_positive(**numbers: int | float | None) -> None:
    """Refuse numbers that are not above 0; None stands for the default.

    Raises:
        SpecError: one is not.
    """
    for name, number in numbers.items():
        if number is not None and number <= 0:
            raise SpecError(f"--{name.replace('_', '-')} must be above 0, not {number}.")


def prepare(device: str, threads: int, out: Path) -> None:
    """Check and set what `add_options` has asked for, and make the folder.

    Raises:
        SpecError: there is no such device, or the number of threads is not positive.
        OSError: the folder cannot be made.
    """
    require_positive(threads=threads)
    if device not in DEVICES:
        raise unknown_name("--device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device cuda: torch finds none here.")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)


def numbers(text: str) -> list[int]:
    """What `text` says, separated by commas."""
    return [int(part) for part in text.split(",")]
