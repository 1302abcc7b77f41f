"""What recomputes a kind of golden case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from parity.cases import Case

NOT_BUILT = "*"
"""Where this is unchecked, all of a case is: it belongs to something that does not exist here."""


@dataclass(frozen=True)
class Kept:
    """What was selected by score: near-ties may fall either way.

    Args:
        indices: what every head keeps, ascending; heads may keep different numbers.
        scores: `[heads, tokens]`, what ranked them; infinite where there was no choice.
    """

    indices: Sequence[Tensor]
    scores: Tensor


Outputs = Mapping[str, Tensor | Kept]


@dataclass(frozen=True)
class Handler:
    """What recomputes the outputs of a kind of case.

    Args:
        method: registry name, or what is checked where it is no method.
        run: case -> outputs by tensor name.
        options: options of the method that all cases share, `compat` among them.
        unchecked: patterns of outputs that are not compared, each with the reason.
        tolerance: of floats, where the sidecar gives none, written as there.
        inputs: patterns of what is given, where the sidecar does not say so.
        others: further methods whose outputs the cases hold.
    """

    method: str
    run: Callable[[Case], Outputs]
    options: Mapping[str, Any] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)
    tolerance: float | str | Mapping[str, float | str] | None = None
    inputs: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def methods(self) -> frozenset[str]:
        """All methods whose outputs the cases hold."""
        return frozenset({self.method, *self.others})


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of `patterns` is for the tensor `name`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def not_built(what: str) -> Handler:
    """Cases that no code here is to reproduce yet."""
    return Handler(what, lambda case: {}, unchecked={NOT_BUILT: f"{what} is not built"})
