"""Golden cases: finding, reading and comparing them.

A case is a JSON sidecar with parameters and the tensors of the same stem beside it. The sidecar gives the role of every
tensor, or the handler says which ones are given; entries of a sidecar's rows or cases then count as tensors
`rows.NUMBER.ENTRY` and `cases.NUMBER.ENTRY`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parity.handlers import HANDLERS, NOT_BUILT, Handler, Kept, matches
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 2e-5
SMALLEST_GAP = 1e-6


@dataclass(frozen=True)
class Case:
    """A case in memory.

    Args:
        handler: what recomputes it.
        sidecar: the whole JSON.
        inputs: what is given, half precision upcast.
        expected: what is to be recomputed, likewise.
    """

    handler: Handler
    sidecar: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters the case was made with."""
        return self.sidecar["params"]

    @property
    def outputs(self) -> dict[str, Tensor]:
        """Those of `expected` that are compared."""
        return {name: value for name, value in self.expected.items() if not matches(name, self.handler.unchecked)}

    def gap(self, name: str) -> float:
        """How far the last kept and the first dropped of output `name` are apart in score, as the sidecar states it.

        Where it states nothing, that is too little to tell if it gives no roles either, and enough if it does.
        """
        gaps = self.sidecar.get("gaps", {})
        own = [gap for scorer, gap in gaps.items() if name.endswith(f"_{scorer}")]
        stated = [self.sidecar.get("topk_gap"), self.sidecar.get("total_gap"), *(own or gaps.values())]
        roles = any("role" in tensor for tensor in self.sidecar.get("tensors", {}).values())
        return min((gap for gap in stated if gap is not None), default=torch.inf if roles else 0.0)


def find_handler(stem: str) -> Handler | None:
    """The handler of the longest prefix that `stem` starts with."""
    prefixes = [prefix for prefix in HANDLERS if stem.startswith(prefix)]
    return HANDLERS[max(prefixes, key=len)] if prefixes else None


def choose(folder: Path, methods: Collection[str]) -> list[Path]:
    """The cases below `folder`, those of `methods` alone if any are named; tensors without a sidecar are cases too."""
    found = [*folder.rglob("*.json"), *(path for path in folder.rglob("*.safetensors") if not _sidecar(path).exists())]
    cases = [
        path
        for path in found
        if "manifests" not in path.relative_to(folder).parts and not path.stem.startswith("common_T")
    ]
    return sorted(path for path in cases if not methods or _of_methods(path, methods))


def load(path: Path) -> Case:
    """Read a case; whatever is wrong with it raises."""
    handler = find_handler(path.stem)
    assert handler is not None, f"no handler for {path.stem!r}; known prefixes: {', '.join(HANDLERS)}"
    assert _sidecar(path).exists(), f"{path.name} has no sidecar"
    sidecar = json.loads(path.read_text(encoding="utf-8"))
    own = load_file(path.with_suffix(".safetensors")) if path.with_suffix(".safetensors").exists() else {}
    named = None if NOT_BUILT in handler.unchecked else sidecar.get("inputs")
    declared, shared = sidecar.get("tensors", {}), _shared_inputs(path, named)
    differing = (declared.keys() ^ own.keys()) - shared.keys()
    assert not differing, f"sidecar and file disagree on {sorted(differing)}"
    for name, tensor in own.items():
        shape = list(tensor.shape)
        assert shape == declared[name]["shape"], f"{name} is {shape}, its sidecar says {declared[name]['shape']}"
    given = {*shared, *(name for name in own if declared[name].get("role") == "input" or matches(name, handler.inputs))}
    tensors = {**shared, **own}
    entries = {
        f"{table}.{number}.{entry}": torch.tensor(value)
        for table in ("rows", "cases")
        for number, row in enumerate(sidecar.get(table, []))
        for entry, value in row.items()
    }
    given |= {name for name in entries if matches(name, handler.inputs)}
    tensors |= entries
    by_role: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    for name, tensor in tensors.items():
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        by_role[name in given][name] = tensor.float() if half else tensor
    return Case(handler, sidecar, by_role[True], by_role[False])


def check(case: Case) -> None:
    """Recompute the case and compare every output that is not listed as unchecked."""
    assert case.outputs or NOT_BUILT in case.handler.unchecked, "the case has no output to check"
    actual = case.handler.run(case)
    for name, expected in case.outputs.items():
        assert name in actual, f"{name} is not checked"
        value = actual[name]
        if isinstance(value, Kept):
            value, expected = _sets(name, value, expected, by_score=case.gap(name) < SMALLEST_GAP)
        if expected.is_floating_point():
            _compare_floats(name, value, expected, case)
        else:
            assert not value.is_floating_point(), f"{name} is {value.dtype}, expected {expected.dtype}"
            assert value.shape == expected.shape, f"{name} is {list(value.shape)}, expected {list(expected.shape)}"
            wrong = (value != expected).nonzero()
            assert len(wrong) == 0, f"{name} differs at {wrong[0].tolist()} and {len(wrong) - 1} other places"


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _of_methods(path: Path, methods: Collection[str]) -> bool:
    """Whether a case belongs to `methods`; one whose sidecar cannot be read may."""
    handler = find_handler(path.stem)
    if handler is not None:
        return not handler.methods.isdisjoint(methods)
    try:
        return json.loads(_sidecar(path).read_text(encoding="utf-8")).get("method", "").replace("_", "-") in methods
    except (OSError, ValueError, AttributeError):
        return True


def _shared_inputs(path: Path, named: str | None) -> dict[str, Tensor]:
    """The tensors of file `named`, or those of it that are named: "x,y in FILE"."""
    if named is None:
        return {}
    *wanted, stem = re.match(r"(?:(\S+) in )?(\S+)", named).groups()  # type: ignore[union-attr]
    tensors = load_file(path.with_name(f"{stem}.safetensors"))
    return {name: tensors[name] for name in wanted[0].split(",")} if wanted[0] else tensors


def _sets(name: str, kept: Kept, expected: Tensor, *, by_score: bool) -> tuple[Tensor, Tensor]:
    """What is kept and what is expected, head after head, both ascending; their scores if they are to decide."""
    counts = [len(indices) for indices in kept.indices]
    assert sum(counts) == expected.numel(), f"{name} has {expected.numel()} elements, {sum(counts)} are kept"
    wanted = [indices.long().sort().values for indices in expected.flatten().split(counts)]
    if not by_score:
        return torch.cat(list(kept.indices)), torch.cat(wanted)
    for indices in wanted:
        known = len(indices.unique()) == len(indices) and bool((indices < kept.scores.shape[1]).all())
        assert known, f"{name} names something twice, or what there is not"
    actual, published = (
        torch.cat([scores[indices].sort().values for scores, indices in zip(kept.scores, rows, strict=True)])
        for rows in (kept.indices, wanted)
    )
    return actual, published


def _compare_floats(name: str, actual: Tensor, expected: Tensor, case: Case) -> None:
    rtol, atol = _tolerance(name, expected, case.sidecar.get("tolerance", case.handler.tolerance))
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, check_dtype=False, msg=lambda message: f"{name}: {message}"
    )


def _tolerance(name: str, expected: Tensor, given: Any) -> tuple[float, float]:
    """`(rtol, atol)`; the sidecar's `given` wins: a number, "rtol X atol Y" or a dict by output or pattern."""
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if isinstance(given, dict) and not given.keys() & {"rtol", "atol"}:
        stem = name.removeprefix("out_")
        parts = [part for part in given if stem.startswith(part.removeprefix("out_")) or matches(name, (part,))]
        given = given[max(parts, key=len)] if parts else None
    if isinstance(given, (int, float)):
        return given, given * largest
    written = {key: float(value) for key, value in re.findall(r"(rtol|atol)\W+([\d.]+(?:e[-+]?\d+)?)", str(given))}
    if written:
        return written.get("rtol", 0.0), written.get("atol", 0.0)
    return TOLERANCE, TOLERANCE * largest
