"""What the user asked for: one grammar for strings, dicts and JSON files, parsed into literals and never evaluated."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmcompress.budget import Budget
from mmcompress.errors import SpecError, unknown_name
from mmcompress.types import Positions

FORMAT = "mmcompress-config"
VERSION = 1
BUDGETS = ("keep", "pruning_rate", "keep_avg")

_SPEC = re.compile(r"\s*(?P<name>[A-Za-z0-9][\w-]*)\s*(?:\((?P<arguments>.*)\)\s*)?", re.DOTALL)
_ARGUMENT = re.compile(
    r"""\s*(?P<key>[A-Za-z_]\w*)\s*=\s*
    (?:(?P<double>"(?:[^"\\]|\\.)*")|'(?P<single>[^']*)'|\[(?P<list>[^][]*)\]|(?P<bare>[^][\s,()='"]+))
    \s*(?:,|$)""",
    re.VERBOSE,
)
_WORDS = {"true": True, "True": True, "false": False, "False": False, "None": None, "null": None}


@dataclass(frozen=True)
class Spec:
    """A method or policy by name, with its budget and options.

    Written `name`, `name(keep=0.2, option=value)` or `{"name": ..., "keep": ..., "option": ...}`; a value may be a list
    of numbers, `[3, 5]`.
    """

    name: str
    keep: Budget | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in self.options.items()}
        object.__setattr__(self, "options", options)

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | Spec) -> Spec:
        """Read a spec from a string or a dict.

        Raises:
            SpecError: it does not follow the grammar.
        """
        if isinstance(value, Spec):
            return value
        if isinstance(value, str):
            match = _SPEC.fullmatch(value)
            if match is None:
                raise SpecError(f"cannot read {value!r}: write name or name(option=value, ...).")
            return cls._build(match["name"], list(_arguments(match["arguments"] or "", value)))
        if isinstance(value, Mapping):
            entries = dict(value)
            name = entries.pop("name", None)
            if not isinstance(name, str):
                raise SpecError(f'cannot read {value!r}: a dict needs "name": "<method>".')
            return cls._build(name, list(entries.items()))
        raise SpecError(f"cannot read {value!r}: give a string or a dict, not {type(value).__name__}.")

    @classmethod
    def _build(cls, name: str, entries: Sequence[tuple[str, Any]]) -> Spec:
        options = dict(entries)
        if len(options) != len(entries):
            raise SpecError(f"{name}: an option is given twice.")
        budget = _budget(*(options.pop(key, None) for key in BUDGETS))
        return cls(name.lower().replace("_", "-"), budget, options)

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-ready data that `parse` reads back."""
        keep = {} if self.keep is None else self.keep.option
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in self.options.items()}
        return {"name": self.name, **keep, **options}

    def __str__(self) -> str:
        entries = {**({} if self.keep is None else self.keep.option), **self.options}
        arguments = ", ".join(f"{key}={_literal(value)}" for key, value in entries.items())
        return f"{self.name}({arguments})" if arguments else self.name


def split_specs(text: str) -> list[str]:
    """Several specs written after each other, separated by commas."""
    return re.split(r",(?![^(]*\))", text)


SpecLike = str | Mapping[str, Any] | Spec


@dataclass(frozen=True)
class CompressionConfig:
    """All that is applied to a model: visual methods in order, KV policies likewise, the treatment of positions.

    Raises:
        SpecError: a part is malformed.
    """

    methods: tuple[Spec, ...] = ()
    kv: tuple[Spec, ...] = ()
    positions: Positions | None = None

    def __post_init__(self) -> None:
        if self.positions is not None and self.positions not in typing.get_args(Positions):
            raise unknown_name("positions", str(self.positions), typing.get_args(Positions))

    @classmethod
    def create(
        cls,
        method: SpecLike | Sequence[SpecLike] | None = None,
        *,
        keep: int | float | None = None,
        pruning_rate: float | None = None,
        keep_avg: int | float | None = None,
        kv: SpecLike | Sequence[SpecLike] | None = None,
        positions: Positions | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> CompressionConfig:
        """Assemble a config from the arguments of `wrap`; `keep` and `options` need exactly one method."""
        methods = [Spec.parse(entry) for entry in _listed(method)]
        budget = _budget(keep, pruning_rate, keep_avg)
        if (budget is not None or options) and len(methods) != 1:
            raise SpecError(
                "keep and method options go with exactly one method; "
                "write them inside each spec instead, as in ['todre(keep=0.2)']."
            )
        if budget is not None:
            if methods[0].keep is not None:
                raise SpecError(f"keep is given twice: {methods[0].keep} in the spec and {budget} beside it.")
            methods[0] = replace(methods[0], keep=budget)
        if options:
            twice = sorted(set(options) & set(methods[0].options))
            if twice:
                raise SpecError(f"{methods[0].name}: option {twice[0]!r} is given twice.")
            methods[0] = replace(methods[0], options={**methods[0].options, **options})
        return cls(tuple(methods), tuple(Spec.parse(entry) for entry in _listed(kv)), positions)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionConfig:
        """Read `{"method": ..., "keep": ..., "kv": ..., "positions": ...}`, with or without the file header."""
        entries = dict(data)
        if entries.pop("format", FORMAT) != FORMAT:
            raise SpecError(f"not an mmcompress config: format is {data['format']!r}, expected {FORMAT!r}.")
        if entries.pop("version", VERSION) != VERSION:
            raise SpecError(f"config version {data['version']!r} is not supported; this release reads {VERSION}.")
        allowed = ("method", *BUDGETS, "kv", "positions")
        for key in entries:
            if key not in allowed:
                raise unknown_name("config entry", key, allowed)
        return cls.create(**entries)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready data with its format and version."""
        data: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        data["method"] = [spec.to_dict() for spec in self.methods]
        if self.kv:
            data["kv"] = [spec.to_dict() for spec in self.kv]
        if self.positions is not None:
            data["positions"] = self.positions
        return data

    def save(self, path: str | Path) -> None:
        """Write the config as versioned JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CompressionConfig:
        """Read a config written by `save`.

        Raises:
            SpecError: the file is missing, no JSON, of another format or version, or malformed.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"cannot read config {path}: {error}") from error
        if not isinstance(data, dict):
            raise SpecError(f"cannot read config {path}: expected a JSON object.")
        return cls.from_dict(data)

    def __str__(self) -> str:
        return " + ".join(str(spec) for spec in (*self.methods, *self.kv))


def _listed(given: Any) -> list[Any]:
    """One spec, several or none, as a list."""
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]


def _budget(keep: Any, pruning_rate: Any, keep_avg: Any) -> Budget | None:
    given = [name for name, value in zip(BUDGETS, (keep, pruning_rate, keep_avg), strict=True) if value is not None]
    if len(given) > 1:
        raise SpecError(f"give {given[0]} or {given[1]}, not both.")
    if keep_avg is not None:
        return Budget(keep_avg, average=True)
    if pruning_rate is not None:
        return Budget.from_pruning_rate(pruning_rate)
    return None if keep is None else Budget(keep)


def _arguments(text: str, whole: str) -> Iterator[tuple[str, Any]]:
    position = 0
    while text[position:].strip():
        match = _ARGUMENT.match(text, position)
        if match is None:
            raise SpecError(f"cannot read {whole!r} from {text[position:].strip()!r}: write option=value, ...")
        if match["bare"] is not None:
            yield match["key"], _scalar(match["bare"])
        elif match["list"] is not None:
            yield match["key"], _numbers(match["list"], whole)
        elif match["single"] is not None:
            yield match["key"], match["single"]
        else:
            yield match["key"], _unescape(match["double"], whole)
        position = match.end()


def _unescape(text: str, whole: str) -> str:
    """Double-quoted text, with the escapes of JSON."""
    try:
        return str(json.loads(text, strict=False))
    except ValueError as error:
        raise SpecError(f"cannot read {whole!r}: bad escape in {text}; use single quotes for plain text.") from error


def _numbers(text: str, whole: str) -> tuple[int | float, ...]:
    """What stands between brackets."""
    words = text.removesuffix(",").split(",") if text.strip() else []
    numbers = tuple(_scalar(word.strip()) for word in words)
    for word, number in zip(words, numbers, strict=True):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise SpecError(f"cannot read {whole!r}: a list holds numbers, as in [3, 5], not {word.strip()!r}.")
    return numbers


def _scalar(word: str) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, str) and _scalar(value) == value and re.fullmatch(r"[^][\s,()='\"]+", value):
        return value
    return json.dumps(value) if isinstance(value, str) else str(value)
