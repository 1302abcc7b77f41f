"""The capability matrix: which method and KV policy works on which model family, for terminals or in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rich.box import SIMPLE
from rich.table import Table

from mmcompress.integrations.hf.capability import Capability, matrix, models, policy_capability
from mmcompress.integrations.vllm.capability import column, policy_column
from mmcompress.registry import METHODS, POLICIES, Registry

Matrix = Mapping[str, Mapping[str, Capability]]

IN_VLLM = "in vLLM"

INTRODUCTION = """# Which method works where

Made by `mmcompress list --markdown` from the registry, on models of every family's default size. "yes": with its
defaults; an option: with that option only, for the reason given; "no": for the reason given. The last column is about
vLLM on LLaVA-1.5; on LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL and Qwen3-VL it can do the same wherever
transformers can, with the options of both columns, except for `m3`, which it has on LLaVA-1.5 alone.
"""

OF_POLICIES = """## KV policies

The same of KV policies, with their defaults and half of the entries as their budget.
"""


def measure(names: list[str]) -> dict[str, dict[str, Capability]]:
    """The matrix of transformers' families with a last column for vLLM."""
    found = matrix(names)
    for name, capability in column(names).items():
        found[name][IN_VLLM] = capability
    return found


def measure_policies(names: list[str]) -> dict[str, dict[str, Capability]]:
    """The same matrix of KV policies."""
    found: dict[str, dict[str, Capability]] = {name: {} for name in names}
    for family, model in models():
        for name in names:
            found[name][family] = policy_capability(model, name)
    for name, capability in policy_column(names).items():
        found[name][IN_VLLM] = capability
    return found


def rows(found: Matrix, registry: Registry = METHODS) -> tuple[list[list[str]], list[str]]:
    """The cells, a row per method or policy with its name and stage first, and the numbered reasons they refer to."""
    reasons: list[str] = []

    def cell(capability: Capability) -> str:
        if not capability.reason:
            return "yes"
        reason = capability.reason.removeprefix("KV policy ").removeprefix(f"{capability.spec.name} ")
        reason = re.sub(r"\b\w+Model\b", "the model", reason)
        if reason not in reasons:
            reasons.append(reason)
        options = ", ".join(f"{name}={value}" for name, value in capability.spec.options.items())
        return f"{'no' if capability.needs is None else options} [{reasons.index(reason) + 1}]"

    cells = [
        [name, registry.get(name).info.stage, *(cell(capability) for capability in by_family.values())]  # type: ignore[attr-defined]
        for name, by_family in found.items()
    ]
    return cells, [f"[{number}] it {reason}" for number, reason in enumerate(reasons, 1)]


def table(found: Matrix, registry: Registry = METHODS) -> tuple[Table, list[str]]:
    """The matrix for a terminal, and its reasons."""
    cells, reasons = rows(found, registry)
    drawn = Table(*_headings(found, registry), box=SIMPLE, padding=0)
    for row in cells:
        drawn.add_row(*(text.replace("[", r"\[") for text in row))
    return drawn, reasons


def markdown(found: Matrix, policies: Matrix) -> str:
    """The matrices of methods and KV policies as a page."""
    parts = [INTRODUCTION, *_lines(found, METHODS), "", OF_POLICIES, *_lines(policies, POLICIES)]
    return "\n".join(parts).rstrip() + "\n"


def _lines(found: Matrix, registry: Registry) -> list[str]:
    cells, reasons = rows(found, registry)
    headings = _headings(found, registry)
    lines = [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *cells)]
    return [*lines, "", *(f"{reason}  " for reason in reasons)]


def _headings(found: Matrix, registry: Registry) -> list[str]:
    return [registry.kind, "stage", *next(iter(found.values()))]
