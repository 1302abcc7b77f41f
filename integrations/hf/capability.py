"""Which method works on which model family, told by models without weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mmcompress.budget import Budget
from mmcompress.errors import MMCompressError
from mmcompress.integrations.hf.families import FAMILIES
from mmcompress.integrations.hf.handle import wrap
from mmcompress.llm_method import LLMNeeds
from mmcompress.registry import METHODS, POLICIES
from mmcompress.spec import Spec
from mmcompress.types import Needs


@dataclasses.dataclass(frozen=True)
class Capability:
    """What comes of a method on a family.

    Args:
        spec: the method with its defaults, or with the fewest other options that make it work.
        needs: what it reads of a vision encoder of the family's default size; None if it does not work.
        llm_needs: what it reads inside the LLM, likewise; None if it does not act there.
        reason: why its defaults do not work; "" if they do.
    """

    spec: Spec
    needs: Needs | None
    reason: str = ""
    llm_needs: LLMNeeds | None = None


def models() -> Iterator[tuple[str, Any]]:
    """Every family with a model of its default size, without weights."""
    for family in FAMILIES:
        config = AutoConfig.for_model(family)
        config.get_text_config().pad_token_id = None
        with torch.device("meta"):
            yield family, AutoModelForImageTextToText.from_config(config)


def capability(model: Any, spec: Spec) -> Capability:
    """What comes of `spec` on `model`."""
    card: Any = METHODS.get(spec.name)
    try:
        with wrap(model, Spec(spec.name, None, spec.options), keep=1.0 if card.info.takes_keep else None) as handle:
            inside = None if handle.llm_method is None else handle.llm_method.needs(handle.llm)
            return Capability(spec, handle.needs, llm_needs=inside)
    except MMCompressError as error:
        return Capability(spec, None, str(error))


def policy_capability(model: Any, name: str) -> Capability:
    """What comes of a KV policy with its defaults on `model`."""
    try:
        with wrap(model, kv=policy_spec(name)):
            return Capability(Spec(name), Needs())
    except MMCompressError as error:
        return Capability(Spec(name), None, str(error))


def policy_spec(name: str) -> Spec:
    """A KV policy with its defaults, and half of the entries as its budget where it has one."""
    card: Any = POLICIES.get(name)
    return Spec(name, Budget(0.5) if card.info.takes_keep else None)


def matrix(names: list[str]) -> dict[str, dict[str, Capability]]:
    """Method -> family -> capability; where the defaults are refused, with the fewest options that are not."""
    found: dict[str, dict[str, Capability]] = {name: {} for name in names}
    for family, model in models():
        for name in names:
            found[name][family] = workable(model, name)
    return found


def workable(model: Any, name: str) -> Capability:
    """What comes of a method on `model` with its defaults; where these are refused, with the fewest that are not."""
    return with_fewest_options(lambda spec: capability(model, spec), name)


def with_fewest_options(judge: Callable[[Spec], Capability], name: str) -> Capability:
    """What `judge` says of a method with its defaults; where it refuses these, with the fewest that it does not."""
    default = judge(Spec(name))
    tried = (judge(choice) for choice in _choices(name)) if default.needs is None else ()
    working = next((other for other in tried if other.needs is not None), None)
    return default if working is None else dataclasses.replace(working, reason=default.reason)


def _choices(name: str) -> Iterator[Spec]:
    """The method with other values of its choice options, fewest first; `compat` never makes a method possible."""
    others = [
        [(option, value) for value in values]
        for option, (_, *values) in METHODS.choices(name).items()
        if option != "compat"
    ]
    for count in range(1, len(others) + 1):
        for changed in itertools.combinations(others, count):
            for values in itertools.product(*changed):
                yield Spec(name, None, dict(values))
