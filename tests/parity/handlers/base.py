"""What recomputes a kind of golden case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from parity.cases import Case


@dataclass(frozen=True)
class Kept:
    """Selected `indices` `[kept]` with the `scores` `[tokens]` that ranked them: near-ties may fall either way."""

    indices: Tensor
    scores: Tensor


Outputs = Mapping[str, Tensor | Kept]


@dataclass(frozen=True)
class Handler:
    """What recomputes the outputs of a kind of case.

    Args:
        method: registry name, or what is checked where it is no method.
        run: case -> outputs by tensor name.
        options: options of the method that all cases share, `compat` among them.
        unchecked: outputs that are not compared, each with the reason.
        tolerance: of floats, where the sidecar gives none, written as there.
    """

    method: str
    run: Callable[[Case], Outputs]
    options: Mapping[str, Any] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)
    tolerance: float | str | None = None
