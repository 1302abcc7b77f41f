"""Golden cases: finding, reading and comparing them.

A case is a JSON sidecar with parameters and the role of every tensor, and the tensors of the same stem beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parity.handlers import HANDLERS, Handler, Kept
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
        inputs: tensors of role "input", half precision upcast.
        expected: tensors of role "output", likewise.
    """

    handler: Handler
    sidecar: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters the case was made with."""
        return self.sidecar["params"]


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
    return sorted(path for path in cases if not methods or _method(path) in {*methods, None})


def load(path: Path) -> Case:
    """Read a case; whatever is wrong with it raises."""
    handler = find_handler(path.stem)
    assert handler is not None, f"no handler for {path.stem!r}; known prefixes: {', '.join(HANDLERS)}"
    assert _sidecar(path).exists(), f"{path.name} has no sidecar"
    sidecar = json.loads(path.read_text(encoding="utf-8"))
    tensors = {}
    if "inputs" in sidecar:
        tensors.update(load_file(path.with_name(f"{sidecar['inputs']}.safetensors")))
    if path.with_suffix(".safetensors").exists():
        tensors.update(load_file(path.with_suffix(".safetensors")))
    declared = sidecar["tensors"]
    assert declared.keys() == tensors.keys(), f"sidecar and file disagree on {sorted(declared.keys() ^ tensors.keys())}"
    by_role: dict[str, dict[str, Tensor]] = {"input": {}, "output": {}}
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        assert shape == declared[name]["shape"], f"{name} is {shape}, its sidecar says {declared[name]['shape']}"
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        by_role[declared[name]["role"]][name] = tensor.float() if half else tensor
    return Case(handler, sidecar, by_role["input"], by_role["output"])


def check(case: Case) -> None:
    """Recompute the case and compare every output that is not listed as unchecked."""
    outputs = {name: value for name, value in case.expected.items() if name not in case.handler.unchecked}
    assert outputs, "the case has no output to check"
    actual = case.handler.run(case)
    for name, expected in outputs.items():
        assert name in actual, f"{name} is not checked"
        value = actual[name]
        if isinstance(value, Kept) and _gap(case.sidecar) < SMALLEST_GAP:
            _compare_floats(name, value.scores[value.indices].sort().values, value.scores[expected].sort().values, case)
            continue
        value = value.indices if isinstance(value, Kept) else value
        if expected.is_floating_point():
            _compare_floats(name, value, expected, case)
        else:
            assert not value.is_floating_point(), f"{name} is {value.dtype}, expected {expected.dtype}"
            assert value.shape == expected.shape, f"{name} is {list(value.shape)}, expected {list(expected.shape)}"
            wrong = (value != expected).nonzero()
            assert len(wrong) == 0, f"{name} differs at {wrong[0].tolist()} and {len(wrong) - 1} other places"


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _method(path: Path) -> str | None:
    """The method a case belongs to, "" if it names none; None if its sidecar cannot be read."""
    handler = find_handler(path.stem)
    if handler is not None:
        return handler.method
    try:
        return str(json.loads(_sidecar(path).read_text(encoding="utf-8")).get("method", "")).replace("_", "-")
    except (OSError, ValueError, AttributeError):
        return None


def _compare_floats(name: str, actual: Tensor, expected: Tensor, case: Case) -> None:
    rtol, atol = _tolerance(name, expected, case.sidecar.get("tolerance", case.handler.tolerance))
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, check_dtype=False, msg=lambda message: f"{name}: {message}"
    )


def _tolerance(name: str, expected: Tensor, given: Any) -> tuple[float, float]:
    """`(rtol, atol)`; the sidecar's `given` wins: a number, "rtol X atol Y" or a dict, for all outputs or by output."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    if isinstance(given, dict) and not given.keys() & {"rtol", "atol"}:
        given = given.get(name, given.get(name.removeprefix("out_")))
    if isinstance(given, (int, float)):
        return given, given * largest
    written = {key: float(value) for key, value in re.findall(r"(rtol|atol)\W+([\d.]+(?:e[-+]?\d+)?)", str(given))}
    if written:
        return written.get("rtol", 0.0), written.get("atol", 0.0)
    return TOLERANCE, TOLERANCE * largest


def _gap(sidecar: Mapping[str, Any]) -> float:
    """The smallest distance between a kept and a dropped score that the sidecar states; infinite if it states none."""
    stated = [sidecar.get(name) for name in ("topk_gap", "total_gap")]
    gaps = sidecar.get("gaps", {})
    stated += gaps.values() if isinstance(gaps, dict) else gaps
    return min((gap for gap in stated if gap is not None), default=torch.inf)
