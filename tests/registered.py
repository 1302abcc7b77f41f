"""All registered methods: a method is tested everywhere by being registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcompress.registry import METHODS, Stage
from mmcompress.spec import Spec

RATES = str(Path(__file__).with_name("diffrate_rates.json"))
# What must be given to methods that need an option.
REQUIRED: dict[str, dict[str, Any]] = {
    "cdpruner": {"relevance": "constant"},
    "diffrate": {"rates": RATES},
    "specpc": {"draft": "folder"},
}


def variants(stage: Stage) -> list[Spec]:
    """Every method of a stage with its defaults, and once with each other value of each of its choice options."""
    specs: list[Spec] = []
    for name in METHODS.names():
        cls: Any = METHODS.get(name)
        if cls.info.stage != stage:
            continue
        required = REQUIRED[name] if cls.info.requires else {}
        assert not cls.info.requires or set(cls.info.requires) & set(required)
        specs.append(Spec(name, None, required))
        for option, (_, *others) in METHODS.choices(name).items():
            specs += [
                Spec(name, None, {**required, option: value}) for value in others if required.get(option) != value
            ]
    return specs
