"""A benchmark by its name: `python -m mmcompress.evals.bench kernels --help`."""

from __future__ import annotations

import runpy
import sys

BENCHMARKS = ("decode", "kernels", "selection", "serving")

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in BENCHMARKS:
        sys.exit(f"usage: python -m mmcompress.evals.bench {{{','.join(BENCHMARKS)}}} ...")
    runpy.run_module(f"{__package__}.{sys.argv.pop(1)}", run_name="__main__")
