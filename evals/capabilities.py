"""The capability matrix: which method works on which model family, as a table for terminals or in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rich.box import SIMPLE
from rich.table import Table

from mmcompress.integrations.hf.capability import Capability, matrix
from mmcompress.integrations.vllm.capability import column
from mmcompress.registry import METHODS

Matrix = Mapping[str, Mapping[str, Capability]]

INTRODUCTION = """# Which method works where

Made by `mmcompress list --markdown` from the registry, on models of every family's default size. "yes": with its
defaults; an option: with that option only, for the reason given; "no": for the reason given. The last column is about
vLLM on LLaVA-1.5; on LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL and Qwen3-VL it can do the same wherever
transformers can, with the options of both columns.
"""


def measure(names: list[str]) -> dict[str, dict[str, Capability]]:
    """The matrix of transformers' families with a last column for vLLM."""
    found = matrix(names)
    for name, capability in column(names).items():
        found[name]["in vLLM"] = capability
    return found


def rows(found: Matrix) -> tuple[list[list[str]], list[str]]:
    """The cells, a row per method beginning with its name and stage, and the numbered reasons they refer to."""
    reasons: list[str] = []

    def cell(capability: Capability) -> str:
        if not capability.reason:
            return "yes"
        reason = re.sub(r"\b\w+Model\b", "the model", capability.reason.removeprefix(f"{capability.spec.name} "))
        if reason not in reasons:
            reasons.append(reason)
        options = ", ".join(f"{name}={value}" for name, value in capability.spec.options.items())
        return f"{'no' if capability.needs is None else options} [{reasons.index(reason) + 1}]"

    cells = [
        [name, METHODS.get(name).info.stage, *(cell(capability) for capability in by_family.values())]  # type: ignore[attr-defined]
        for name, by_family in found.items()
    ]
    return cells, [f"[{number}] it {reason}" for number, reason in enumerate(reasons, 1)]


def table(found: Matrix) -> tuple[Table, list[str]]:
    """The matrix for a terminal, and its reasons."""
    cells, reasons = rows(found)
    drawn = Table(*_headings(found), box=SIMPLE, padding=0)
    for row in cells:
        drawn.add_row(*(text.replace("[", r"\[") for text in row))
    return drawn, reasons


def markdown(found: Matrix) -> str:
    """The matrix as a page."""
    cells, reasons = rows(found)
    headings = _headings(found)
    lines = [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *cells)]
    return "\n".join([INTRODUCTION, *lines, "", *(f"{reason}  " for reason in reasons)]).rstrip() + "\n"


def _headings(found: Matrix) -> list[str]:
    return ["method", "stage", *next(iter(found.values()))]
