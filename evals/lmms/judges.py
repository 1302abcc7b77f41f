"""Which metrics of an lmms-eval task are computed here: those that need no judge, no server and no file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from lmms_eval.api.registry import DEFAULT_METRIC_REGISTRY

from mmcompress.errors import UnsupportedError

_ABROAD = frozenset({"requests", "openai", "OpenAI", "AzureOpenAI", "anthropic", "get_server", "ServerConfig"})
"""What functions name that ask a service."""


def main_metric(name: str, config: Mapping[str, Any]) -> str:
    """The first metric of a task that is computed here.

    Raises:
        UnsupportedError: there is none; with the reason for each.
    """
    listed = config.get("metric_list") or [{"metric": metric} for metric in DEFAULT_METRIC_REGISTRY["generate_until"]]
    reasons = {}
    for metric in listed:
        label = metric["metric"] if isinstance(metric["metric"], str) else metric["metric"].__name__
        reason = _reason(label, metric, config.get("process_results"))
        if reason is None:
            return label
        reasons[label] = reason
    refused = "; ".join(f"{label} {reason}" for label, reason in reasons.items())
    raise UnsupportedError(f"task {name} has no metric that is computed here: {refused}.")


def _reason(label: str, metric: Mapping[str, Any], process_results: Any) -> str | None:
    aggregate = metric.get("aggregation")
    if "submission" in label or label == "bypass":
        return "is a file for a server to score"
    if any(word in label.lower() for word in ("gpt", "judge", "llm")) or _asks(aggregate) or _asks(process_results):
        return "needs a judge"
    if callable(aggregate) and "args" in inspect.signature(aggregate).parameters:
        return "writes files where lmms_eval was told to"
    if metric.get("higher_is_better") is False:
        return "is better when it is lower, so that no share of it is retained"
    return None


def _asks(function: Any) -> bool:
    """Whether a function reaches code that asks a service."""
    waiting, seen = [function], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or not isinstance(part, FunctionType):
            continue
        seen.add(id(part))
        names = set(_names(part.__code__))
        if names & _ABROAD:
            return True
        for name in names & set(part.__globals__):
            waiting += _functions(part.__globals__[name])
    return False


def _names(code: CodeType) -> Iterator[str]:
    """All that a function names, also in functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _functions(value: Any) -> list[Callable[..., Any]]:
    """A function itself, or those of a class or of the class of an object."""
    if isinstance(value, FunctionType):
        return [value]
    return [part for part in vars(value if isinstance(value, type) else type(value)).values() if callable(part)]
