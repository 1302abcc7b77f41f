"""All registered methods: a method is tested everywhere by being registered."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal

from mmcompress.registry import METHODS, Stage
from mmcompress.spec import Spec

RATES = str(Path(__file__).with_name("diffrate_rates.json"))
# What must be given to methods that need an option.
REQUIRED: dict[str, dict[str, Any]] = {"diffrate": {"rates": RATES}}


def variants(stage: Stage) -> list[Spec]:
    """Every method of a stage with its defaults, and once with each other value of each of its choice options."""
    specs = []
    for name in METHODS.names():
        cls: Any = METHODS.get(name)
        if cls.info.stage != stage:
            continue
        hints = typing.get_type_hints(cls)
        required = REQUIRED[name] if cls.info.requires else {}
        assert not cls.info.requires or cls.info.requires in required
        specs.append(Spec(name, None, required))
        for field in dataclasses.fields(cls):
            if typing.get_origin(hints[field.name]) is Literal:
                others = [value for value in typing.get_args(hints[field.name]) if value != field.default]
                specs += [Spec(name, None, {**required, field.name: value}) for value in others]
    return specs
