"""What results of evaluations have in common whenever and wherever they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcompress.evals import record


def numbers(out: Path) -> Any:
    """The result without time, place and command."""
    result = record.load(out)
    del result["environment"]
    for run in result["runs"]:
        for suite in run["suites"].values():
            del suite["cost"]["seconds"]
    return result
