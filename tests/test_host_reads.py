"""Where the host waits for the device: nowhere in ops, and elsewhere only as is listed here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import host_reads
from kernel_calls import one_of_each
from policies.test_evictors import EVICTORS, evictor, observed, prompt
from registered import variants

from mmcompress import ops
from mmcompress.evals.bench.items import CLIP, make_item
from mmcompress.method import VisualMethod
from mmcompress.registry import METHODS

CALLS = one_of_each()
FOLDERS = [path.parent.name for path in Path(ops.__file__).parent.glob("kernels/*/reference.py")]

SHARES = "how many tokens each tile gets depends on how many it has"
SPREAD = "the method's own threshold decides how many tokens are taken, or whether there are any to rescale"
LEFT = "tokens that are left behind the first choice are listed, whose number attention decides"
MAY_WAIT: dict[str, tuple[set[str], str]] = {
    "aim": ({"bincount", "tolist"}, SHARES),
    "cdpruner": ({"bincount", "tolist", "_local_scalar_dense"}, f"{SHARES}; {SPREAD}"),
    "fastervlm": ({"bincount", "tolist"}, SHARES),
    "fastvid": ({"bincount", "tolist", "nonzero", "index by mask"}, "clips are cut where frames change"),
    "globalcom2": (
        {"bincount", "cpu", "_local_scalar_dense", "index by mask", "index_put_ by mask"},
        "shares of crops are worked out in float64 on the host",
    ),
    "hiprune": ({"bincount", "tolist", "_local_scalar_dense"}, f"{SHARES}; how wide rows are"),
    "hired": (
        {"bincount", "cpu", "tolist", "_local_scalar_dense", "index by mask"},
        "shares of crops are worked out in float64 on the host",
    ),
    "holov": ({"bincount", "tolist", "_local_scalar_dense", "index by mask"}, f"{SHARES}, again until none is left"),
    "prumerge": ({"bincount", "tolist", "_local_scalar_dense"}, f"{SHARES}; {SPREAD}"),
    "prumerge-plus": ({"bincount", "tolist", "_local_scalar_dense", "index by mask"}, f"{SHARES}; {SPREAD}"),
    "tokencorr": ({"bincount", "tolist", "_local_scalar_dense"}, f"{SHARES}; {SPREAD}"),
    "vidcom2": ({"index by mask", "_local_scalar_dense"}, "shares of frames are made up to the budget"),
    "visionzip": ({"bincount", "tolist", "nonzero", "_local_scalar_dense"}, f"{SHARES}; {LEFT}"),
    "vispruner": ({"bincount", "tolist", "nonzero"}, f"{SHARES}; {LEFT}"),
    "vtc-cls": ({"bincount", "tolist"}, SHARES),
}
POLICIES_MAY_WAIT = {
    "adakv": ({"bincount", "tolist"}, "heads hold different numbers of entries, as attention decides"),
    "tgv-kv": ({"tolist"}, "layers hold different numbers of entries, as attention decides"),
}
REFERENCES_MAY_WAIT = {
    "greedy_select": ({"tolist"}, "rows of similarities are made when they are asked for, on the CPU"),
    "dpp_select": ({"tolist"}, "likewise"),
}


def implementation(name: str, module: str) -> Any:
    found = [importlib.import_module(f"mmcompress.kernels.{folder}.{module}") for folder in FOLDERS]
    return next(getattr(one, name) for one in found if hasattr(one, name))


@pytest.mark.parametrize("name", CALLS)
def test_references_of_ops(name: str) -> None:
    with host_reads() as found:
        implementation(name, "reference")(*CALLS[name])
    assert found <= REFERENCES_MAY_WAIT.get(name, (set(), ""))[0]


@pytest.mark.parametrize("name", CALLS)
def test_launches_of_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not importlib.import_module("triton").knobs.runtime.interpret:
        pytest.skip("triton came before its switch")
    monkeypatch.setattr(interpreter.InterpretedFunction, "__getitem__", lambda *_: lambda *_, **__: None)
    with host_reads() as found:
        implementation(name, "triton")(*CALLS[name])
    assert not found


@pytest.mark.parametrize("spec", [spec for spec in variants("pre_llm") if spec.name != "specpc"], ids=str)
def test_methods(spec: Any) -> None:
    method: VisualMethod = METHODS.build(spec.name, spec.options)
    needs = method.needs(CLIP)
    item = make_item(180, needs, "image", 0, "cpu")
    with host_reads() as found:
        method.select(item, 20, needs)
    assert found <= MAY_WAIT.get(spec.name, (set(), ""))[0]


@pytest.mark.parametrize("name", EVICTORS)
def test_policies(name: str) -> None:
    policy = evictor(name)
    row = prompt(policy)[1]
    with host_reads() as found:
        policy.select(observed(policy, row), 10)
    assert found <= POLICIES_MAY_WAIT.get(name, (set(), ""))[0]


def test_the_detector_detects() -> None:
    mask = torch.tensor([True, False])
    for read in (lambda: int(mask.sum()), lambda: mask.tolist(), lambda: mask[mask], lambda: bool(mask.any())):
        with host_reads() as found:
            read()
        assert len(found) == 1
