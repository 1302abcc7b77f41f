"""Names -> classes: built-in modules and third-party entry points, imported only when named."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

from mmcompress.errors import SpecError, unknown_name

T = TypeVar("T", bound=type)
Stage = Literal["encoder", "projector", "pre_llm", "in_llm", "kv"]


@dataclass(frozen=True)
class MethodInfo:
    """The card of a method: what it is called, where it acts, where it comes from.

    Args:
        name: registry name.
        summary: one line.
        family: class of method, in the field's terms.
        stage: where its map is applied.
        paper: source, for citation ("" for baselines).
        licence: licence of the authors' code ("" if there is none to speak of).
        requires: options one of which must be given because no default would do.
        takes_keep: whether `keep` decides how many tokens are left; False where a rule of its own does.
    """

    name: str
    summary: str
    family: str
    stage: Stage = "pre_llm"
    paper: str = ""
    licence: str = ""
    requires: tuple[str, ...] = ()
    takes_keep: bool = True

    def lacking(self, configured: Any) -> str:
        """What must still be given to the `configured` method, in words; "" if nothing."""
        if any(getattr(configured, option) is not None for option in self.requires):
            return ""
        return " or ".join(f"{option}=" for option in self.requires)


class Registry:
    """One kind of plug-in. A built-in named `vtc-cls` lives in module `vtc_cls` of the built-in package."""

    def __init__(self, kind: str, package: str | None, group: str) -> None:
        self.kind = kind
        self._package = package
        self._group = group
        self._classes: dict[str, type] = {}

    @cached_property
    def _builtin(self) -> dict[str, str]:
        if self._package is None:
            return {}
        path = importlib.import_module(self._package).__path__
        modules = (module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))
        return {module.replace("_", "-"): f"{self._package}.{module}" for module in modules}

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        found = {}
        for entry in entry_points(group=self._group):
            if entry.name in self._builtin:
                warnings.warn(f"{entry.value} offers the built-in {self.kind} {entry.name!r}; ignored.", stacklevel=2)
            else:
                found[entry.name] = entry
        return found

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported."""
        return sorted({*self._builtin, *self._entry_points, *self._classes})

    def plugins(self) -> dict[str, str]:
        """Third-party names and where their code is; nothing is imported."""
        return {name: entry.value for name, entry in self._entry_points.items()}

    def register(self, name: str, **card: Any) -> Callable[[T], T]:
        """Class decorator: make a dataclass known under `name`, with its `MethodInfo` fields.

        Raises:
            SpecError: the name is malformed or taken by another class, or the class is no dataclass.
        """
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            raise SpecError(f"{self.kind} {name!r}: a name is lower-case words joined by hyphens.")

        def decorate(cls: T) -> T:
            if not dataclasses.is_dataclass(cls):
                raise SpecError(f"{self.kind} {name!r}: put @dataclass(frozen=True) below @register on {cls.__name__}.")
            known = self._classes.get(name, cls)
            same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
            if not same or self._builtin.get(name, cls.__module__) != cls.__module__:
                raise SpecError(f"{self.kind} {name!r} is registered twice.")
            cls.info = MethodInfo(name=name, **card)  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return decorate

    def get(self, name: str) -> type:
        """The class behind `name`.

        Raises:
            SpecError: the name is unknown.
        """
        if name not in self._classes:
            if name in self._builtin:
                importlib.import_module(self._builtin[name])
            elif name in self._entry_points:
                entry = self._entry_points[name]
                try:
                    entry.load()
                except Exception as error:  # third-party code fails in its own ways
                    raise SpecError(f"{self.kind} {name!r}: {entry.value} cannot be loaded: {error}") from error
                if name not in self._classes:
                    raise SpecError(f"{entry.value} was loaded, but registered no {self.kind} {name!r}.")
            else:
                raise unknown_name(self.kind, name, self.names())
        return self._classes[name]

    def choices(self, name: str) -> dict[str, tuple[Any, ...]]:
        """The options of `name` that take one of a few values, each with these, its default first.

        Raises:
            SpecError: the name is unknown.
        """
        cls = self.get(name)
        hints = typing.get_type_hints(cls)
        return {
            option.name: (option.default, *(value for value in typing.get_args(hint) if value != option.default))
            for option in dataclasses.fields(cls)
            if typing.get_origin(hint := hints[option.name]) is Literal
        }

    def build(self, name: str, options: Mapping[str, Any]) -> Any:
        """An instance of `name` configured by `options`, each checked against the dataclass field's type.

        Raises:
            SpecError: unknown name or option, or a value of the wrong type.
        """
        cls = self.get(name)
        hints = typing.get_type_hints(cls)
        known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
        for option, value in options.items():
            if option not in known:
                raise unknown_name(f"option of {self.kind} {name!r}:", option, known)
            if not _matches(value, known[option]):
                allowed = _describe(known[option])
                raise SpecError(f"{self.kind} {name!r}: option {option}={value!r} must be {allowed}.")
        return cls(**{option: tuple(value) if isinstance(value, list) else value for option, value in options.items()})


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_matches(part, typing.get_args(hint)[0]) for part in value)
    if hint is type(None):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    if origin is tuple:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else hint.__name__


METHODS = Registry("method", "mmcompress.methods", "mmcompress.methods")
POLICIES = Registry("KV policy", "mmcompress.policies", "mmcompress.policies")
register = METHODS.register
register_policy = POLICIES.register
