"""All registered methods: a method is tested everywhere by being registered."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

from mmcompress.registry import METHODS
from mmcompress.spec import Spec


def variants() -> list[Spec]:
    """Every method with its defaults, and once with each other value of each of its choice options."""
    specs = []
    for name in METHODS.names():
        cls = METHODS.get(name)
        hints = typing.get_type_hints(cls)
        specs.append(Spec(name))
        for field in dataclasses.fields(cls):
            if typing.get_origin(hints[field.name]) is Literal:
                others = [value for value in typing.get_args(hints[field.name]) if value != field.default]
                specs += [Spec(name, None, {field.name: value}) for value in others]
    return specs
